"""Tables are readable and name the machine."""

import torch

from experiments.bench import report
from lit_fanions.cli import console


def test_table_aligns_columns():
    assert console.table(["name", "value"], [["a", 1.5], ["long name", 10]]).splitlines() == [
        "name       value",
        "---------  -----",
        "a            1.5",
        "long name     10",
    ]


def test_machine_line_names_the_processor():
    line = report.machine_line(torch.device("cpu"))
    assert console.processor() in line
    assert "threads" in line
    assert torch.__version__ in line


def test_report_shows_all_tables():
    more = [console.Table("second", ["name"], [["x"]])]
    shown = str(report.Report("first", ["n"], [[123456.0]], ["a note"], {}, more=more))
    assert shown.splitlines() == [
        "first", "", "     n", "------", "123456", "", "second", "", "name", "----", "x", "",
        "a note",
    ]  # fmt: skip

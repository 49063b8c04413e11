"""Tables are plain text of a readable width."""

import argparse

import pytest

from lit_fanions.cli import console
from lit_fanions.cli.app import Reader
from lit_fanions.cli.console import Refused, table

LONG = "a sentence that is repeated; " * 6


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def test_text_is_left_of_its_column_and_numbers_are_right():
    assert table(["name", "value"], [["a", 1.5], ["long name", 10]]).splitlines() == [
        "name       value",
        "---------  -----",
        "a            1.5",
        "long name     10",
    ]


def test_markup_and_emoji_codes_are_not_interpreted():
    assert table(["[b]x[/b]"], [[":smile: [red]"]]).splitlines()[::2] == [
        "[b]x[/b]",
        ":smile: [red]",
    ]


def test_long_text_is_wrapped_at_100_columns():
    lines = table(["text", "mean"], [[LONG, "0.9712 ± 0.0012"]]).splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(line[:-16].strip() for line in lines[2:3]).startswith("a sentence")
    assert sum("0.9712 ± 0.0012" in line for line in lines) == 1


def test_terminal_sets_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, table(["text"], [[LONG]]).splitlines())) <= 60


def test_numbers_and_words_are_never_cut():
    path = "runs/" + "x" * 120
    line = table(["path", *"abcdefghijkl"], [[path, *[-1.25e-7] * 12]]).splitlines()[-1]
    assert line.split() == [path, *["-1.25e-07"] * 12]


def test_table_without_rows_has_its_headings():
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


RESERVED = {"--model.optimizer.matrix.lr": "use --factors", "--trainer.logger": "they are in --out"}


@pytest.mark.parametrize(
    "arg",
    [
        "--model.optimizer.matrix.lr",
        "--model.init_args.optimizer.matrix.lr=0.1",
        "--trainer.logger=false",
        "--trainer.logger.init_args.name=x",
        "--trainer.logger+=CSVLogger",
    ],
)
def test_reserved_options_are_refused(arg):
    with pytest.raises(Refused, match=r"^--\S+[a-z] cannot be used here: "):
        console.refuse_reserved(["--trainer.max_steps", "3", arg, "1"], RESERVED)


def test_options_that_only_begin_alike_are_accepted():
    args = ["--model.optimizer.matrix.lr_min=1", "--trainer.logger_x", "--model.optimizer.other.lr"]
    console.refuse_reserved(args, RESERVED)


def test_mistyped_options_of_the_command_are_refused():
    parser = argparse.ArgumentParser()
    for option in ("--config", "--seeds", "--jobs", "--metric", "--out", "--set", "--tune"):
        parser.add_argument(option)
    typos = {"--seed": "--seeds", "--job=2": "--jobs", "--metrics": "--metric"}
    for given, meant in typos.items():
        with pytest.raises(Refused, match=f"unknown option --.*; did you mean '{meant}'"):
            console.refuse_mistyped(["--trainer.max_steps=2", given, "2"], parser)
    given = [*sorted(console.FIT_OPTIONS), "--data.seed", "--model.metric", "--trainer.logger"]
    console.refuse_mistyped(given, parser)


def test_all_options_of_fit_are_known(project):
    fit = Reader(["fit", "--config=recipe.yaml"]).parser._subcommands_action.choices["fit"]
    options = {option for action in fit._actions for option in action.option_strings}
    assert {option for option in options if option[1:2] == "-" and "." not in option} - {
        "--help"
    } <= console.FIT_OPTIONS

"""Run everything that has a CUDA path and print a table: `make gpu-check`, or this file.

Any Python with torch, Lightning and pytest will do; the package need not be installed. Arguments
are passed to pytest, such as `-k step` or `--junit-xml FILE`. With pytest-xdist the tests run in
several processes, 6 unless `-n` says otherwise. Without a GPU this says so and succeeds.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "test_cuda.py"
# Not the options of pyproject.toml: they refuse settings of plugins that may be missing here.
OPTIONS = ["-o", "addopts=--import-mode=importlib", "-m", "cuda", "--quiet", "--tb=short"]
WORKERS = 6


class Results:
    """A pytest plugin that collects a row of the table per test.

    Attributes:
        rows: Name, outcome, time and measurement of each test.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test that has ended, or that failed or was skipped before it began."""
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        measured = dict(report.user_properties).get("measured", "")
        if report.skipped and isinstance(report.longrepr, tuple):
            measured = report.longrepr[2].removeprefix("Skipped: ")
        self.rows.append((name, report.outcome, f"{report.duration:.1f} s", str(measured)))


def run_tests(file: Path, args: Sequence[str]) -> tuple[int, str]:
    """Run the tests of a file.

    Args:
        file: The file.
        args: Arguments of pytest.

    Returns:
        pytest's exit status and the table, empty without tests.
    """
    from lit_fanions.cli import console

    results = Results()
    status = int(pytest.main([*args, str(file)], plugins=[results]))
    columns = ["check", "outcome", "time", "measured"]
    return status, console.table(columns, results.rows) if results.rows else ""


def main(args: Sequence[str]) -> int:
    """Run the tests that need a GPU.

    Args:
        args: Arguments of pytest.

    Returns:
        pytest's exit status; 0 without a GPU.
    """
    if not torch.cuda.is_available():
        print("gpu-check: skipped, torch finds no GPU here")
        return 0
    parallel = importlib.util.find_spec("xdist") and not any(a.startswith("-n") for a in args)
    workers = ["-n", str(WORKERS)] if parallel else []
    status, table = run_tests(FILE, [*OPTIONS, "--rootdir", str(ROOT), *workers, *args])
    from experiments.bench import report

    print(f"\n{table}\n\n{report.machine_line(torch.device('cuda'))}")
    return status


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))

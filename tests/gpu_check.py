"""Run everything that has a CUDA path and print a table: `make gpu-check`.

Without a GPU it says so and succeeds.
"""

import sys
from pathlib import Path

import pytest
import torch

from lit_fanions.cli import console

FILE = Path(__file__).with_name("test_cuda.py")


class Results:
    """A pytest plugin that collects a row of the table per test."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome, and what the test measured."""
        if console.when != "call" and console.passed:
            return
        name = console.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        measured = dict(console.user_properties).get("measured", "")
        if console.skipped and isinstance(console.longrepr, tuple):
            measured = console.longrepr[2].removeprefix("Skipped: ")
        self.rows.append((name, console.outcome, f"{console.duration:.1f} s", str(measured)))


def main() -> int:
    """Return pytest's exit status, 0 without a GPU."""
    if not torch.cuda.is_available():
        print("gpu-check: skipped, torch finds no GPU here")
        return 0
    results = Results()
    status = pytest.main(["-m", "cuda", "--quiet", "--tb=short", str(FILE)], plugins=[results])
    print()
    print(console.table(["check", "outcome", "time", "measured"], results.rows))
    print(f"\n{console.machine_line(torch.device('cuda'))}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

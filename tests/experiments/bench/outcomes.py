"""Run the timing commands and read what they print and save."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
from unittest import mock

import pytest

from experiments.bench.__main__ import main


@dataclasses.dataclass
class Outcome:
    """The text, the JSON file and the picture of a command."""

    printed: str
    result: dict
    plot: bytes

    def rows(self, first: str) -> list[list[str]]:
        """Return the cells of the table whose heading starts with some text."""
        lines = self.printed.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(first))
        body = itertools.takewhile(bool, lines[start + 2 :])
        return [re.split(r" {2,}", line) for line in body]


def outcome(folder, *args):
    """Run a race in its quick form on the CPU; its files go into a folder."""
    # A terminal so wide that no cell is wrapped.
    wide = mock.patch.dict(os.environ, COLUMNS="300")
    with wide, contextlib.redirect_stdout(io.StringIO()) as printed:
        files = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
        assert main([*args, "--quick", "--device", "cpu", *files]) == 0
    result = json.loads((folder / "out.json").read_text())
    return Outcome(printed.getvalue(), result, (folder / "out.png").read_bytes())


def refused(capfd, *args):
    """Return the line that a command with a mistake ends with."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    usage, _, message = err.partition(f"python -m experiments.bench {args[0]}: error: ")
    assert "usage: " in usage
    assert message.count("\n") == 1
    return message.rstrip()

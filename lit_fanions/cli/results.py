"""The results of a command: tables, a picture, and all numbers with the settings behind them."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fanions.callbacks.figures import new_figure
from lit_fanions.cli.console import Table, machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Outcome:
    """The results of a command."""

    tables: Sequence[Table]  # printed, and kept in the JSON file
    columns: Sequence[str]  # headings of the CSV file
    rows: Sequence[Sequence[object]]  # all numbers, one observation a row
    settings: Mapping[str, Any]  # options, seeds and recipes that the numbers depend on
    draw: Callable[[Figure], None] | None = None  # draws the picture
    size: tuple[float, float] = (13, 5)  # of the picture, in inches
    notes: Sequence[str] = ()  # lines below the tables
    program: str = "lit_fanions"  # the module that was run

    def __str__(self) -> str:
        return "\n".join([*map(str, self.tables), *self.notes])

    def findings(self, folder: Path) -> dict[str, Any]:
        """Return the entries that a subclass adds to the JSON file in a folder."""
        return {}

    def save(self, folder: Path, name: str) -> None:
        """Write NAME.csv, NAME.json and NAME.png into a folder, and print where they are."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])
        contents = {
            "command": shlex.join(["python", "-m", self.program, *sys.argv[1:]]),
            "commit": commit(),
            "machine": machine(),
            "settings": _plain(self.settings),
            **self.findings(folder),
            "notes": self.notes,
            "tables": [_plain(vars(table)) for table in self.tables],
            "columns": self.columns,
            "rows": _plain(self.rows),
        }
        text = json.dumps(contents, indent=1, allow_nan=False)
        (folder / f"{name}.json").write_text(f"{text}\n")
        if self.draw is not None:
            figure = new_figure(*self.size)
            self.draw(figure)
            figure.savefig(folder / f"{name}.png", dpi=150)
        endings = ".csv, .json" if self.draw is None else ".png, .csv, .json"
        print(f"saved: {folder}/{name}{endings}")


def recipe_digests(args: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each recipe that arguments of fit name."""
    values = (arg.partition("=")[2] if arg.startswith("--") else arg for arg in args)
    return {
        value: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for value in values
        if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value)
    }


@functools.cache
def commit() -> str | None:
    """Return this program's git commit, "-dirty" if files were changed; None outside of git."""
    git = functools.partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed package may lie in the folder of a repository that is not its own.
        git([*here, "ls-files", "--error-unmatch", Path(__file__).name])
        return git([*here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, "1 seed" or "2 seeds"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def drawable(values: Sequence[float]) -> list[float]:
    """Return values for a plot, in which non-finite ones leave a gap."""
    return [value if math.isfinite(value) else math.nan for value in values]


def logarithmic(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, labelled with plain numbers within decades too."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _plain(cell: Any) -> Any:
    """Return a value for JSON, which has no infinity and no NaN: None stands for them."""
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, Mapping):
        return {key: _plain(value) for key, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_plain(value) for value in cell]
    return cell

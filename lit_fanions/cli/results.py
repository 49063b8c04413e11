"""What a command leaves: a table, a picture, and all numbers with what they depend on."""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fanions.cli.console import Table, machine
from lit_fanions.cli.runner import commit, commits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Args:
        tables: For people: printed, and kept in the JSON.
        columns: Headings of the CSV.
        rows: All numbers, one observation a row.
        settings: What they depend on: options, seeds, recipes.
        draw: Draws the picture; None if there is none.
        size: Of the picture, inches.
        notes: Lines below the tables.
        program: The module that was run.
    """

    tables: Sequence[Table]
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    settings: Mapping[str, Any]
    draw: Callable[[Figure], None] | None = None
    size: tuple[float, float] = (13, 5)
    notes: Sequence[str] = ()
    program: str = "lit_fanions"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.tables), *self.notes])

    def findings(self) -> dict[str, Any]:
        """Return more entries for the JSON file; subclasses have some."""
        return {}

    def save(self, folder: Path, name: str) -> None:
        """Write NAME.csv, NAME.json and NAME.png, and say so.

        Args:
            folder: Where; made if it is not there.
            name: Of the command.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows])
        contents = {
            "command": shlex.join(["python", "-m", self.program, *sys.argv[1:]]),
            "commit": commit(),
            # Some may have been made before; sweeps note each run's own.
            **({"commits of runs": made} if (made := commits(folder / "runs")) else {}),
            "machine": machine(),
            "settings": _plain(self.settings),
            **self.findings(),
            "notes": self.notes,
            "tables": [_plain(vars(table)) for table in self.tables],
            "columns": self.columns,
            "rows": _plain(self.rows),
        }
        text = json.dumps(contents, indent=1, allow_nan=False)
        (folder / f"{name}.json").write_text(f"{text}\n")
        if self.draw is not None:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            # Not pyplot: that would look for a screen.
            figure = Figure(figsize=self.size, layout="constrained")
            FigureCanvasAgg(figure)
            self.draw(figure)
            figure.savefig(folder / f"{name}.png", dpi=150)
        endings = ".csv, .json" if self.draw is None else ".png, .csv, .json"
        print(f"saved: {folder}/{name}{endings}")


def plural(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"{count} {noun}{'s' * (count != 1)}"


def drawable(values: Sequence[float]) -> list[float]:
    """Values for a plot, in which what is not finite leaves a gap."""
    return [value if math.isfinite(value) else math.nan for value in values]


def logarithmic(axes: Axes) -> None:
    """Let the horizontal axis be logarithmic, with plain numbers within decades too."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _plain(cell: Any) -> Any:
    """A value for JSON, which has no infinity and no NaN: None stands for them."""
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, Mapping):
        return {key: _plain(value) for key, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_plain(value) for value in cell]
    return cell

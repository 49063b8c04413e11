"""Parts that commands share: refusals, tables, progress, the machine, reports of timings."""

import argparse
import dataclasses
import importlib
import io
import json
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from lit_fanions.checks import whole_number

# Bars whose lengths differ by more than this factor are drawn on a logarithmic scale.
_LINEAR = 30


class Refused(Exception):
    """A mistake that the user can put right, described in one line."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers or text in columns.

    Args:
        title: Title above the table.
        columns: Headings of the columns.
        rows: Cells of each row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __str__(self) -> str:
        return "\n".join([self.title, "", table(self.columns, self.rows), ""])


@dataclasses.dataclass(frozen=True)
class Panel:
    """One bar chart of a plot.

    Args:
        title: Title of the chart.
        unit: Unit of the bars' lengths.
        bars: Positive lengths by label.
    """

    title: str
    unit: str
    bars: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one command.

    Args:
        title: Title of the first table.
        columns: Headings of the first table.
        rows: Cells of the first table, numbers or text.
        notes: Lines below the tables.
        data: All raw numbers, for the JSON file.
        more: Further tables.
        panels: Charts of the plot.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str]
    data: dict[str, Any]
    more: Sequence[Table] = ()
    panels: Sequence[Panel] = ()

    def __str__(self) -> str:
        tables = [Table(self.title, self.columns, self.rows), *self.more]
        return "\n".join([*map(str, tables), *self.notes])

    def save(self, path: Path) -> None:
        """Write the raw numbers and the machine they were measured on as JSON."""
        contents = {"title": self.title, "machine": machine(), **self.data}
        path.write_text(json.dumps(contents, indent=2) + "\n")

    def plot(self, path: Path) -> None:
        """Draw the panels.

        Args:
            path: File to write; its ending chooses the format.

        Raises:
            Refused: If matplotlib is not installed.
        """
        wide = min(3, len(self.panels))
        high = math.ceil(len(self.panels) / wide)
        longest = max(len(panel.bars) for panel in self.panels)
        # Not pyplot, which would look for a screen.
        figure = require("matplotlib.figure", "--plot").Figure(
            figsize=(5 * wide, high * (1.2 + 0.25 * longest)), layout="constrained"
        )
        axes = figure.subplots(high, wide, squeeze=False).flat
        for panel, axis in zip(self.panels, axes, strict=False):
            lengths = list(panel.bars.values())
            axis.bar_label(axis.barh(list(panel.bars), lengths), fmt="%.3g", padding=2)
            axis.set(title=panel.title, xlabel=panel.unit)
            axis.margins(x=0.2)
            axis.invert_yaxis()
            if max(lengths) > _LINEAR * min(lengths):
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter("")
        for axis in axes[len(self.panels) :]:
            axis.set_axis_off()
        figure.savefig(path)


class Progress:
    """Count trainings that have ended, and estimate how long the others will take.

    Args:
        total: Number of trainings.
        ended: Number of those that had ended before.
    """

    def __init__(self, total: int, ended: int = 0) -> None:
        self._total, self._before, self._ended = total, ended, ended
        self._start = time.monotonic()

    def advance(self, name: str, outcome: str, ended: int | None = None) -> str:
        """Count a training that has ended, and return the line that reports it.

        Args:
            name: Name of the training.
            outcome: Its outcome.
            ended: Number of trainings that have ended, where others work on them too; by default
                one more than before.
        """
        self._ended = self._ended + 1 if ended is None else ended
        line = f"[{self._ended}/{self._total}] {name}: {outcome}"
        left, done = self._total - self._ended, self._ended - self._before
        if left <= 0 or done <= 0:
            return line
        seconds = (time.monotonic() - self._start) / done * left
        return f"{line}; about {format_duration(seconds)} left"


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that leaves it two or three digits at most."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def add_command(commands: Any, name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Add a module as a subcommand; its docstring is the help.

    Args:
        commands: Return value of ``add_subparsers``.
        name: Name of the subcommand.
        module: Module with a function ``add_arguments(parser)``.
    """
    text = module.__doc__ or ""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.partition("\n")[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(command)
    return command


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of a package that a command needs and the library does not.

    Args:
        module: Name of the module.
        purpose: The command or option that needs it, for the message.

    Raises:
        Refused: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Refused(f"{purpose} needs {package}: pip install {package}") from error


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are not whole numbers of at least 1; None counts as not given.

    Raises:
        Refused: At the first such option.
    """
    for name in names:
        if (count := getattr(options, name)) is not None:
            try:
                whole_number(f"--{name}", count)
            except ValueError as error:
                raise Refused(str(error)) from None


def output_file(text: str) -> Path:
    """Return the path of a file that can be written later, for argparse."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in an existing folder")
    return path


def plot_file(text: str) -> Path:
    """Return the path of a plot that can be written later, for argparse."""
    path = output_file(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .pdf or .svg")
    return path


def now(device: torch.device) -> float:
    """Return the time in seconds, once everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine() -> dict[str, object]:
    """Return the facts about the machine that a timing depends on."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def machine_line(device: torch.device) -> str:
    """Return the machine in one line, naming the device that did the work first."""
    facts = machine()
    work = facts["gpu"] if device.type == "cuda" else facts["processor"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "lightning", "python"))
    return f"{work}, {facts['threads']} CPU threads; {versions}"


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as plain text: text to the left, numbers to the right.

    In a table wider than the terminal (100 columns where there is none), text is wrapped between
    words. Numbers and words are never cut: rather than that, the table stays wider.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, name in enumerate(columns):
        words = [word for cell in [name, *(row[index] for row in cells)] for word in _words(cell)]
        is_text = all(isinstance(row[index], str) for row in rows)
        grid.add_column(
            Text(name),
            justify="left" if is_text else "right",
            min_width=max(map(cell_len, words), default=0),
        )
    grid.add_row(*(Rule(characters="-", style="") for _ in columns))
    for row in cells:
        grid.add_row(*map(Text, row))  # Text, because rich would read markup in a str
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as output:
        console.print(grid, crop=False)
    return "\n".join(line.rstrip() for line in output.get().splitlines())


def _words(cell: str) -> list[str]:
    """Return the parts of a cell that stay in one line; 1.5 ± 0.2 is one of them."""
    return cell.split() if any(map(str.isalpha, cell)) else [cell]


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"

"""What every timing shares: the clock, the machine's description, tables, plots, the JSON."""

import argparse
import dataclasses
import importlib
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import torch

# Bars that differ by more than this are drawn on a logarithmic scale.
_LINEAR = 30


class Refused(Exception):
    """Something that the user can put right, in one line."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers or text in columns.

    Args:
        title: What they are.
        columns: Headings.
        rows: Cells.
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
        title: What is compared.
        unit: Of the bars' lengths.
        bars: Positive lengths by label.
    """

    title: str
    unit: str
    bars: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one command.

    Args:
        title: What was timed.
        columns: Headings of the table.
        rows: Its cells, numbers or text.
        notes: Lines below the tables.
        data: All raw numbers, for the JSON file.
        more: Further tables.
        panels: The charts of its plot.
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
            path: The file to write; its ending says in which format.

        Raises:
            Refused: Without matplotlib.
        """
        wide = min(3, len(self.panels))
        high = math.ceil(len(self.panels) / wide)
        longest = max(len(panel.bars) for panel in self.panels)
        # Not pyplot: that would look for a screen.
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


def add_command(commands: Any, name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Add a module as a subcommand; its docstring is the help.

    Args:
        commands: What ``add_subparsers`` returned.
        name: Of the subcommand.
        module: It has ``add_arguments(parser)``.
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
    """Import a module of a package that timings need and the library does not.

    Args:
        module: Its name.
        purpose: What needs it.

    Raises:
        Refused: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Refused(f"{purpose} needs {package}: pip install {package}") from error


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
    """Return what a timing depends on beside the program."""
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
    """Return aligned columns: text to the left, numbers to the right."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [all(isinstance(value, str) for value in column) for column in zip(*rows, strict=True)]
    align = [str.ljust if is_text else str.rjust for is_text in text]
    lines = [
        "  ".join(put(cell, w) for put, cell, w in zip(align, row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"

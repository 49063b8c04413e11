"""What the timings share: their subcommands, clock, machine, tables, plots and JSON files."""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lit_fanions.cli.console import Table, machine, require

# Bars whose lengths differ by more than this factor are drawn on a logarithmic scale.
_LINEAR = 30


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


def machine_line(device: torch.device) -> str:
    """Return the machine in one line, naming the device that did the work first."""
    facts = machine()
    work = facts["gpu"] if device.type == "cuda" else facts["processor"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "lightning", "python"))
    return f"{work}, {facts['threads']} CPU threads; {versions}"

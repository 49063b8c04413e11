"""Parts that commands share: their parser, refusals, tables, the machine."""

import argparse
import dataclasses
import importlib
import io
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from lit_fanions.checks import did_you_mean, whole_number
from lit_fanions.cli.messages import PROGRAM

# Options of fit without a dot: they are never taken for mistyped options of another command.
FIT_OPTIONS = {
    *("--config", "--print_config", "--seed_everything", "--trainer", "--model", "--data"),
    *("--test_after_fit", "--nonfinite_patience", "--ckpt_path", "--weights_only"),
}


class CommandParser(argparse.ArgumentParser):
    """Parser of a command beside those of Lightning: no abbreviations, mistakes in a line."""

    def __init__(self, command: str, description: str | None, usage: str | None = None) -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            usage=usage,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with status 2."""
        self.exit(2, f"error: {message} (all options: {self.prog} --help)\n")


class Refused(Exception):
    """A mistake that the user can put right, described in one line."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers or text in columns, below a title."""

    title: str
    columns: Sequence[str]  # headings
    rows: Sequence[Sequence[object]]

    def __str__(self) -> str:
        return "\n".join([self.title, "", table(self.columns, self.rows), ""])


def require(module: str, purpose: str) -> ModuleType:
    """Import a module; refuse the command or option that needs it if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Refused(f"{purpose} needs {package}: pip install {package}") from error


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are not whole numbers of at least 1; None counts as not given."""
    for name in names:
        if (count := getattr(options, name)) is not None:
            try:
                whole_number(f"--{name}", count)
            except ValueError as error:
                raise Refused(str(error)) from None


def refuse_reserved(args: Iterable[str], reserved: Mapping[str, str]) -> None:
    """Refuse options of fit that a command sets itself, with advice by option.

    Options below a reserved one are reserved too, with or without `init_args` in their name.
    """
    for arg in args:
        given = arg.partition("=")[0].removesuffix("+")
        plain = given.replace(".init_args", "")
        for option, advice in reserved.items():
            if plain == option or plain.startswith(f"{option}."):
                raise Refused(f"{given} cannot be used here: {advice}")


def refuse_mistyped(args: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """Refuse arguments that resemble options of a command, because fit could not explain them."""
    own = [option for action in parser._actions for option in action.option_strings]
    for arg in args:
        given = arg.partition("=")[0]
        known = not given.startswith("--") or "." in given or given in FIT_OPTIONS
        if not known and (hint := did_you_mean(given, own)):
            raise Refused(f"unknown option {given}{hint}")


def machine() -> dict[str, object]:
    """Return the facts about the machine that a timing depends on."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "python": platform.python_version(),
    }


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

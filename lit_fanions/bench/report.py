"""What every timing shares: the clock, the description of the machine, the table, the JSON."""

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one command.

    Args:
        title: What was timed.
        columns: Headings of the table.
        rows: Its cells, numbers or text.
        notes: Lines below the table.
        data: All raw numbers, for the JSON file.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str]
    data: dict[str, Any]

    def __str__(self) -> str:
        return "\n".join([self.title, "", table(self.columns, self.rows), "", *self.notes])

    def save(self, path: Path) -> None:
        """Write the raw numbers and the machine they were measured on as JSON."""
        contents = {"title": self.title, "machine": machine(), **self.data}
        path.write_text(json.dumps(contents, indent=2) + "\n")


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
    """Return aligned columns: the first to the left, the others to the right."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [text.rjust(w) for text, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Run items within a time budget, each in a process of its own."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[2]
OK, NO_TIME, TIMED_OUT = "ok", "no time left", "out of time"
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


@dataclasses.dataclass(frozen=True)
class Item:
    """A command to run.

    Args:
        name: Name in the table.
        command: Arguments of Python, such as ("-m", MODULE, ...).
        most: Seconds after which it is stopped.
        least: Seconds that must be left for it to start.
        background: Whether the next items start without waiting for it.
        alone: Whether it waits until all background items have ended, as timings must.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float
    background: bool = False
    alone: bool = True


@dataclasses.dataclass(frozen=True)
class Ending:
    """How an item ended.

    Args:
        name: Name of the item.
        status: OK, NO_TIME, TIMED_OUT or "exit N".
        seconds: Seconds that it ran.
    """

    name: str
    status: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Running:
    item: Item
    process: subprocess.Popen[bytes]
    start: float


def run_items(items: Iterable[Item], seconds: float, log: Path) -> Iterator[Ending]:
    """Run items in order, and yield how each ended.

    Args:
        items: The items, the most valuable first.
        seconds: Time budget for all.
        log: File that their output is appended to.
    """
    deadline = time.monotonic() + seconds
    background: list[_Running] = []
    with log.open("ab") as file:
        for item in items:
            while item.alone and background:
                yield _wait(background.pop(0), deadline)
            if deadline - time.monotonic() < item.least:
                yield Ending(item.name, NO_TIME, 0.0)
                continue
            running = _start(item, file)
            if item.background:
                background.append(running)
            else:
                yield _wait(running, deadline)
        while background:
            yield _wait(background.pop(0), deadline)


def _start(item: Item, log: BinaryIO) -> _Running:
    log.write(f"\n=== {item.name}: python {' '.join(item.command)}\n".encode())
    log.flush()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, *item.command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its own children can be stopped with it
    )
    return _Running(item, process, time.monotonic())


def _wait(running: _Running, deadline: float) -> Ending:
    """Wait until a process ends or its time is over; what it has saved by then stays."""
    process, item = running.process, running.item
    limit = min(running.start + item.most, deadline) - time.monotonic()
    try:
        code = process.wait(max(0.1, limit))
        status = OK if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                process.wait(_GRACE)
                break
            except subprocess.TimeoutExpired:
                continue
    return Ending(item.name, status, time.monotonic() - running.start)

"""Train recipes in child processes, of which none is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_fanions.cli.results import recipe_digests

# Exit statuses of a training that somebody stopped by SIGINT (Ctrl-C), SIGKILL or SIGTERM.
KILLED = (-2, 130, -9, 137, -15, 143)
POLL = 0.1  # seconds between checks of the processes
GRACE = 10.0  # seconds that a process has to end after SIGTERM


class Stopped(Exception):
    """A signal stopped the command; all its processes have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number  # the exit status that shells give


@dataclass(frozen=True)
class Run:
    """One training."""

    name: str  # of its folder, unique in the experiment
    args: tuple[str, ...]  # of fit


@dataclass(frozen=True)
class Training:
    """A run in progress."""

    run: Run
    logs: Path
    process: subprocess.Popen[bytes]
    recipes: dict[str, str]  # digests when it started, see `recipe_digests`
    start: float  # time in seconds since the epoch


def shared_threads(jobs: int) -> dict[str, str]:
    """Return the environment in which runs at a time share the cores that this process may use.

    Threads beyond the cores wait for each other. A number of threads that the user has set stays.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    # Only Linux tells which cores a process may use.
    allowed = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
    return {"OMP_NUM_THREADS": str(max(1, len(allowed(0)) // jobs))}


def start(run: Run, folder: Path, environment: Mapping[str, str]) -> Training:
    """Start a training, which ends when this process ends, however that ends.

    Its standard input is a pipe from this process; ``lit_fanions.cli.child`` exits when it breaks.
    Logs, recipe and output go to a folder of the run's name in ``folder``; ``environment`` is added
    to the variables of this process.
    """
    logs = folder / run.name
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("events.out.*"):  # from an attempt that was stopped
        old.unlink()
    recipes, now = recipe_digests(run.args), time.time()
    with (logs / "output.txt").open("w") as output:
        process = subprocess.Popen(
            _command(run, folder),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    return Training(run, logs, process, recipes, now)


def _command(run: Run, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "lit_fanions.cli.child", "fit", *run.args),
        # Replaces the logger of the recipe.
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--trainer.logger.init_args.name={run.name}",
        "--trainer.logger.init_args.version=.",
    ]


def failure(training: Training) -> str | None:
    """Return why a training that has ended failed, None if it succeeded."""
    _close_input(training.process)
    status = training.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if not status:
        return None
    output = (training.logs / "output.txt").read_text(errors="replace")
    lines = output.strip().splitlines() or ["no output"]
    # The line that names the error; a hint may follow it.
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return f"exit status {status}: {reason}"


def end(processes: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """End processes with SIGTERM, and with SIGKILL those that take too long.

    Ctrl-C in a terminal reaches them too, and they may be saving a checkpoint. A second signal in
    ``received`` (see ``signals``) kills them at once.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(received) > 1:
            for process in processes:
                process.kill()
        time.sleep(POLL)
    for process in processes:
        _close_input(process)


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of raising them.

    An exception while a process starts would lose the handle of that process.
    """
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    # Ignored signals (nohup, a job in the background) stay ignored.
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {
        number: signal.signal(number, lambda signum, frame: received.append(signum))
        for number in caught
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Train recipes in child processes, and keep the curves of those that have finished."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_fanions.cli.console import Progress, Refused, machine
from lit_fanions.cli.curves import Curves, finite_or_none, read_curves
from lit_fanions.cli.provenance import FINISHED, commit, recipe_digests

# Exit statuses of a training that somebody stopped by SIGINT (Ctrl-C), SIGKILL or SIGTERM.
KILLED = (-2, 130, -9, 137, -15, 143)
POLL = 0.1  # seconds between checks of the processes
GRACE = 10.0  # seconds that a process has to end after SIGTERM


class Stopped(Exception):
    """A signal stopped the command; all its processes have ended.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number  # the exit status that shells give


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: Name of its folder, unique in the experiment.
        args: Arguments of fit.
    """

    name: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """A run in progress.

    Args:
        run: The run.
        logs: Folder of its logs.
        process: Child process that trains.
        recipes: Digests of its recipes when it started, see ``recipe_digests``.
        start: Time when it started, in seconds since the epoch.
    """

    run: Run
    logs: Path
    process: subprocess.Popen[bytes]
    recipes: dict[str, str]
    start: float


def execute(
    runs: Iterable[Run], folder: Path, metrics: Sequence[str], jobs: int
) -> dict[str, Curves]:
    """Train the runs that have not finished yet.

    No process is left behind, whatever ends the call: SIGINT (Ctrl-C) and SIGTERM stop them too.

    Args:
        runs: The trainings.
        folder: Folder for their logs and outcomes.
        metrics: Names of the scalars that are read from TensorBoard's logs; the last value of the
            first is shown.
        jobs: Number of processes at a time; they share the processor's cores evenly.

    Returns:
        The curves of each run that succeeded; one that diverged ends with infinity.

    Raises:
        Refused: If a finished run in the folder had other arguments, recipes or scalars; if another
            command works in the folder; or if nothing succeeds and the first two runs failed for
            the same reason, such as missing data.
        Stopped: After a signal.
    """
    with _exclusive(folder):
        found = {run: _finished_curves(run, folder, metrics) for run in runs}
        curves = {run.name: curve for run, curve in found.items() if curve is not None}
        waiting = deque(run for run, curve in found.items() if curve is None)
        print(_announcement(folder, len(waiting), len(curves), jobs), flush=True)
        return _train(waiting, folder, metrics, jobs, curves)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder, whose logs would get mixed with these.

    Raises:
        Refused: If another command works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout:
        raise Refused(f"another command works in {folder}: wait, or choose another --out") from None


def _announcement(folder: Path, count: int, finished: int, jobs: int) -> str:
    """Return the line that says what is about to be trained."""
    before = f"finished before: {finished}"
    if not count:
        return f"{folder}: nothing to train; {before}"
    line = f"{folder}: {count} to train, {jobs} at a time"
    return f"{line}; {before}" if finished else line


def _train(
    waiting: deque[Run], folder: Path, metrics: Sequence[str], jobs: int, curves: dict[str, Curves]
) -> dict[str, Curves]:
    """Train all waiting runs, and add their curves to those of the finished ones."""
    progress = Progress(len(waiting))
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    running: list[Training] = []
    reasons: list[str] = []
    with signals() as received:
        try:
            while waiting or running:
                if received:
                    raise Stopped(received[0])
                if waiting and len(running) < jobs:
                    running.append(start(waiting.popleft(), folder, environment))
                    continue
                time.sleep(POLL)
                for training in [t for t in running if t.process.poll() is not None]:
                    if received:  # the signal may have ended it
                        break
                    running.remove(training)
                    if (reason := _collect(training, metrics, curves, progress)) is None:
                        continue
                    reasons.append(reason)
                    if not curves and reasons[:-1] == reasons[-1:]:
                        raise Refused(f"the first two runs failed alike: {reason}")
        finally:
            end([training.process for training in running], received)
        if received:  # while the last curves were read
            raise Stopped(received[0])
    return curves


def _collect(
    training: Training, metrics: Sequence[str], curves: dict[str, Curves], progress: Progress
) -> str | None:
    """Keep the curves of a training that has ended; return the reason if it failed."""
    name, reason = training.run.name, failure(training)
    if reason is None:
        curves[name] = _save(training, metrics)
        last = curves[name][metrics[0]][-1][1]
        print(progress.advance(name, f"{metrics[0]} {last:.4g}"), flush=True)
    else:
        print(progress.advance(name, "failed"), flush=True)
        print(f"{name}: {reason}", file=sys.stderr, flush=True)
    return reason


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


def end(processes: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """End processes with SIGTERM, and with SIGKILL those that take too long.

    Ctrl-C in a terminal reaches them too, and they may be saving a checkpoint. A second signal
    kills them at once.

    Args:
        processes: Processes to end; some may have ended already.
        received: Signals received so far, see ``signals``.
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


def _finished_curves(run: Run, folder: Path, metrics: Sequence[str]) -> Curves | None:
    """Return the curves of a run that finished in an earlier call, None if it has not finished."""
    path = folder / run.name / FINISHED
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    settings = (saved["args"], saved["recipes"], list(saved.get("curves", ())))
    if settings != (list(run.args), recipe_digests(run.args), list(metrics)):
        raise Refused(
            f"{path.parent} holds a run with other settings ({_changes(saved, run, metrics)}): "
            "choose another --out, or delete it"
        )
    return {
        metric: [(step, math.inf if value is None else value) for step, value in curve]
        for metric, curve in saved["curves"].items()
    }


def _changes(saved: Mapping[str, Any], run: Run, metrics: Sequence[str]) -> str:
    """Return the differences between a finished run and the one that is asked for."""
    options = sorted(set(_joined_options(saved["args"])) ^ set(_joined_options(run.args)))
    recipes = recipe_digests(run.args)
    files = [name for name, digest in saved["recipes"].items() if recipes.get(name) != digest]
    others = [] if list(saved.get("curves", ())) == list(metrics) else ["other scalars"]
    return ", ".join([*options, *files, *others]) or "their order"


def _joined_options(args: Iterable[str]) -> list[str]:
    """Return arguments as --OPTION=VALUE, also those given as --OPTION VALUE."""
    joined: list[str] = []
    for arg in args:
        if arg.startswith("--") or not joined or "=" in joined[-1]:
            joined.append(arg)
        else:
            joined[-1] += f"={arg}"
    return joined


def _command(run: Run, folder: Path) -> list[str]:
    """Return the command that trains a run."""
    logger = "--trainer.logger"
    options = {
        logger: "lightning.pytorch.loggers.TensorBoardLogger",  # replaces the logger of the recipe
        f"{logger}.init_args.save_dir": folder,
        f"{logger}.init_args.name": run.name,
        f"{logger}.init_args.version": ".",
    }
    place = [f"{option}={value}" for option, value in options.items()]
    return [sys.executable, "-m", "lit_fanions.cli.child", "fit", *run.args, *place]


def start(run: Run, folder: Path, environment: Mapping[str, str]) -> Training:
    """Start a training, which ends when this process ends, however that ends.

    Its standard input is a pipe from this process; ``lit_fanions.cli.child`` exits when it breaks.

    Args:
        run: The run to train.
        folder: Parent of the folder, named as the run, for its logs, recipe and output.
        environment: Environment variables to add to those of this process.
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


def failure(training: Training) -> str | None:
    """Return why a training that has ended failed, None if it succeeded."""
    _close_input(training.process)
    status = training.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    reason = _reason((training.logs / "output.txt").read_text(errors="replace"))
    return f"exit status {status}: {reason}" if status else None


def _save(training: Training, metrics: Sequence[str]) -> Curves:
    """Save the curves of a training that has succeeded, and return them."""
    run, logs = training.run, training.logs
    curves = read_curves(logs, metrics)
    contents = {
        "args": run.args,
        "recipes": training.recipes,
        "commit": commit(),
        "curves": {metric: finite_or_none(curve) for metric, curve in curves.items()},
        "seconds": time.time() - training.start,
        "machine": machine(),
    }
    partial = logs / f"{FINISHED}.partial"
    partial.write_text(json.dumps(contents, indent=2, allow_nan=False) + "\n")
    partial.replace(logs / FINISHED)
    return curves


def _reason(output: str) -> str:
    """Return the line of an output that names the error; a hint may follow it."""
    lines = output.strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])

"""Train many runs in child processes, and keep the curves of those that have finished."""

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused, machine
from lit_fanions.cli.curves import Curve, Curves, read_curves
from lit_fanions.cli.results import commit, recipe_digests
from lit_fanions.cli.runner import Run, Stopped, Training
from lit_fanions.progress import Progress

FINISHED = "result.json"  # in the folder of a training that has succeeded


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
    environment = runner.shared_threads(jobs)
    running: list[Training] = []
    reasons: list[str] = []
    with runner.signals() as received:
        try:
            while waiting or running:
                if received:
                    raise Stopped(received[0])
                if waiting and len(running) < jobs:
                    running.append(runner.start(waiting.popleft(), folder, environment))
                    continue
                time.sleep(runner.POLL)
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
            runner.end([training.process for training in running], received)
        if received:  # while the last curves were read
            raise Stopped(received[0])
    return curves


def _collect(
    training: Training, metrics: Sequence[str], curves: dict[str, Curves], progress: Progress
) -> str | None:
    """Keep the curves of a training that has ended; return the reason if it failed."""
    name, reason = training.run.name, runner.failure(training)
    if reason is None:
        curves[name] = _save(training, metrics)
        last = curves[name][metrics[0]][-1][1]
        print(progress.advance(name, f"{metrics[0]} {last:.4g}"), flush=True)
    else:
        print(progress.advance(name, "failed"), flush=True)
        print(f"{name}: {reason}", file=sys.stderr, flush=True)
    return reason


def _finished_curves(run: Run, folder: Path, metrics: Sequence[str]) -> Curves | None:
    """Return the curves of a run that finished in an earlier call, None if it has not finished."""
    path = folder / run.name / FINISHED
    if not path.is_file():
        return None
    saved = _read_result(path)
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


def _read_result(path: Path) -> dict[str, Any]:
    """Return what ``_save`` wrote about a finished run; refuse a damaged file."""
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        list(saved["args"]), dict(saved["recipes"]), dict(saved.get("curves", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{path} is damaged ({error!r}): delete it, and the same command repeats its run"
        ) from None
    return saved


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


def run_commits(folder: Path) -> list[str]:
    """Return the commits that made the finished trainings of a folder, "" for outside of git."""
    saved = [_read_result(path) for path in folder.glob(f"*/{FINISHED}")]
    return sorted({run.get("commit") or "" for run in saved})


def finite_or_none(curve: Curve) -> list[tuple[int, float | None]]:
    """Return the curve for JSON, which has no infinity: None stands for it."""
    return [(step, value if math.isfinite(value) else None) for step, value in curve]

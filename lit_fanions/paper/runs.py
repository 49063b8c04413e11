"""Train recipes in processes of their own, and remember those that are finished."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from lit_fanions.bench.report import Refused, machine

Curve = list[tuple[int, float]]  # (optimizer step, value)

FINISHED = "result.json"


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: Its folder, unique in the experiment.
        args: Arguments of fit.
    """

    name: str
    args: tuple[str, ...]


def execute(runs: Iterable[Run], folder: Path, metric: str, jobs: int) -> dict[str, Curve]:
    """Train what is not finished yet.

    Args:
        runs: The trainings.
        folder: Where their logs and outcomes are kept.
        metric: The scalar that is read from TensorBoard's logs.
        jobs: Processes at a time; they share the processor's cores evenly.

    Returns:
        The metric's curve for each run that succeeded; one that diverged ends with infinity.

    Raises:
        Refused: If a finished run in the folder had other arguments.
    """
    curves: dict[str, Curve] = {}
    missing = []
    for run in runs:
        curve = _finished(run, folder)
        if curve is None:
            missing.append(run)
        else:
            curves[run.name] = curve
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(_train, run, folder, metric, threads): run for run in missing}
        try:
            for count, future in enumerate(as_completed(started), 1):
                run = started[future]
                curve = future.result()
                outcome = "failed" if curve is None else f"{metric} {curve[-1][1]:.4f}"
                print(f"[{count}/{len(missing)}] {run.name}: {outcome}", flush=True)
                if curve is not None:
                    curves[run.name] = curve
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return curves


def _finished(run: Run, folder: Path) -> Curve | None:
    path = folder / run.name / FINISHED
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    if saved["args"] != list(run.args):
        raise Refused(
            f"{path.parent} holds a run with other settings: choose another --out, or delete it"
        )
    return [(step, math.inf if value is None else value) for step, value in saved["curve"]]


def _train(run: Run, folder: Path, metric: str, threads: int) -> Curve | None:
    logs = folder / run.name
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("events.out.*"):  # of an attempt that was stopped
        old.unlink()
    logger = "--trainer.logger.init_args"
    place = (f"{logger}.save_dir={folder}", f"{logger}.name={run.name}", f"{logger}.version=.")
    command = [sys.executable, "-m", "lit_fanions", "fit", *run.args, *place]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.time()
    with (logs / "output.txt").open("w") as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if status:
        last = (logs / "output.txt").read_text().strip().splitlines()[-1:]
        print(f"{run.name}: exit status {status}: {' '.join(last)}", file=sys.stderr, flush=True)
        return None
    curve = read_curve(logs, metric)
    outcome = {
        "args": run.args,
        "metric": metric,
        "curve": finite(curve),
        "seconds": time.time() - start,
        "machine": machine(),
    }
    partial = logs / f"{FINISHED}.partial"
    partial.write_text(json.dumps(outcome, indent=2) + "\n")
    partial.replace(logs / FINISHED)
    return curve


def read_curve(logs: Path, metric: str) -> Curve:
    """A scalar from TensorBoard's logs; what is not a number counts as infinity.

    Raises:
        Refused: If the logs do not have it.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    if metric not in events.Tags()["scalars"]:
        raise Refused(f"{logs} has no {metric}: does the recipe validate, with TensorBoardLogger?")
    scalars = [(event.step, event.value) for event in events.Scalars(metric)]
    return [(step, value if math.isfinite(value) else math.inf) for step, value in scalars]


def finite(curve: Curve) -> list[tuple[int, float | None]]:
    """The curve for JSON, which has no infinity: None stands for it."""
    return [(step, value if math.isfinite(value) else None) for step, value in curve]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return mean, 0.0
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and standard deviations of curves over the same steps."""
    steps = [step for step, _ in curves[0]]
    columns: list[Mapping[int, float]] = [dict(curve) for curve in curves]
    shared = [step for step in steps if all(step in column for column in columns)]
    spreads = [spread([column[step] for column in columns]) for step in shared]
    return shared, [mean for mean, _ in spreads], [deviation for _, deviation in spreads]

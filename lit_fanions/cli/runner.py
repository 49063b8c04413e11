"""Train recipes in processes of their own, and remember those that are finished."""

import argparse
import contextlib
import fcntl
import functools
import hashlib
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
from typing import TYPE_CHECKING, Any

from lit_fanions.callbacks.quantities import QUANTITIES
from lit_fanions.cli.console import Refused, machine
from lit_fanions.cli.errors import did_you_mean

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = list[tuple[int, float]]  # (optimizer step, value)
Curves = dict[str, Curve]  # by the name of the scalar

FINISHED = "result.json"
# Exit statuses of a training that somebody stopped by SIGINT (Ctrl-C), SIGKILL or SIGTERM.
KILLED = (-2, 130, -9, 137, -15, 143)
POLL = 0.1  # seconds between looks at the processes
GRACE = 10.0  # seconds that a process has to end by itself


class Stopped(Exception):
    """A signal stopped the command; all its processes have ended.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number  # as shells count


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: Its folder, unique in the experiment.
        args: Arguments of fit.
    """

    name: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """A run in progress.

    Args:
        run: What is trained.
        logs: Its folder.
        process: Who trains.
        recipes: See ``digests``; as they were at the start.
        start: When that was.
    """

    run: Run
    logs: Path
    process: subprocess.Popen[bytes]
    recipes: dict[str, str]
    start: float


def add_arguments(
    parser: argparse.ArgumentParser,
    recipes: Sequence[str],
    seeds: int,
    full: Sequence[str] = (),
) -> None:
    """Add the options of commands that train.

    Args:
        parser: Of the command.
        recipes: Patterns of the files that are trained if none is given.
        seeds: Their default number.
        full: Likewise with --full; an option only if there are any.
    """
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=f"recipes to train (default: {' '.join(recipes)})",
    )
    parser.add_argument(
        "--seeds", type=int, help=f"number of repetitions (default: {seeds}, with --quick 1)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    if full:
        parser.add_argument(
            "--full", action="store_true", help=f"for GPUs: {' '.join(full)}, as they are"
        )
    parser.set_defaults(recipes=(recipes, full), default_seeds=seeds)


def plan(
    options: argparse.Namespace,
    recipe: Sequence[str],
    reserved: Mapping[str, str],
    quick: Sequence[str],
) -> tuple[dict[str, Path], list[str]]:
    """Settle what ``add_arguments`` left open, and check what was given.

    Args:
        options: Of the command; ``seeds`` is set.
        recipe: The arguments of fit.
        reserved: See ``refuse``.
        quick: With --quick, the recipe that is trained if none is given, and arguments of fit that
            leave a few steps of it.

    Returns:
        Recipes by name, and all arguments of fit.

    Raises:
        Refused: If something is not possible.
    """
    refuse(recipe, reserved)
    if options.seeds is None:
        options.seeds = 1 if options.quick else options.default_seeds
    if options.seeds < 1 or options.jobs < 1:
        raise Refused("--seeds and --jobs must be at least 1")
    patterns: Sequence[str] = options.recipes["full" in options and options.full]
    few_steps: Sequence[str] = ()
    if options.quick:
        patterns, few_steps = quick[:1], quick[1:]
    paths = options.config or [p for each in patterns for p in sorted(Path().glob(each))]
    if not paths:
        raise Refused(f"{patterns[0]} is not here: start the command in a checkout of lit_fanions")
    for path in paths if options.config or recipe else ():
        check([f"--config={path}", *few_steps, *recipe])
    named = {path.stem: path for path in paths}
    if len(named) < len(paths):
        listed = ", ".join(map(str, paths))
        raise Refused(f"--config: {listed} have a file name in common: rename one, or leave it out")
    return named, [*few_steps, *recipe]


def has_claims(options: argparse.Namespace) -> bool:
    """Whether a command's numbers may speak about the paper: those of its own recipes, whole."""
    return options.config is None and not options.quick


def described(data: str, *extra: Sequence[str]) -> str:
    """What was tried, with what was given beside the recipes."""
    return ", ".join([data, *(" ".join(part) for part in extra if part)])


def check(args: Sequence[str]) -> None:
    """Refuse arguments of fit as fit would, before anything is trained.

    Raises:
        SystemExit: In fit's own words.
    """
    from lit_fanions.cli.app import Reader

    Reader(["fit", *args])


def repeated(
    variants: Mapping[str, Sequence[str]], options: argparse.Namespace, metric: str
) -> dict[str, dict[int, Curve]]:
    """Train variants with seeds 0, 1, ...

    Args:
        variants: Arguments of fit by name.
        options: Of the command, settled by ``plan``.
        metric: The scalar that is read.

    Returns:
        By variant the curves by seed, of the trainings that succeeded.

    Raises:
        Refused: If none did.
    """
    runs = {
        # All variants with one seed, then with the next: what is stopped has seen all.
        (name, seed): Run(f"{name}-seed{seed}", (*args, f"--seed_everything={seed}"))
        for seed in range(options.seeds)
        for name, args in variants.items()
    }
    curves = execute(runs.values(), options.out / "runs", [metric], options.jobs)
    if not curves:
        raise Refused(f"every run failed: see {options.out}/runs/*/output.txt")
    if len(curves) < len(runs):
        print(f"failed runs: {len(runs) - len(curves)}; see {options.out}/runs/*/output.txt")
    found: dict[str, dict[int, Curve]] = {name: {} for name in variants}
    for (name, seed), run in runs.items():
        if run.name in curves:
            found[name][seed] = curves[run.name][metric]
    return found


def refuse(args: Iterable[str], reserved: Mapping[str, str]) -> None:
    """Refuse options of fit that a command sets itself.

    Args:
        args: What the user gave.
        reserved: What to do instead, by option; what lies below an option is reserved with it, and
            `init_args` may be left out.

    Raises:
        Refused: At the first that is reserved.
    """
    for arg in args:
        given = arg.partition("=")[0].removesuffix("+")
        plain = given.replace(".init_args", "")
        for option, instead in reserved.items():
            if plain == option or plain.startswith(f"{option}."):
                raise Refused(f"{given} is set for every run by this command: {instead}")


def refuse_mistyped(args: Iterable[str], parser: argparse.ArgumentParser) -> None:
    """Refuse what was meant for a command and not for fit, which would not know what was meant.

    Args:
        args: What the command does not know.
        parser: The command's.

    Raises:
        Refused: At the first that looks like one of the command's options.
    """
    own = [option for action in parser._actions for option in action.option_strings]
    for arg in args:
        given = arg.partition("=")[0]
        if given.startswith("--") and "." not in given and (close := did_you_mean(given, own)):
            raise Refused(f"unknown option {given}: did you mean {close}?")


def execute(
    runs: Iterable[Run], folder: Path, metrics: Sequence[str], jobs: int
) -> dict[str, Curves]:
    """Train what is not finished yet.

    No process is left behind, whatever ends the call: SIGINT (Ctrl-C) and SIGTERM stop them too.

    Args:
        runs: The trainings.
        folder: Where their logs and outcomes are kept.
        metrics: The scalars that are read from TensorBoard's logs; the last value of the first is
            shown.
        jobs: Processes at a time; they share the processor's cores evenly.

    Returns:
        The curves of each run that succeeded; one that diverged ends with infinity.

    Raises:
        Refused: If a finished run in the folder had other arguments or recipes, or read others; or
            if nothing succeeds and the first two failed alike, as for want of data.
        Stopped: By a signal.
    """
    with _alone(folder):
        return _execute(runs, folder, metrics, jobs)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder, in which they would mix their logs with these.

    Raises:
        Refused: If another one is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                f"another command works in {folder}: wait, or choose another --out"
            ) from None
        yield


def _execute(
    runs: Iterable[Run], folder: Path, metrics: Sequence[str], jobs: int
) -> dict[str, Curves]:
    found = {run: _finished(run, folder, metrics) for run in runs}
    curves = {run.name: curve for run, curve in found.items() if curve is not None}
    waiting = deque(run for run, curve in found.items() if curve is None)
    total, count = len(waiting), 0
    reasons: list[str] = []  # of failures, as long as nothing succeeds
    if curves:
        print(f"finished before: {len(curves)}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[Training] = []
    with signals() as received:
        try:
            while waiting or running:
                if received:
                    raise Stopped(received[0])
                if waiting and len(running) < jobs:
                    running.append(
                        start(waiting.popleft(), folder, {"OMP_NUM_THREADS": str(threads)})
                    )
                    continue
                time.sleep(POLL)
                for training in [t for t in running if t.process.poll() is not None]:
                    if received:  # it may have ended because of the signal
                        break
                    running.remove(training)
                    count += 1
                    reason = failure(training)
                    outcome = None if reason else _outcome(training, metrics)
                    first = metrics[0]
                    text = "failed" if outcome is None else f"{first} {outcome[first][-1][1]:.4g}"
                    print(f"[{count}/{total}] {training.run.name}: {text}", flush=True)
                    if outcome is not None:
                        curves[training.run.name] = outcome
                        continue
                    print(f"{training.run.name}: {reason}", file=sys.stderr, flush=True)
                    reasons.append(str(reason))
                    if not curves and reasons[:-1] == reasons[-1:]:
                        raise Refused(f"the first two runs failed alike: {reason}")
        finally:
            end([training.process for training in running], received)
        if received:  # during the last outcome
            raise Stopped(received[0])
    return curves


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM: raised while a process starts, they would lose its handle."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    # What was ignored (nohup, a job in the background) stays ignored.
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {
        number: signal.signal(number, lambda signum, frame: received.append(signum))
        for number in heard
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end(processes: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """End processes: ask them, and kill those that take too long.

    Ctrl-C in a terminal has reached them already; they may be saving a checkpoint. A second one
    ends the patience.

    Args:
        processes: What is to end; those that have ended are left alone.
        received: The signals so far, see ``signals``.
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
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close what a process that has ended listened to."""
    if process.stdin is not None:
        process.stdin.close()


def _finished(run: Run, folder: Path, metrics: Sequence[str]) -> Curves | None:
    path = folder / run.name / FINISHED
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    settings = (saved["args"], saved["recipes"], list(saved.get("curves", ())))
    if settings != (list(run.args), digests(run.args), list(metrics)):
        changed = _changed(saved, run, metrics)
        raise Refused(
            f"{path.parent} holds a run with other settings ({changed}): choose another --out, or "
            "delete it"
        )
    return {
        metric: [(step, math.inf if value is None else value) for step, value in curve]
        for metric, curve in saved["curves"].items()
    }


def _changed(saved: Mapping[str, Any], run: Run, metrics: Sequence[str]) -> str:
    """What tells a finished run from the one that is wanted."""
    differing = sorted(set(_options(saved["args"])) ^ set(_options(run.args)))
    recipes = digests(run.args)
    files = [name for name, digest in saved["recipes"].items() if recipes.get(name) != digest]
    others = [] if list(saved.get("curves", ())) == list(metrics) else ["other scalars"]
    return ", ".join([*differing, *files, *others]) or "their order"


def _options(args: Iterable[str]) -> list[str]:
    """Arguments with values that stand apart joined to their options."""
    joined: list[str] = []
    for arg in args:
        if arg.startswith("--") or not joined or "=" in joined[-1]:
            joined.append(arg)
        else:
            joined[-1] += f"={arg}"
    return joined


def digests(args: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each recipe that arguments name."""
    values = (arg.partition("=")[2] if arg.startswith("--") else arg for arg in args)
    return {
        value: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for value in values
        if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value)
    }


def commits(folder: Path) -> list[str]:
    """The commits that made the finished runs of a folder, "" for outside of git."""
    saved = [json.loads(path.read_text()) for path in folder.glob(f"*/{FINISHED}")]
    return sorted({run.get("commit") or "" for run in saved})


@functools.cache
def commit() -> str | None:
    """Return this program's git commit, "-dirty" if files were changed; None outside of git."""
    git = functools.partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed package may lie in the folder of a repository that is not its own.
        git([*here, "ls-files", "--error-unmatch", Path(__file__).name])
        return git([*here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _command(run: Run, folder: Path) -> list[str]:
    logger = "--trainer.logger"
    options = {
        logger: "lightning.pytorch.loggers.TensorBoardLogger",  # whatever the recipe has
        f"{logger}.init_args.save_dir": folder,
        f"{logger}.init_args.name": run.name,
        f"{logger}.init_args.version": ".",
    }
    place = [f"{option}={value}" for option, value in options.items()]
    return [sys.executable, "-m", "lit_fanions.cli.child", "fit", *run.args, *place]


def start(run: Run, folder: Path, environment: Mapping[str, str]) -> Training:
    """Start a training.

    It ends with this process, however that ends: its standard input is a pipe that breaks then.

    Args:
        run: What to train.
        folder: The run's logs, recipe and output are kept in the folder of its name there.
        environment: Variables beside those of this process.
    """
    logs = folder / run.name
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("events.out.*"):  # of an attempt that was stopped
        old.unlink()
    recipes, now = digests(run.args), time.time()
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
    """Why a training that has ended failed; None if it did not."""
    _close(training.process)
    status = training.process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    reason = _reason((training.logs / "output.txt").read_text(errors="replace"))
    return f"exit status {status}: {reason}" if status else None


def _outcome(training: Training, metrics: Sequence[str]) -> Curves:
    """Save and return the curves of a training that has succeeded."""
    run, logs = training.run, training.logs
    curves = read_curves(logs, metrics)
    outcome = {
        "args": run.args,
        "recipes": training.recipes,
        "commit": commit(),
        "curves": {metric: finite(curve) for metric, curve in curves.items()},
        "seconds": time.time() - training.start,
        "machine": machine(),
    }
    partial = logs / f"{FINISHED}.partial"
    partial.write_text(json.dumps(outcome, indent=2, allow_nan=False) + "\n")
    partial.replace(logs / FINISHED)
    return curves


def _reason(output: str) -> str:
    """The line that says why a training failed: its error, which a hint may follow."""
    lines = output.strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def events(logs: Path) -> "EventAccumulator":
    """TensorBoard's reader of a folder; each ``Reload`` reads what is new there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(logs), size_guidance={"scalars": 0})


def curve(reader: "EventAccumulator", metric: str) -> Curve:
    """A scalar as it is logged so far; what is not a number counts as infinity.

    Args:
        reader: See ``events``.
        metric: The scalar's name; one that is not logged has no values.
    """
    if metric not in reader.Reload().Tags()["scalars"]:
        return []
    scalars = [(event.step, event.value) for event in reader.Scalars(metric)]
    return [(step, value if math.isfinite(value) else math.inf) for step, value in scalars]


def read_curves(logs: Path, metrics: Sequence[str]) -> Curves:
    """Scalars of a training that has ended, see ``curve``.

    Raises:
        Refused: If the logs do not have one of them.
    """
    reader = events(logs)
    curves = {metric: curve(reader, metric) for metric in metrics}
    for metric, values in curves.items():
        if not values:
            raise Refused(f"{logs} has no {metric}: {_instead(metric, reader.Tags()['scalars'])}")
    return curves


def _instead(metric: str, known: Sequence[str]) -> str:
    """What may have been meant by a scalar that is not logged."""
    if close := did_you_mean(metric, known):
        return f"did you mean {close}?"
    plain = sorted(tag for tag in known if tag.partition("/")[0] not in QUANTITIES)
    return f"logged are {', '.join(plain)}" if plain else "nothing is logged"


def finite(curve: Curve) -> list[tuple[int, float | None]]:
    """The curve for JSON, which has no infinity: None stands for it."""
    return [(step, value if math.isfinite(value) else None) for step, value in curve]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the sample.

    The deviation is 0 for a single value, and where the mean is not finite.
    """
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return mean, 0.0
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and standard deviations of curves.

    Only the steps that all curves have: a mean over others would jump where one curve ends.
    """
    steps = [step for step, _ in curves[0]]
    columns: list[Mapping[int, float]] = [dict(curve) for curve in curves]
    shared = [step for step in steps if all(step in column for column in columns)]
    spreads = [spread([column[step] for column in columns]) for step in shared]
    return shared, [mean for mean, _ in spreads], [deviation for _, deviation in spreads]

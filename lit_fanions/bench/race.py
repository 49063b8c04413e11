"""Competitors that take turns, so that the noise of a shared machine hits all of them alike."""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from lit_fanions.bench import report

T = TypeVar("T")
# What a competitor does in one turn, given the turn's number, which is also its random seed.
Turn = Callable[[int], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all races have."""
    parser.add_argument(
        "--repeats",
        type=whole,
        default=5,
        metavar="N",
        help="turns of every competitor after one to warm up; the median counts (default: 5)",
    )
    parser.add_argument(
        "--device", type=device, default="auto", metavar="auto|cpu|cuda", help="where to compute"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument(
        "--plot", type=report.plot_file, metavar="FILE", help="draw the medians (png, pdf, svg)"
    )


def whole(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """Return a number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def device(text: str) -> torch.device:
    """Return the device of a name, auto being the GPU where there is one, for argparse."""
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU for 'cuda'")
    return torch.device("cuda" if text != "cpu" and torch.cuda.is_available() else "cpu")


def conditions(
    options: argparse.Namespace, products: Mapping[str, str], *packages: str
) -> dict[str, Any]:
    """Return what the timings of a race depend on beside the machine.

    Args:
        options: Those of ``add_arguments``.
        products: The dtypes that matrices are multiplied in, by what does.
        *packages: Timed packages beside torch, which must be installed.
    """
    return {
        "device": str(options.device),
        "dtype": "float32",
        "products": dict(products),
        "repeats": options.repeats,
        "quick": options.quick,
        "versions": {name: report.require(name, "this race").__version__ for name in packages},
    }


def notes(options: argparse.Namespace, products: Mapping[str, str], *packages: str) -> list[str]:
    """Return the same and the machine as the lines below a table."""
    facts = conditions(options, products, *packages)
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    multiplied = ", ".join(f"in {dtype} by {name}" for name, dtype in products.items())
    return [
        f"{facts['dtype']} matrices, multiplied {multiplied}",
        f"in turns, median of {facts['repeats']}",
        ", ".join([report.machine_line(options.device), *versions]),
    ]


def timed(turn: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds that a call takes, and its result.

    Args:
        turn: The call.
        device: Where it computes; a GPU's own clock is taken there.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        result = turn()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = turn()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3, result


def take_turns(
    competitors: Mapping[str, Turn],
    *,
    repeats: int,
    device: torch.device,
    before: Callable[[int], object] | None = None,
    watch: Callable[[str, Any], object] | None = None,
) -> dict[str, list[float]]:
    """Time every competitor once in every round: A B C, C A B, ….

    The order is drawn anew in each round (and the same in every run): who comes after a small
    competitor finds the caches warmer.

    Args:
        competitors: What each does, by its name.
        repeats: Rounds after the warm-up.
        device: Where they compute.
        before: Called with the number of each round, outside the clock.
        watch: Called with each name and result, outside the clock.

    Returns:
        The seconds of every round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in (0, *range(repeats)):
        if before is not None:
            before(turn)
        for name in random.Random(turn).sample(list(competitors), len(competitors)):
            taken, result = timed(lambda: competitors[name](turn), device)  # noqa: B023
            seconds[name].append(taken)
            if watch is not None:
                watch(name, result)
    return {name: taken[1:] for name, taken in seconds.items()}


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median seconds by name."""
    return {name: statistics.median(taken) for name, taken in seconds.items()}


class Level(NamedTuple):
    """How hard a solver tries.

    Attributes:
        setting: In words.
        solve: The solver so set, from a random seed.
    """

    setting: str
    solve: Turn


class Trial(NamedTuple):
    """How far a level gets.

    Attributes:
        level: The level.
        error: The largest error over the seeds.
        seconds: A typical run.
        reached: Whether no error is above the goal.
        seeds: How many seeds it was tried on: all below this.
    """

    level: Level
    error: float
    seconds: float
    reached: bool
    seeds: int

    def turn(self, turn: int) -> Any:
        """Solve in a race, from the seeds of the trial alone: only they are known to suffice."""
        return self.level.solve(turn % self.seeds)


def cheapest(
    levels: Sequence[Level],
    error: Callable[[Any], float],
    *,
    goal: float,
    seeds: int,
    budget: float,
    device: torch.device,
) -> Trial:
    """Try levels in their order until one reaches the goal.

    Args:
        levels: From the cheapest up.
        error: Of a result.
        goal: Largest error allowed.
        seeds: Every one of the seeds below this must reach the goal.
        budget: No further seed or level is begun that would go beyond these seconds.
        device: Where they compute.

    Returns:
        The first that reaches the goal; else the one of the smallest error.
    """
    trials: list[Trial] = []
    spent = 0.0
    for level in levels:
        errors: list[float] = []
        taken: list[float] = []
        for seed in range(seeds):
            seconds, result = timed(lambda: level.solve(seed), device)  # noqa: B023
            taken.append(seconds)
            errors.append(error(result))
            spent += seconds
            if errors[-1] > goal or spent + seconds > budget:
                break
        reached = all(e <= goal for e in errors)
        typical = statistics.median(taken)
        trials.append(Trial(level, max(errors), typical, reached, len(errors)))
        if reached or spent + taken[-1] > budget:
            break
    return trials[-1] if trials[-1].reached else min(trials, key=lambda trial: trial.error)

"""Competitors that take turns, so that the noise of a shared machine hits all of them alike."""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from lit_fanions.cli import console

T = TypeVar("T")
# What a competitor does in one turn, given the turn's number, which is also its random seed.
Turn = Callable[[int], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all races have."""
    add_turns(parser)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument(
        "--plot", type=console.plot_file, metavar="FILE", help="draw the medians (png, pdf, svg)"
    )


def add_turns(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
    """Add the options that say how often and where competitors compute.

    Args:
        parser: Of the command.
        repeats: Turns by default.
    """
    parser.add_argument(
        "--repeats",
        type=whole,
        default=repeats,
        metavar="N",
        help="turns of every competitor after one to warm up; the median counts "
        f"(default: {repeats})",
    )
    parser.add_argument(
        "--device", type=device, default="auto", metavar="auto|cpu|cuda", help="where to compute"
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
        "versions": {name: console.require(name, "this race").__version__ for name in packages},
    }


def notes(options: argparse.Namespace, products: Mapping[str, str], *packages: str) -> list[str]:
    """Return the same and the machine as the lines below a table."""
    facts = conditions(options, products, *packages)
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    multiplied = ", ".join(f"in {dtype} by {name}" for name, dtype in products.items())
    return [
        f"{facts['dtype']} matrices, multiplied {multiplied}",
        f"in turns, median of {facts['repeats']}",
        ", ".join([console.machine_line(options.device), *versions]),
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
        cost: Its time beside that of the solver's other levels, as far as it is known.
    """

    setting: str
    solve: Turn
    cost: float = 1.0


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
    ordered: bool = False,
    watch: Callable[[Level, int, float, Any], object] | None = None,
) -> Trial:
    """Try levels until one reaches the goal.

    Args:
        levels: From the cheapest up.
        error: Of a result.
        goal: Largest error allowed.
        seeds: Every one of the seeds below this must reach the goal.
        budget: Nothing is begun that is expected to end beyond these seconds, but the first.
        device: Where they compute.
        ordered: Whether more work means a smaller error, chance aside. Then the first level to hold
            on one seed is looked for by bisection, and only from there level by level.
        watch: Called with each level, seed, seconds and result.

    Returns:
        The first that reaches the goal; else the one of the smallest error.
    """
    taken: dict[int, list[float]] = {}  # by the level's place, a number a seed
    errors: dict[int, list[float]] = {}
    spent = 0.0

    def holds(place: int, wanted: int) -> bool | None:
        """Whether a level reaches the goal on the seeds that the budget allows; None if on none."""
        nonlocal spent
        level = levels[place]
        for seed in range(len(taken.get(place, [])), wanted):
            if any(e > goal for e in errors.get(place, [])):
                break
            if taken:
                last = place if place in taken else next(reversed(taken))
                expected = taken[last][-1] * level.cost / levels[last].cost
                if spent + expected > budget:
                    break
            seconds, result = timed(lambda: level.solve(seed), device)  # noqa: B023
            spent += seconds
            taken.setdefault(place, []).append(seconds)
            errors.setdefault(place, []).append(error(result))
            if watch is not None:
                watch(level, seed, seconds, result)
        return all(e <= goal for e in errors[place]) if place in errors else None

    start = _first(levels, lambda place: holds(place, 1)) if ordered else 0
    for place in range(start, len(levels)):
        if holds(place, seeds) is not False:
            break
    reached = [place for place in taken if all(e <= goal for e in errors[place])]
    best = min(reached) if reached else min(taken, key=lambda place: max(errors[place]))
    typical = statistics.median(taken[best])
    return Trial(levels[best], max(errors[best]), typical, bool(reached), len(taken[best]))


def _first(levels: Sequence[Level], holds: Callable[[int], bool | None]) -> int:
    """The place of the first level that holds, or that the budget does not allow.

    All beyond it are taken to be the same; without one it is their number. Where costs are known,
    the search comes from below: one far up may take for ever.
    """
    low, high = -1, len(levels)
    step = 1 if levels[-1].cost > levels[0].cost else len(levels)
    while high - low > 1:
        middle = min(low + step, (low + high) // 2)
        step *= 2
        if holds(middle) is False:
            low = middle
        else:
            high = middle
    return high

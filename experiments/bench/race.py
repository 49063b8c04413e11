"""Race competitors in turns, so that the noise of a shared machine hits all of them alike."""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from experiments.bench import report
from lit_fanions.cli import console
from lit_fanions.progress import Meter

T = TypeVar("T")
# One turn of a competitor; its argument is the number of the turn, which is also the random seed.
Turn = Callable[[int], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all races have."""
    add_turns(parser)
    parser.add_argument(
        "--longest",
        type=positive,
        default=math.inf,
        metavar="SECONDS",
        help="run a competitor only once if its first turn takes longer (default: no limit)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument(
        "--plot", type=report.plot_file, metavar="FILE", help="draw the medians (png, pdf, svg)"
    )


def add_turns(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
    """Add the options for the number of turns and the device.

    Args:
        parser: Parser of the command.
        repeats: Default of --repeats.
    """
    parser.add_argument(
        "--repeats",
        type=whole,
        default=repeats,
        metavar="N",
        help="turns of every competitor after a warm-up; their median is shown "
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
    """Return the device of a name, for argparse; auto is the GPU if there is one."""
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU for 'cuda'")
    return torch.device("cuda" if text != "cpu" and torch.cuda.is_available() else "cpu")


def conditions(
    options: argparse.Namespace, products: Mapping[str, str], *packages: str
) -> dict[str, Any]:
    """Return what the timings of a race depend on beside the machine, for its JSON file.

    Args:
        options: Options of ``add_turns``, and ``quick``.
        products: For each kind of competitor, the dtype in which it multiplies matrices.
        *packages: Timed packages beside torch.

    Raises:
        Refused: If a package is not installed.
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
    """Return ``conditions`` and the machine in words, as lines below a table."""
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
        turn: The function to call.
        device: Device of the computation; on a GPU its own events are the clock.
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
    longest: float = math.inf,
    before: Callable[[int], object] | None = None,
    watch: Callable[[str, Any], object] | None = None,
) -> dict[str, list[float]]:
    """Time every competitor once in every round: A B C, C A B, ….

    Each round has a random order, the same in every run of the program, because a competitor that
    follows one with little data finds warmer caches.

    Args:
        competitors: Turns by the names of the competitors.
        repeats: Number of rounds after the warm-up.
        device: Device of the computation.
        longest: Seconds; a competitor whose warm-up takes longer is not run again, and keeps the
            seconds of its warm-up.
        before: Called with the number of each round, untimed.
        watch: Called with each name and result, untimed.

    Returns:
        Seconds of every round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    with Meter(f"racing {len(competitors)} in turns", (1 + repeats) * len(competitors)) as meter:
        for turn in (0, *range(repeats)):
            if before is not None:
                before(turn)
            for name in random.Random(turn).sample(list(competitors), len(competitors)):
                meter.advance()
                if seconds[name] and seconds[name][0] > longest:
                    continue
                taken, result = timed(lambda: competitors[name](turn), device)  # noqa: B023
                seconds[name].append(taken)
                if watch is not None:
                    watch(name, result)
    return {name: taken[1:] or taken for name, taken in seconds.items()}


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each competitor's seconds."""
    return {name: statistics.median(taken) for name, taken in seconds.items()}


class Level(NamedTuple):
    """A setting of a solver.

    Attributes:
        setting: Description for the table.
        solve: The solver with this setting, a function of the random seed.
        cost: Expected time relative to the solver's other levels; 1 for all if unknown.
    """

    setting: str
    solve: Turn
    cost: float = 1.0


class Trial(NamedTuple):
    """The outcome of trying a level.

    Attributes:
        level: The level.
        error: Largest error over the seeds.
        seconds: Median time of a run.
        reached: Whether all errors are at most the goal.
        seeds: Number of seeds that it was tried on, from 0 up.
    """

    level: Level
    error: float
    seconds: float
    reached: bool
    seeds: int

    def turn(self, turn: int) -> Any:
        """Solve from a seed of the trial; on other seeds the level might miss the goal."""
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
    """Try levels until one reaches the goal on all seeds.

    Args:
        levels: Levels, from the cheapest up.
        error: Function that returns the error of a result.
        goal: Largest error allowed.
        seeds: Number of seeds on which a level must reach the goal.
        budget: Seconds; a trial starts only if it should end within them. The first always runs.
        device: Device of the computation.
        ordered: Whether the error falls with the level, up to chance. Then bisection finds the
            first level that reaches the goal on one seed, and only those from there up are tried
            on all seeds.
        watch: Called with each level, seed, seconds and result.

    Returns:
        The trial of the first level that reaches the goal; else that of the smallest error.
    """
    taken: dict[int, list[float]] = {}  # seconds of each seed, by the place of the level
    errors: dict[int, list[float]] = {}
    meter = Meter("trying settings within a budget", budget)

    def holds(place: int, wanted: int) -> bool | None:
        """Try a level; return whether it reaches the goal, or None if no seed fits the budget."""
        level = levels[place]
        for seed in range(len(taken.get(place, [])), wanted):
            if any(e > goal for e in errors.get(place, [])):
                break
            if taken:
                last = place if place in taken else next(reversed(taken))
                expected = taken[last][-1] * level.cost / levels[last].cost
                if meter.done + expected > budget:
                    break
            seconds, result = timed(lambda: level.solve(seed), device)  # noqa: B023
            meter.advance(seconds)
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
    """Return the place of the first level that holds or is over the budget; len(levels) if none.

    Levels above one that holds are assumed to hold. If costs are known, the search starts from the
    cheapest level, because one in the middle could take far more than the budget.
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

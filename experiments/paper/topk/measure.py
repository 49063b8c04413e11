"""Measurements beyond the race: errors at equal time, and times of directions by size."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from experiments.bench import race
from experiments.bench import topk as bench
from lit_fanions import lmo
from lit_fanions.lmo import Triplets

RSVD = (bench.PCA, bench.RANDOMIZED)
SOLVERS = (bench.LANCZOS, bench.CUPY, bench.ARPACK, *RSVD, bench.POWER)
NEWTON_SCHULZ = "Newton-Schulz 5"  # Muon's: five steps with Keller Jordan's coefficients
SIZES, QUICK_SIZES = (256, 512, 1024, 2048, 5000), (32, 64)
ERRORS = {"error": bench.rank_k_error, "sigma_error": bench.sigma_error}
Entry = Mapping[str, Any]
Range = tuple[float, float]  # least and largest


def errors_at_equal_time(
    case: bench.Case,
    exact: Triplets,
    k: int,
    entries: Sequence[Entry],
    options: argparse.Namespace,
) -> dict[str, Any] | None:
    """Compare the errors of Lanczos with the best of RSVD in no more time.

    The time is what Lanczos takes to reach the error. For each kind of error RSVD has the setting
    that had the smallest in the search. Errors are measured with new seeds, because the search has
    chosen the settings by its own.

    Args:
        case: The matrix.
        exact: Its exact singular triplets.
        k: Rank of the direction.
        entries: Results of the race.
        options: Options of the command.

    Returns:
        The ranges of both errors for both solvers; None if nothing can be compared.
    """
    of_rank = [entry for entry in entries if entry["k"] == k]
    (lanczos,) = (entry for entry in of_rank if entry["solver"] == bench.LANCZOS)
    limit = max(t["seconds"] for t in lanczos["tried"] if t["setting"] == lanczos["setting"])
    in_time = [
        (tried, entry["solver"])
        for entry in of_rank
        if entry["solver"] in RSVD
        for tried in entry["tried"]
        if tried["seconds"] <= limit
    ]
    if not (lanczos["reached"] and in_time):
        return None
    measured: dict[tuple[str, str], dict[str, Range]] = {}

    def errors(solver: str, setting: str) -> dict[str, Range]:
        if (solver, setting) not in measured:
            level = _level(case, k, solver, setting)
            found = [level.solve(seed) for seed in range(options.seeds, 2 * options.seeds)]
            values = {name: [error(x, exact, k) for x in found] for name, error in ERRORS.items()}
            measured[solver, setting] = {n: (min(v), max(v)) for n, v in values.items()}
        return measured[solver, setting]

    best = {name: min(in_time, key=lambda pair: pair[0][name]) for name in ERRORS}
    return {
        "k": k,
        "seconds": limit,
        "n": options.seeds,
        "lanczos": errors(bench.LANCZOS, lanczos["setting"]),
        "rsvd": {n: errors(solver, tried["setting"])[n] for n, (tried, solver) in best.items()},
    }


def time_directions(
    case: bench.Case, entries: Sequence[Entry], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time rank-k and full-rank directions of leading blocks of the matrix, by size.

    At each size Lanczos has its cheapest setting that reaches the error.

    Args:
        case: The matrix.
        entries: Results of the race.
        options: Options of the command.
    """
    full = len(case.matrix)
    known = {e["k"]: e["setting"] for e in entries if e["solver"] == bench.LANCZOS and e["reached"]}
    found = []
    for size in (*(s for s in (QUICK_SIZES if options.quick else SIZES) if s < full), full):
        block = dataclasses.replace(case, matrix=case.matrix[:size, :size].contiguous())
        ranks = [k for k in known if k < size]
        settings = known if size == full else _cheapest_settings(block, ranks, options)
        turns = {rank_name(k): _lanczos_turn(block, k, settings[k]) for k in ranks if k in settings}
        turns[NEWTON_SCHULZ] = _newton_schulz_turn(block.matrix)
        seconds = race.take_turns(turns, repeats=options.repeats, device=options.device)
        medians = race.medians(seconds)
        found += [
            {
                "size": size,
                "direction": name,
                "seconds": taken,
                "median_seconds": medians[name],
                "ratio": medians[name] / medians[NEWTON_SCHULZ],
            }
            for name, taken in seconds.items()
        ]
    return found


def rank_name(k: int) -> str:
    """Return the name of a rank-k direction in the results."""
    return f"rank {k}"


def _cheapest_settings(
    case: bench.Case, ranks: Sequence[int], options: argparse.Namespace
) -> dict[int, str]:
    """Return the cheapest settings of Lanczos that reach the error, by rank."""
    exact, found = bench.exact(case.matrix, max(ranks, default=1)), {}
    for k in ranks:
        trial = race.cheapest(
            bench.solvers(case, k)[bench.LANCZOS].levels,
            lambda triplets, k=k: bench.rank_k_error(triplets, exact, k),  # type: ignore[misc]
            goal=options.error,
            seeds=options.seeds,
            budget=options.budget,
            device=options.device,
            ordered=True,
        )
        if trial.reached:
            found[k] = trial.level.setting
    return found


def _lanczos_turn(case: bench.Case, k: int, setting: str) -> race.Turn:
    """Return a turn of Lanczos, with the product that makes a direction of its triplets."""
    level = _level(case, k, bench.LANCZOS, setting)

    def turn(seed: int) -> Tensor:
        found = level.solve(seed)
        return found.U @ found.Vh

    return turn


def _newton_schulz_turn(m: Tensor) -> race.Turn:
    return lambda turn: lmo.polar(m, method="jordan", steps=5)


def _level(case: bench.Case, k: int, solver: str, setting: str) -> race.Level:
    """Return the setting of a solver that has a name."""
    (level,) = (x for x in bench.solvers(case, k)[solver].levels if x.setting == setting)
    return level

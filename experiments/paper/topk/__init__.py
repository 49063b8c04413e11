"""Rank-k directions of a large matrix: Lanczos, randomised SVD, power iterations (Table 2).

A 5000x5000 Gaussian matrix, k = 1, 10 and 100: every solver gets its cheapest setting whose error
of the rank-k direction, |U_k V_k^T - exact|_F / sqrt(k), is at most .01, and these settings race.
The paper's figures, measured on its GPU, stand beside, with ratios. The outcome also compares the
errors of singular values and of the matrix at equal time, and finds the size from which on Lanczos
is faster than Newton-Schulz.

  python -m experiments.paper topk
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from experiments.bench import polar, race
from experiments.bench import topk as bench
from experiments.paper.outcome import Outcome
from experiments.paper.topk import claims, figure, measure
from experiments.paper.topk.measure import NEWTON_SCHULZ, Entry
from lit_fanions.cli.console import Table

TIME = "eight minutes; quick: a few seconds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    bench.add_search(parser, budget=40.0, seeds=3)
    race.add_turns(parser, repeats=3)


def run(options: argparse.Namespace) -> int:
    """Race, tabulate and plot.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.
    """
    (case,) = bench.cases(options, ["gaussian"])
    exact = bench.exact(case.matrix, max(case.ranks))
    entries = bench.race_case(case, exact, options, measure.SOLVERS)
    equal = [
        found
        for k in case.ranks
        if (found := measure.errors_at_equal_time(case, exact, k, entries, options))
    ]
    directions = measure.time_directions(case, entries, options)
    outcome = _outcome(case, entries, equal, directions, options)
    print(outcome)
    outcome.save(options.out, "topk")
    return 0


def _outcome(
    case: bench.Case,
    entries: Sequence[Entry],
    equal: Sequence[Entry],
    directions: Sequence[Entry],
    options: argparse.Namespace,
) -> Outcome:
    data = f"a Gaussian {polar.shape_text(case.matrix.shape)} matrix"
    return Outcome(
        tables=[
            bench.table(case, entries, options.error),
            _equal_time_table(equal),
            _size_table(directions),
        ],
        columns=["k", "solver", "setting", "seed", "seconds", "error", "sigma_error"],
        rows=[[e["k"], e["solver"], *t.values()] for e in entries for t in e["tried"]],
        settings={
            **_conditions(entries, options),
            "error": options.error,
            "budget": options.budget,
            "seeds": list(range(options.seeds)),
            "solvers": [{k: v for k, v in e.items() if k != "tried"} for e in entries],
            "at equal time": equal,
            "directions": directions,
        },
        draw=lambda canvas: figure.draw(canvas, entries, directions, options.error),
        size=(5 * (len(case.ranks) + 1), 4.5),
        claims=() if options.quick else claims.judge_all(entries, equal, directions, data),
        notes=[
            "error: of the rank-k direction, |U V^T - exact|_F / sqrt(k), the worst of all runs",
            f"not reached: given up after {options.budget:g} s",
            "paper s: its SVDS is CuPy's thick-restart Lanczos on a GPU",
        ],
        arguments=options.arguments,
    )


def _conditions(entries: Sequence[Entry], options: argparse.Namespace) -> dict[str, object]:
    """Return the conditions of the timings, for the JSON file."""
    packages = {bench.CUPY: ("cupy",), bench.ARPACK: ("scipy", "numpy")}
    used = [package for e in entries for package in packages.get(e["solver"], ())]
    products = {"the solvers of rank k": "float32", **polar.products(options.device)}
    return race.conditions(options, products, *dict.fromkeys(used))


def _equal_time_table(equal: Sequence[Entry]) -> Table:
    title = (
        "worst errors at equal time: of Lanczos, and of RSVD (torch's and ours) at the best of the "
        "settings that take no longer"
    )
    columns = ["k", "seconds", "matrix: Lanczos", "matrix: RSVD", "sigma: Lanczos", "sigma: RSVD"]
    cells = [
        [
            e["k"],
            e["seconds"],
            *(e[solver][name][1] for name in measure.ERRORS for solver in ("lanczos", "rsvd")),
        ]
        for e in equal
    ]
    return Table(title, columns, cells)


def _size_table(directions: Sequence[Entry]) -> Table:
    return Table(
        f"time of a direction by Lanczos over that by {NEWTON_SCHULZ}",
        ["size", "direction", "ms", f"x {NEWTON_SCHULZ}"],
        [[d["size"], d["direction"], 1e3 * d["median_seconds"], d["ratio"]] for d in directions],
    )

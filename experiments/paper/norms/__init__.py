r"""Each method as steepest descent in a norm, step by step (Table 1, Lemmas 1 to 6 and 9).

Every row of Table 1, and what the article adds to it, is a norm and an algorithm of Fanion. On
random gradients in float64, steps of Fanion with exact solvers are compared with -lr times the
exact oracle of the norm, and the oracle with its definition: <m, d> is the dual norm and |d| is 1.
A vector is a matrix of one row; the last columns say what a method becomes there, and which method
for vectors it is on the diagonal of a matrix.

  python -m experiments.paper norms --seeds 10
"""

from __future__ import annotations

import argparse

from experiments.bench.race import whole
from experiments.paper.norms import claims, steps
from experiments.paper.norms.methods import ALPHA, METHODS, MOMENTUM, K, methods_table
from experiments.paper.outcome import Outcome

TIME = "half a minute; quick: a few seconds"
SHAPES, QUICK_SHAPES = ((6, 4), (5, 5), (4, 8), (1, 7)), ((4, 3), (1, 3))
NOTES = (
    "step + lr d: largest entry, over lr, of the difference between Fanion's step (exact solvers) "
    "and -lr d, with d the exact oracle. |d| of sign blends is known within 1e-6.",
    "On 1 × n matrices all norms of singular values are the Euclidean norm: Muon, Neon and "
    "k-Fanions of a vector are NSGD.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--seeds",
        type=whole,
        default=5,
        help="number of random gradients of each shape (default: 5)",
    )


def run(options: argparse.Namespace) -> int:
    """Step, compare and tabulate.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.
    """
    shapes: tuple[steps.Shape, ...] = QUICK_SHAPES if options.quick else SHAPES
    seeds = min(options.seeds, 2) if options.quick else options.seeds
    checks = {
        method.name: {shape: steps.check_method(method, shape, seeds) for shape in shapes}
        for method in METHODS
    }
    outcome = Outcome(
        tables=[methods_table(), steps.errors_table(checks)],
        columns=["method", "rows", "cols", "seed", "quantity", "value"],
        rows=[
            [name, *shape, seed, quantity, value]
            for name, own in checks.items()
            for shape, check in own.items()
            for quantity, values in check._asdict().items()
            for seed, value in enumerate(values.tolist())
        ],
        settings={
            "seeds": list(range(seeds)),
            "shapes": shapes,
            "k": K,
            "alpha": ALPHA,
            "sign_scale": 1.0,
            "momentum": MOMENTUM,
        },
        claims=[] if options.quick else claims.judge_all(checks, shapes, seeds),
        notes=NOTES,
        arguments=options.arguments,
    )
    print(outcome)
    outcome.save(options.out, "norms")
    return 0

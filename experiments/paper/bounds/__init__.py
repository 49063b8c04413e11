r"""Theory of least squares: L, lr and iterations; Gaussian matrices (sections 4 and 5.1).

On random problems of section 5.1 (spectra uniform in (0, 1), S standard normal, start at zero) this
compares the constants that the article prints for n = 50 with what its formulas give and with the
exact L, and the learning rates and numbers of iterations with those of Lemma 7. F-Muon and F-Neon,
for which the article prints no numbers, have alpha = 1/2. The precision is the article's: 1 in the
spectral norm of the gradient, converted to each dual norm by the article's ratios of norms. Random
samples check these ratios and the asymptotics of section 4 that they come from.

  python -m experiments.paper bounds --problems 20
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from experiments.bench.race import whole
from experiments.paper.bounds import claims, figure, gaussian, smoothness
from experiments.paper.bounds.article import SIZE
from experiments.paper.outcome import Claim, Outcome

TIME = "half a minute; quick: a few seconds"
SIZES, QUICK_SIZES = (25, 50, 100, 200, 400), (8, 16)  # of square Gaussian matrices
ASPECT = 4  # rows : columns of the other Gaussian matrices, and columns : rows
NOTES = (
    "formula: as printed, |M|_F |N|_F, 2/n |M|_* |N|_*, n |M|_op |N|_op; gamma^2, right: "
    "gamma^2 |M|_dual |N|_dual with gamma of large Gaussian matrices (4/n for Muon); exact: the "
    "largest dual norm of M X N over the unit ball; rho: of (A3), exact.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--problems", type=whole, default=10, help="number of random problems (default: 10)"
    )
    parser.add_argument(
        "--size",
        type=whole,
        default=SIZE,
        metavar="N",
        help=f"rows and columns of the problems (default: {SIZE})",
    )
    parser.add_argument(
        "--samples",
        type=whole,
        default=10,
        help="number of Gaussian matrices of each shape (default: 10)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of problems and matrices (default: 0)"
    )


def run(options: argparse.Namespace) -> int:
    """Compute, tabulate and plot.

    Args:
        options: See ``add_arguments``.

    Returns:
        The exit status, 0.
    """
    size, problems, samples = options.size, options.problems, options.samples
    sizes: Sequence[int] = SIZES
    if options.quick:
        size, problems, samples = min(size, 10), min(problems, 2), min(samples, 3)
        sizes = QUICK_SIZES
    generator = torch.Generator().manual_seed(options.seed)
    values = smoothness.evaluate(*smoothness.draw_problems(problems, size, generator))
    matrices = gaussian.sample_norms(_shapes(sizes), samples, generator)
    judged: list[Claim] = []
    if not options.quick:
        judged = claims.judge_asymptotics(matrices)
        if size == SIZE:
            judged += [claims.judge_smoothness(values, problems), claims.judge_step_sizes()]
    outcome = Outcome(
        tables=[
            smoothness.constants_table(values, size),
            smoothness.printed_table(),
            smoothness.plans_table(values, size),
            gaussian.norms_table(matrices),
        ],
        columns=["subject", "of", "quantity", "sample", "value"],
        rows=[*smoothness.rows(values), *gaussian.rows(matrices)],
        settings={"problems": problems, "size": size, "samples": samples, "seed": options.seed},
        draw=lambda canvas: figure.draw(canvas, values, matrices, size),
        claims=judged,
        notes=NOTES,
        arguments=options.arguments,
    )
    print(outcome)
    outcome.save(options.out, "bounds")
    return 0


def _shapes(sizes: Sequence[int]) -> list[gaussian.Shape]:
    """Return square shapes, then the oblong ones of the largest size."""
    largest, other = sizes[-1], sizes[-1] // ASPECT
    return [*((n, n) for n in sizes), (largest, other), (other, largest)]

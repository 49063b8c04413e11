"""The algorithms of section 5.1 and the numbers that the article prints for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lit_fanions import norms

SIZE = 50  # rows and columns that the printed numbers fit; the text has 10, the figure 50


class Printed(NamedTuple):
    """The numbers that the article prints for an algorithm.

    Attributes:
        smoothness: L.
        lr: Learning rate.
        steps: Number of iterations.
    """

    smoothness: float
    lr: float
    steps: int


class Algorithm(NamedTuple):
    """An algorithm of the experiment.

    Attributes:
        norm: Norm in whose ball it steps.
        precision: Target for the dual norm of the gradient, as a function of n.
        gamma_squared: The article's gamma^2 as a function of n; None if it has none.
        printed: The numbers printed for n = 50; None if there are none.
    """

    norm: norms.Norm
    precision: Callable[[int], float]
    gamma_squared: Callable[[int], float] | None = None
    printed: Printed | None = None


ALGORITHMS = {
    "NSGD": Algorithm(
        norms.Frobenius(),
        lambda n: math.sqrt(n) / 2,
        lambda n: 1.0,
        Printed(16.2, 1.75e-2, 323),
    ),
    "Muon": Algorithm(
        norms.Spectral(), lambda n: n / 2, lambda n: 2 / n, Printed(171.4, 2.33e-4, 68)
    ),
    "Neon": Algorithm(
        norms.Nuclear(), lambda n: 1.0, lambda n: float(n), Printed(47.7, 2.10e-2, 11919)
    ),
    "F-Muon": Algorithm(norms.Blend(norms.Spectral(), 0.5), lambda n: (n + math.sqrt(n)) / 4),
    "F-Neon": Algorithm(norms.Blend(norms.Nuclear(), 0.5), lambda n: (2 + math.sqrt(n)) / 4),
}
PRINTED = {name: a.printed for name, a in ALGORITHMS.items() if a.printed is not None}


def implied_gap(name: str) -> tuple[float, float]:
    """Return the range of F(0) - F* for which K = L (F(0) - F*) / eps² gives the printed K.

    The printed L and K are rounded, hence a range.
    """
    printed, precision = PRINTED[name], ALGORITHMS[name].precision(SIZE)
    return (
        (printed.steps - 1) * precision**2 / (printed.smoothness + 0.05),
        (printed.steps + 0.5) * precision**2 / (printed.smoothness - 0.05),
    )


def candidate_lrs(name: str) -> dict[str, float]:
    """Return the formulas that the printed lr may come from, with their values."""
    smoothness, precision = PRINTED[name].smoothness, ALGORITHMS[name].precision(SIZE)
    return {"1 / (eps L)": 1 / (precision * smoothness), "eps / L": precision / smoothness}


def is_printed_lr(name: str, lr: float) -> bool:
    """Return True if an lr is the printed one, given the rounding of lr and L."""
    printed = PRINTED[name]
    return abs(lr / printed.lr - 1) <= 0.005 + 0.05 / printed.smoothness

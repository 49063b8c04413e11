"""Verdicts on the claims about L, step sizes and Gaussian matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from experiments.paper import verdicts
from experiments.paper.bounds import article, gaussian
from experiments.paper.bounds.gaussian import CLOSE, Samples, Shape, converges_to_one
from experiments.paper.bounds.smoothness import (
    EXACT,
    FITTED,
    FORMULA,
    SOURCES,
    Values,
    format_spread,
)
from experiments.paper.outcome import Claim, judge
from lit_fanions.cli.curves import spread

_DEVIATIONS = 3  # within so many standard deviations, a printed number agrees with samples


def judge_smoothness(values: Values, problems: int) -> Claim:
    """Return the verdict on the printed values of L."""
    printed = article.PRINTED

    def agrees(number: float, samples: Tensor) -> bool:
        mean, deviation = spread(samples.tolist())
        return abs(number - mean) <= _DEVIATIONS * max(deviation, 0.05)  # L is rounded to .1

    agreeing = {
        source: [name for name, p in printed.items() if agrees(p.smoothness, values[name][source])]
        for source in SOURCES
    }
    found = "; ".join(
        f"{name}: printed {p.smoothness:g}, its formula {format_spread(values[name][FORMULA])}, "
        f"exact L {format_spread(values[name][EXACT])}"
        for name, p in printed.items()
    )
    return judge(
        "smoothness",
        verdicts.from_bool(len(agreeing[FORMULA]) == len(agreeing[EXACT]) == len(printed)),
        f"{found}; with 2/sqrt(n) instead of 2/n Muon's formula gives "
        f"{format_spread(values['Muon'][FITTED])}",
        f"random least squares, {article.SIZE} × {article.SIZE}",
        problems,
        f"Printed numbers that agree with the formulas: {_join(agreeing[FORMULA])}; with the "
        f"formulas with 2/sqrt(n): {_join(agreeing[FITTED])}; with the exact L: "
        f"{_join(agreeing[EXACT])}. The exact L is the product of the largest eigenvalues for NSGD "
        "and Neon, and the sum of the products of the sorted eigenvalues for Muon. The article's "
        "own ratio, dual norm ~ norm / gamma^2, implies a division by gamma^2, not a product.",
    )


def judge_step_sizes() -> Claim:
    """Return the verdict on the printed learning rates and numbers of iterations."""
    fitting = {
        formula: [
            name
            for name in article.PRINTED
            if article.is_printed_lr(name, article.candidate_lrs(name)[formula])
        ]
        for formula in article.candidate_lrs("NSGD")
    }
    gaps = [article.implied_gap(name) for name in article.PRINTED]
    low, high = max(gap[0] for gap in gaps), min(gap[1] for gap in gaps)
    one_gap = low <= high
    lrs = "; ".join(f"the printed lr is {f} for {_join(names)}" for f, names in fitting.items())
    steps = (
        f"one F(0) - F* of {low:.1f} to {high:.1f} explains all three K = L (F(0) - F*) / eps²"
        if one_gap
        else "no single F(0) - F* explains the three K = L (F(0) - F*) / eps²"
    )
    return judge(
        "step-sizes",
        verdicts.from_bool(one_gap and len(fitting["eps / L"]) == len(article.PRINTED)),
        f"{lrs}; {steps}",
        "the article's printed L and precisions",
        0,
    )


def _join(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# Gaussian matrices.


def judge_asymptotics(matrices: Samples) -> list[Claim]:
    """Return the verdicts on the asymptotics of section 4, from norms of Gaussian matrices."""
    return [
        _judge_formulas(matrices),
        _judge_squares(matrices),
        _judge_duality(matrices),
        _judge_proportionality(matrices),
    ]


def _smallest_and_largest(matrices: Samples) -> tuple[Shape, Shape]:
    squares = gaussian.square_shapes(matrices)
    return squares[0], squares[-1]


def _count(matrices: Samples) -> int:
    """Return the number of samples of each shape."""
    return len(next(iter(matrices.values()))["nuclear"])


def _judge_formulas(matrices: Samples) -> Claim:
    first, last = _smallest_and_largest(matrices)
    oblong = [shape for shape in matrices if shape[0] != shape[1]]
    large = (last, *oblong)
    ratios = {
        name: {
            shape: gaussian.ratios_to_formula(matrices, shape, name) for shape in (first, *large)
        }
        for name in gaussian.FORMULAS
    }
    right = [
        name
        for name, own in ratios.items()
        if all(converges_to_one(own[first], own[shape]) for shape in large)
    ]
    found = "; ".join(
        f"{name} norm over its formula: "
        + ", ".join(f"{format_spread(own[shape])} ({shape[0]} × {shape[1]})" for shape in large)
        for name, own in ratios.items()
    )
    return judge(
        "gaussian-norms",
        verdicts.from_bool(len(right) == len(ratios)),
        found,
        f"Gaussian matrices up to {last[0]} × {last[0]}, and {oblong[0][0] // oblong[0][1]} : 1",
        _count(matrices),
        f"Right: {_join(right)}. The nuclear norm of a square matrix is 8 / (3 pi) n^1.5 = "
        f"{8 / (3 * math.pi):.3f} n^1.5.",
        close=CLOSE,
    )


def _judge_squares(matrices: Samples) -> Claim:
    first, last = _smallest_and_largest(matrices)
    factors = {"Frobenius": lambda n: math.sqrt(n) / 2, "nuclear": lambda n: n / 2}
    ratios = {
        f"{norm} / spectral": [
            [
                ratio / factor(shape[0])
                for ratio in gaussian.ratios_of_norms(matrices, shape, norm, "spectral")
            ]
            for shape in (first, last)
        ]
        for norm, factor in factors.items()
    }
    right = [name for name, own in ratios.items() if converges_to_one(*own)]
    return judge(
        "square-norms",
        verdicts.from_bool(len(right) == len(ratios)),
        "; ".join(
            f"{name} over its formula: {format_spread(own[1])}" for name, own in ratios.items()
        ),
        f"Gaussian matrices of {last[0]} × {last[0]}",
        _count(matrices),
        f"Right: {_join(right)}. The nuclear norm is 4 / (3 pi) n = {4 / (3 * math.pi):.3f} n "
        "times the spectral one.",
        close=CLOSE,
    )


def _judge_duality(matrices: Samples) -> Claim:
    first, last = _smallest_and_largest(matrices)
    products = [
        [
            nuclear * spectral
            for nuclear, spectral in zip(
                gaussian.ratios_of_norms(matrices, shape, "nuclear", "Frobenius"),
                gaussian.ratios_of_norms(matrices, shape, "spectral", "Frobenius"),
                strict=True,
            )
        ]
        for shape in (first, last)
    ]
    return judge(
        "dual-gamma",
        verdicts.from_bool(converges_to_one(*products)),
        "nuclear norm times spectral norm over the squared Frobenius norm: "
        f"{format_spread(products[1])}",
        f"Gaussian matrices of {last[0]} × {last[0]}",
        _count(matrices),
        f"The ratio goes to 16 / (3 pi) = {16 / (3 * math.pi):.3f}.",
        close=CLOSE,
    )


def _judge_proportionality(matrices: Samples) -> Claim:
    first, last = _smallest_and_largest(matrices)

    def variation(shape: Shape) -> float:
        spreads = [
            spread(gaussian.ratios_of_norms(matrices, shape, norm, "Frobenius"))
            for norm in ("nuclear", "spectral")
        ]
        return max(deviation / mean for mean, deviation in spreads)

    small, large = variation(first), variation(last)
    return judge(
        "proportional-norms",
        verdicts.from_bool(large < min(CLOSE, small)),
        "relative standard deviation of the ratios to the Frobenius norm: at most "
        f"{small:.1%} ({first[0]} × {first[1]}), {large:.1%} ({last[0]} × {last[1]})",
        "square Gaussian matrices",
        _count(matrices),
        close=CLOSE,
    )

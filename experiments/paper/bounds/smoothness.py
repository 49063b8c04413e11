"""L, learning rates and iterations on random problems: values and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.paper.bounds import article, asymptotics
from experiments.paper.bounds.article import ALGORITHMS, PRINTED
from lit_fanions import bounds
from lit_fanions.cli.console import Table
from lit_fanions.cli.curves import spread

# Ways to compute L; the last is the truth.
FORMULA, FITTED, GAMMA, EXACT = "formula", "2/sqrt(n) for Muon", "gamma^2, right", "exact"
SOURCES = (FORMULA, FITTED, GAMMA, EXACT)
GAP = "gap"  # the loss at the start above the minimum
# Algorithm -> way to compute L, or the gap -> one value per problem.
Values = dict[str, dict[str, Tensor]]


def draw_problems(
    count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return M, N and S of equation 19 for random problems, each (count, size, size)."""

    def semidefinite() -> Tensor:
        basis = torch.linalg.qr(standard_normal((count, size, size), generator)).Q
        spectrum = torch.rand(count, 1, size, dtype=torch.float64, generator=generator)
        return (basis * spectrum) @ basis.mT

    return semidefinite(), semidefinite(), standard_normal((count, size, size), generator)


def standard_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def evaluate(left: Tensor, right: Tensor, target: Tensor) -> Values:
    """Return L, computed in every way, and the gap at the start.

    Args:
        left: M of each problem, (count, size, size).
        right: N of each problem, of the same shape.
        target: S of each problem, of the same shape.
    """
    size = left.shape[-1]
    gap = 0.5 * (target * (left @ target @ right)).sum((-2, -1))
    values: Values = {}
    for name, algorithm in ALGORITHMS.items():
        norm = algorithm.norm
        product = norm.dual(left) * norm.dual(right)
        own = values[name] = {}
        if algorithm.gamma_squared is not None:
            gamma_squared = algorithm.gamma_squared(size)
            own[FORMULA] = gamma_squared * product
            own[FITTED] = (2 / math.sqrt(size) if name == "Muon" else gamma_squared) * product
        own[GAMMA] = asymptotics.asymptotic_smoothness(norm, left, right)
        own[EXACT] = bounds.smoothness(norm, left, right)
        own[GAP] = gap
    return values


def rows(values: Values) -> list[list[object]]:
    """Return all values as rows of the CSV."""
    return [
        ["least squares", name, source if source == GAP else f"L, {source}", i, value]
        for name, own in values.items()
        for source, numbers in own.items()
        for i, value in enumerate(numbers.tolist())
    ]


def format_spread(values: Tensor | Sequence[float], digits: int = 3) -> str:
    """Return mean ± standard deviation as text."""
    mean, deviation = spread(values.tolist() if isinstance(values, Tensor) else values)
    deviation *= deviation > 1e-9 * mean  # hide the rounding errors of equal values
    return f"{mean:.{digits}g} ± {deviation:.2g}"


def constants_table(values: Values, size: int) -> Table:
    """Return the table of L by algorithm and way to compute it."""
    cells = []
    for name, own in values.items():
        printed = PRINTED.get(name)
        cells.append(
            [
                name,
                f"{printed.smoothness:g}" if printed else "–",
                *(format_spread(own[source]) if source in own else "–" for source in SOURCES),
                format_spread(own[FITTED] / own[EXACT]) if FITTED in own else "–",
            ]
        )
    columns = ["algorithm", "article, n = 50", *SOURCES, "article's / exact"]
    title = f"L on {size} × {size} least squares: mean ± std over the problems"
    return Table(title, columns, cells)


def printed_table() -> Table:
    """Return the table of the printed learning rates and iterations, and what they follow from."""
    cells = []
    for name, printed in PRINTED.items():
        lrs = [
            f"{lr:.3g}{' (fits)' * article.is_printed_lr(name, lr)}"
            for lr in article.candidate_lrs(name).values()
        ]
        low, high = article.implied_gap(name)
        precision = ALGORITHMS[name].precision(article.SIZE)
        gap = f"{low:.1f} – {high:.1f}"
        cells.append([name, f"{precision:.3g}", f"{printed.lr:g}", *lrs, printed.steps, gap])
    return Table(
        "The article's numbers (n = 50) from its L: learning rates, and the F(0) - F* behind K",
        ["algorithm", "eps", "lr", "1 / (eps L)", "eps / L", "K", "K eps² / L"],
        cells,
    )


def plans_table(values: Values, size: int) -> Table:
    """Return the table of learning rates and iterations by the article's and by the exact L."""
    cells = []
    for name, own in values.items():
        algorithm = ALGORITHMS[name]
        precision, rho = algorithm.precision(size), bounds.rho(algorithm.norm, size, size)
        plans = [
            cell
            for source in (FITTED, EXACT)
            for cell in (_plan_cells(own, source, precision) if source in own else ("–", "–"))
        ]
        cells.append([name, f"{precision:.3g}", f"{rho:.3g}", *plans])
    gap = format_spread(values["NSGD"][GAP])
    return Table(
        f"lr and K on {size} × {size} least squares, F(0) - F* = {gap}: by the article's L "
        "eps / L and L (F(0) - F*) / eps²;\nby the exact L those of the descent inequality, "
        "eps / L and 2 L (F(0) - F*) / eps²",
        ["algorithm", "eps", "rho", "lr, article's L", "K", "lr, exact L", "K"],
        cells,
    )


def _plan_cells(own: dict[str, Tensor], source: str, precision: float) -> tuple[str, str]:
    """Return lr and number of iterations by one way to compute L."""
    pairs = zip(own[source].tolist(), own[GAP].tolist(), strict=True)
    if source == EXACT:
        plans = [bounds.plan(smoothness, gap, precision) for smoothness, gap in pairs]
        found = [(plan.lr, plan.steps) for plan in plans]
    else:
        found = [
            (precision / smoothness, math.ceil(smoothness * gap / precision**2))
            for smoothness, gap in pairs
        ]
    lrs, steps = zip(*found, strict=True)
    return format_spread(lrs), format_spread([float(count) for count in steps])

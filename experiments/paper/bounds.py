r"""Theory of least squares: L, lr and iterations; Gaussian matrices (sections 4 and 5.1).

For random problems of section 5.1 (spectra uniform in (0, 1), S standard normal, start at zero) the
constants that the article prints for n = 50 stand beside what its formulas give and beside the
exact L, with the learning rate and the number of iterations of Lemma 7. F-Muon and F-Neon, for
which the article prints nothing, have alpha = 1/2. The precision is the article's: 1 in the
spectral norm of the gradient, translated into each dual norm by its ratios of norms.
Monte Carlo checks these ratios, and the asymptotics of section 4 behind them.

  python -m experiments.paper bounds --problems 20
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from experiments.bench.race import whole
from experiments.paper import verdicts
from experiments.paper.outcome import Claim, Outcome
from lit_fanions import bounds, norms
from lit_fanions.cli.console import Table
from lit_fanions.cli.runner import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "half a minute; quick: a few seconds"
ARTICLE_SIZE = 50  # that its numbers fit; the text has 10, the figure 50
SIZES, QUICK_SIZES = (25, 50, 100, 200, 400), (8, 16)  # of square Gaussian matrices
OBLONG = 4  # rows : cols of the others, and cols : rows


class Printed(NamedTuple):
    """What the article prints.

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
        norm: In whose ball it steps.
        precision: That the dual norm of the gradient shall have, as a function of n.
        gamma_squared: As the article has it, as a function of n; None if it has none.
        printed: Its numbers for n = 50; None if it has none.
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
# What L can be read from; the last is the truth.
FORMULA, FITTED, GAMMA, EXACT = "formula", "2/sqrt(n) for Muon", "gamma^2, right", "exact"
SOURCES = (FORMULA, FITTED, GAMMA, EXACT)
Values = dict[str, dict[str, Tensor]]  # algorithm -> source or quantity -> one value a problem

# Section 4, of a matrix of m x n.
FORMULAS: dict[str, Callable[[int, int], float]] = {
    "nuclear": lambda m, n: n * math.sqrt(m),
    "Frobenius": lambda m, n: math.sqrt(m * n),
    "spectral": lambda m, n: math.sqrt(m) + math.sqrt(n),
}
NORMS: dict[str, norms.Norm] = {
    "nuclear": norms.Nuclear(),
    "Frobenius": norms.Frobenius(),
    "spectral": norms.Spectral(),
    "Ky Fan 5": norms.KyFan(5),
    "Ky Fan 20": norms.KyFan(20),
}
Shape = tuple[int, int]
Samples = dict[Shape, dict[str, list[float]]]  # shape -> norm -> one value a matrix
# An asymptotic is right if its error at the largest size is below this, and has fallen on the way.
CLOSE = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--problems", type=whole, default=10, help="random problems (default: 10)")
    parser.add_argument(
        "--size", type=whole, default=ARTICLE_SIZE, metavar="N", help="rows and columns (50)"
    )
    parser.add_argument(
        "--samples", type=whole, default=10, help="Gaussian matrices of each shape (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both (default: 0)")


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
        size, problems, samples, sizes = (
            min(size, 10),
            min(problems, 2),
            min(samples, 3),
            QUICK_SIZES,
        )
    generator = torch.Generator().manual_seed(options.seed)
    values = _values(*_problems(problems, size, generator))
    shapes = [(n, n) for n in sizes]
    shapes += [(sizes[-1], sizes[-1] // OBLONG), (sizes[-1] // OBLONG, sizes[-1])]
    gaussian = {shape: _norms(shape, samples, generator) for shape in shapes}
    claims: list[Claim] = []
    if not options.quick:
        claims = [*_asymptotics_claims(gaussian)]
        if size == ARTICLE_SIZE:
            claims += [_smoothness_claim(values, problems), _step_sizes_claim()]
    outcome = Outcome(
        tables=[
            _smoothness_table(values, size),
            _step_sizes_table(),
            _plans_table(values, size),
            _gaussian_table(gaussian),
        ],
        columns=["subject", "of", "quantity", "sample", "value"],
        rows=[*_value_rows(values), *_gaussian_rows(gaussian)],
        settings={"problems": problems, "size": size, "samples": samples, "seed": options.seed},
        draw=lambda figure: _draw(figure, values, gaussian, size),
        claims=claims,
        notes=NOTES,
    )
    print(outcome)
    outcome.save(options.out, "bounds")
    return 0


# Problems.


def _problems(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """M, N and S of equation 19, each (count, size, size)."""

    def semidefinite() -> Tensor:
        basis = torch.linalg.qr(_gaussian((count, size, size), generator)).Q
        spectrum = torch.rand(count, 1, size, dtype=torch.float64, generator=generator)
        return (basis * spectrum) @ basis.mT

    return semidefinite(), semidefinite(), _gaussian((count, size, size), generator)


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _values(left: Tensor, right: Tensor, target: Tensor) -> Values:
    """L by every source, and the loss at the start."""
    size = left.shape[-1]
    gap = 0.5 * (target * (left @ target @ right)).sum((-2, -1))
    found: Values = {}
    for name, algorithm in ALGORITHMS.items():
        norm = algorithm.norm
        both = norm.dual(left) * norm.dual(right)
        of = found[name] = {}
        if algorithm.gamma_squared is not None:
            gamma_squared = algorithm.gamma_squared(size)
            of[FORMULA] = gamma_squared * both
            of[FITTED] = (2 / math.sqrt(size) if name == "Muon" else gamma_squared) * both
        of[GAMMA] = bounds.asymptotic_smoothness(norm, left, right)
        of[EXACT] = bounds.smoothness(norm, left, right)
        of["gap"] = gap
    return found


def _value_rows(values: Values) -> list[list[object]]:
    return [
        ["least squares", name, source if source == "gap" else f"L, {source}", i, value]
        for name, of in values.items()
        for source, numbers in of.items()
        for i, value in enumerate(numbers.tolist())
    ]


def _spread(values: Tensor | Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    mean, deviation = spread(listed)
    deviation *= deviation > 1e-9 * mean  # not of rounding
    return f"{mean:.{digits}g} ± {deviation:.2g}"


def _smoothness_table(values: Values, size: int) -> Table:
    cells = []
    for name, of in values.items():
        printed = PRINTED.get(name)
        cells.append(
            [
                name,
                f"{printed.smoothness:g}" if printed else "–",
                *(_spread(of[source]) if source in of else "–" for source in SOURCES),
                _spread(of[FITTED] / of[EXACT]) if FITTED in of else "–",
            ]
        )
    columns = ["algorithm", "article, n = 50", *SOURCES, "article's / exact"]
    return Table(f"L on {size} × {size} least squares: mean ± std of the problems", columns, cells)


# The article's own numbers.


def _gap_range(name: str) -> tuple[float, float]:
    """The losses at the start for which K = L gap / precision^2 is printed, after rounding."""
    printed, precision = PRINTED[name], ALGORITHMS[name].precision(ARTICLE_SIZE)
    return (
        (printed.steps - 1) * precision**2 / (printed.smoothness + 0.05),
        (printed.steps + 0.5) * precision**2 / (printed.smoothness - 0.05),
    )


def _readings(name: str) -> dict[str, float]:
    """What the printed lr may be."""
    smoothness, precision = PRINTED[name].smoothness, ALGORITHMS[name].precision(ARTICLE_SIZE)
    return {"1 / (eps L)": 1 / (precision * smoothness), "eps / L": precision / smoothness}


def _fits(name: str, lr: float) -> bool:
    """Whether that is the printed lr, after the rounding of both it and L."""
    printed = PRINTED[name]
    return abs(lr / printed.lr - 1) <= 0.005 + 0.05 / printed.smoothness


def _step_sizes_table() -> Table:
    cells = []
    for name, printed in PRINTED.items():
        readings = [f"{lr:.3g}{' (fits)' * _fits(name, lr)}" for lr in _readings(name).values()]
        low, high = _gap_range(name)
        precision = ALGORITHMS[name].precision(ARTICLE_SIZE)
        gap = f"{low:.1f} – {high:.1f}"
        cells.append([name, f"{precision:.3g}", f"{printed.lr:g}", *readings, printed.steps, gap])
    return Table(
        "The article's numbers (n = 50) by its L: learning rates, and the F(0) - F* behind K",
        ["algorithm", "eps", "lr", "1 / (eps L)", "eps / L", "K", "K eps² / L"],
        cells,
    )


def _plans_table(values: Values, size: int) -> Table:
    cells = []
    for name, of in values.items():
        precision = ALGORITHMS[name].precision(size)
        row = [name, f"{precision:.3g}", f"{bounds.rho(ALGORITHMS[name].norm, size, size):.3g}"]
        for source in (FITTED, EXACT):
            if source not in of:
                row += ["–", "–"]
                continue
            pairs = zip(of[source].tolist(), of["gap"].tolist(), strict=True)
            if source == EXACT:
                plans = [bounds.plan(smoothness, gap, precision) for smoothness, gap in pairs]
                found = [(plan.lr, plan.steps) for plan in plans]
            else:
                found = [(precision / L, math.ceil(L * gap / precision**2)) for L, gap in pairs]
            row += [_spread([lr for lr, _ in found]), _spread([float(k) for _, k in found])]
        cells.append(row)
    gap = _spread(values["NSGD"]["gap"])
    return Table(
        f"lr and K on {size} × {size} least squares, F(0) - F* = {gap}: by the article's L "
        "eps / L and L (F(0) - F*) / eps²;\nby the exact L those of the descent inequality, "
        "eps / L and 2 L (F(0) - F*) / eps²",
        ["algorithm", "eps", "rho", "lr, article's L", "K", "lr, exact L", "K"],
        cells,
    )


def _smoothness_claim(values: Values, problems: int) -> Claim:
    def off(printed: float, numbers: Tensor) -> float:
        mean, deviation = spread(numbers.tolist())
        return abs(printed - mean) / max(deviation, 0.05)

    within = {
        source: [
            name for name, printed in PRINTED.items() if off(printed.smoothness, of(name)) <= 3
        ]
        for source in SOURCES
        for of in [lambda name, source=source: values[name][source]]
    }
    holds = len(within[FORMULA]) == len(within[EXACT]) == len(PRINTED)
    found = "; ".join(
        f"{name}: printed {printed.smoothness:g}, its formula "
        f"{_spread(values[name][FORMULA])}, exact L {_spread(values[name][EXACT])}"
        for name, printed in PRINTED.items()
    )
    return Claim(
        "smoothness",
        verdicts.of(holds),
        f"{found}; with 2/sqrt(n) instead of 2/n Muon's formula gives "
        f"{_spread(values['Muon'][FITTED])}",
        f"random least squares, {ARTICLE_SIZE} × {ARTICLE_SIZE}",
        problems,
        "Confirmed if the printed numbers are within 3 standard deviations of the formulas and of "
        f"the exact L. Within: of the formulas {_listed(within[FORMULA])}, of those with 2/sqrt(n) "
        f"{_listed(within[FITTED])}, of the exact L {_listed(within[EXACT])}. The exact L is the "
        "product of the largest eigenvalues for NSGD and Neon and the sum of the products of the "
        "sorted eigenvalues for Muon. From the article's own ratio, dual norm ~ norm / gamma^2, "
        "would follow a division by gamma^2, not a product.",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _step_sizes_claim() -> Claim:
    fits = {
        reading: [name for name in PRINTED if _fits(name, _readings(name)[reading])]
        for reading in _readings("NSGD")
    }
    ranges = [_gap_range(name) for name in PRINTED]
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    counts = low <= high
    holds = counts and len(fits["eps / L"]) == len(PRINTED)
    lrs = "; ".join(f"the printed lr is {r} for {_listed(names)}" for r, names in fits.items())
    steps = (
        f"one F(0) - F* of {low:.1f} to {high:.1f} explains all three K = L (F(0) - F*) / eps²"
        if counts
        else "no single F(0) - F* explains the three K = L (F(0) - F*) / eps²"
    )
    return Claim(
        "step-sizes",
        verdicts.of(holds),
        f"{lrs}; {steps}",
        "the article's printed L and precisions",
        0,
        "Confirmed if lr = eps / L and K = L (F(0) - F*) / eps² give all six numbers from the "
        "printed L, within rounding.",
    )


# Gaussian matrices.


def _norms(shape: Shape, samples: int, generator: torch.Generator) -> dict[str, list[float]]:
    matrices = _gaussian((samples, *shape), generator)
    return {name: norm.value(matrices).tolist() for name, norm in NORMS.items()}


def _gaussian_rows(gaussian: Samples) -> list[list[object]]:
    return [
        ["Gaussian", f"{m} × {n}", f"{name} norm", i, value]
        for (m, n), found in gaussian.items()
        for name, values in found.items()
        for i, value in enumerate(values)
    ]


def _ratio(gaussian: Samples, shape: Shape, name: str) -> list[float]:
    """Of the measured norm to the article's formula."""
    return [value / FORMULAS[name](*shape) for value in gaussian[shape][name]]


def _law(shape: Shape, name: str) -> float:
    return bounds.gaussian_norm(NORMS[name], *shape)


def _gaussian_table(gaussian: Samples) -> Table:
    cells = []
    for shape, found in gaussian.items():
        for name, values in found.items():
            law = _law(shape, name)
            cells.append(
                [
                    f"{shape[0]} × {shape[1]}",
                    name,
                    _spread(values, 4),
                    f"{FORMULAS[name](*shape):.4g}" if name in FORMULAS else "–",
                    _spread(_ratio(gaussian, shape, name)) if name in FORMULAS else "–",
                    f"{law:.4g}",
                    _spread([value / law for value in values]),
                ]
            )
    return Table(
        "Norms of Gaussian m × n matrices: mean ± std of the samples",
        ["m × n", "norm", "measured", "article", "over it", "Marchenko-Pastur", "over it"],
        cells,
    )


def _squares(gaussian: Samples) -> list[Shape]:
    return sorted(shape for shape in gaussian if shape[0] == shape[1])


def _converges(first: Sequence[float], last: Sequence[float]) -> bool:
    """Whether ratios go to 1 from the smallest to the largest size."""
    errors = [abs(spread(values)[0] - 1) for values in (first, last)]
    noise = 2 * math.hypot(*(spread(v)[1] / math.sqrt(len(v)) for v in (first, last)))
    return errors[1] <= CLOSE and errors[1] <= errors[0] + noise


_RULE = (
    f"Confirmed if the ratio is within {CLOSE:.0%} of 1 at the largest size and, but for noise, "
    "not further from it than at the smallest."
)


def _asymptotics_claims(gaussian: Samples) -> list[Claim]:
    squares = _squares(gaussian)
    first, last = squares[0], squares[-1]
    oblong = [shape for shape in gaussian if shape not in squares]
    n, count = last[0], len(gaussian[last]["nuclear"])
    data = f"Gaussian matrices up to {n} × {n}, and {OBLONG} : 1"
    right = {
        name: all(
            _converges(_ratio(gaussian, first, name), _ratio(gaussian, shape, name))
            for shape in (last, *oblong)
        )
        for name in FORMULAS
    }
    found = "; ".join(
        f"{name} norm over its formula: "
        + ", ".join(
            f"{_spread(_ratio(gaussian, s, name))} ({s[0]} × {s[1]})" for s in (last, *oblong)
        )
        for name in FORMULAS
    )
    constant = 8 / (3 * math.pi)
    claims = [
        Claim(
            "gaussian-norms",
            verdicts.of(all(right.values())),
            found,
            data,
            count,
            f"{_RULE} Right: {_listed([name for name, holds in right.items() if holds])}. Of a "
            f"square matrix the nuclear norm is 8 / (3 pi) n^1.5 = {constant:.3f} n^1.5.",
        )
    ]

    def over(top: str, bottom: str, factor: float, shape: Shape) -> list[float]:
        found = gaussian[shape]
        return [a / b / factor for a, b in zip(found[top], found[bottom], strict=True)]

    pairs = {
        f"{top} / spectral": [
            over(top, "spectral", factor(shape[0]), shape) for shape in (first, last)
        ]
        for top, factor in (("Frobenius", lambda n: math.sqrt(n) / 2), ("nuclear", lambda n: n / 2))
    }
    holds = [name for name, ratios in pairs.items() if _converges(*ratios)]
    claims.append(
        Claim(
            "square-norms",
            verdicts.of(len(holds) == len(pairs)),
            "; ".join(f"{name} over it: {_spread(ratios[1])}" for name, ratios in pairs.items()),
            f"Gaussian matrices of {n} × {n}",
            count,
            f"{_RULE} Right: {_listed(holds)}. The nuclear norm is 4 / (3 pi) n = "
            f"{4 / (3 * math.pi):.3f} n times the spectral one.",
        )
    )
    product = [
        [
            a * b / c**2
            for a, b, c in zip(
                *(gaussian[shape][name] for name in ("nuclear", "spectral", "Frobenius")),
                strict=True,
            )
        ]
        for shape in (first, last)
    ]
    claims.append(
        Claim(
            "dual-gamma",
            verdicts.of(_converges(*product)),
            f"nuclear norm times spectral norm over the Frobenius norm squared: "
            f"{_spread(product[1])}",
            f"Gaussian matrices of {n} × {n}",
            count,
            f"{_RULE} The product goes to 16 / (3 pi) = {16 / (3 * math.pi):.3f}.",
        )
    )
    variation = [
        max(
            spread(over(top, "Frobenius", 1.0, shape))[1]
            / spread(over(top, "Frobenius", 1.0, shape))[0]
            for top in ("nuclear", "spectral")
        )
        for shape in (first, last)
    ]
    claims.append(
        Claim(
            "proportional-norms",
            verdicts.of(variation[1] < min(CLOSE, variation[0])),
            "standard deviation of the ratios to the Frobenius norm, relative: at most "
            f"{variation[0]:.1%} ({first[0]} × {first[1]}), {variation[1]:.1%} ({n} × {n})",
            "square Gaussian matrices",
            count,
            f"Confirmed if it falls, and to less than {CLOSE:.0%}.",
        )
    )
    return claims


NOTES = (
    "formula: as printed, |M|_F |N|_F, 2/n |M|_* |N|_*, n |M|_op |N|_op; gamma^2, right: "
    "gamma^2 |M|_dual |N|_dual with gamma of large Gaussian matrices (4/n for Muon); exact: the "
    "largest dual norm of M X N over the unit ball; rho: of (A3), exact.",
)


# The picture.


def _draw(figure: Figure, values: Values, gaussian: Samples, size: int) -> None:
    left, right = figure.subplots(1, 2)
    _draw_smoothness(left, values, size)
    _draw_gaussian(right, gaussian)


def _draw_smoothness(axes: Axes, values: Values, size: int) -> None:
    series: dict[str, Mapping[str, tuple[float, float]]] = {
        "printed (n = 50)": {name: (p.smoothness, 0.0) for name, p in PRINTED.items()}
    }
    series |= {
        source: {name: spread(of[source].tolist()) for name, of in values.items() if source in of}
        for source in SOURCES
    }
    labels = {
        FORMULA: "its formula",
        FITTED: "its formula, 2/√n for Muon",
        GAMMA: "γ² with right γ",
    }
    places = {name: i for i, name in enumerate(values)}
    for i, (source, points) in enumerate(series.items()):
        x = [places[name] + 0.14 * (i - (len(series) - 1) / 2) for name in points]
        means, deviations = zip(*points.values(), strict=True)
        label = labels.get(source, source)
        axes.errorbar(x, means, deviations, fmt="*osD^"[i], capsize=3, label=label)
    axes.set_xticks(range(len(places)), list(places))
    title = f"L on {size} × {size} least squares, mean ± std of the problems"
    axes.set(yscale="log", ylabel="L", title=title)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)


def _draw_gaussian(axes: Axes, gaussian: Samples) -> None:
    squares = _squares(gaussian)
    sizes = [shape[0] for shape in squares]
    for i, name in enumerate(FORMULAS):
        spreads = [spread(_ratio(gaussian, shape, name)) for shape in squares]
        means, deviations = zip(*spreads, strict=True)
        color = f"C{i}"
        axes.errorbar(sizes, means, deviations, fmt="o", capsize=3, color=color, label=name)
        laws = [_law(shape, name) / FORMULAS[name](*shape) for shape in squares]
        axes.plot(sizes, laws, color=color, linewidth=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.set(
        xlabel="n",
        ylabel="norm over the article's formula",
        title="n × n Gaussian matrices; lines: Marchenko-Pastur law",
    )
    axes.legend()
    axes.grid(alpha=0.3)

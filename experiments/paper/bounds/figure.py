"""The picture of bounds: L by algorithm, and Gaussian norms by size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.paper.bounds import gaussian
from experiments.paper.bounds.article import PRINTED
from experiments.paper.bounds.smoothness import FITTED, FORMULA, GAMMA, SOURCES, Values
from lit_fanions.cli.curves import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {FORMULA: "its formula", FITTED: "its formula, 2/√n for Muon", GAMMA: "γ² with right γ"}


def draw(figure: Figure, values: Values, matrices: gaussian.Samples, size: int) -> None:
    """Draw L on the left and norms of Gaussian matrices on the right.

    Args:
        figure: An empty figure.
        values: What ``smoothness.evaluate`` returned.
        matrices: What ``gaussian.sample_norms`` returned.
        size: Rows and columns of the problems.
    """
    left, right = figure.subplots(1, 2)
    _draw_smoothness(left, values, size)
    _draw_gaussian(right, matrices)


def _draw_smoothness(axes: Axes, values: Values, size: int) -> None:
    series: dict[str, Mapping[str, tuple[float, float]]] = {
        "printed (n = 50)": {name: (p.smoothness, 0.0) for name, p in PRINTED.items()}
    }
    series |= {
        source: {
            name: spread(own[source].tolist()) for name, own in values.items() if source in own
        }
        for source in SOURCES
    }
    places = {name: i for i, name in enumerate(values)}
    for i, (source, points) in enumerate(series.items()):
        x = [places[name] + 0.14 * (i - (len(series) - 1) / 2) for name in points]
        means, deviations = zip(*points.values(), strict=True)
        label = LABELS.get(source, source)
        axes.errorbar(x, means, deviations, fmt="*osD^"[i], capsize=3, label=label)
    axes.set_xticks(range(len(places)), list(places))
    title = f"L on {size} × {size} least squares, mean ± std over the problems"
    axes.set(yscale="log", ylabel="L", title=title)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)


def _draw_gaussian(axes: Axes, matrices: gaussian.Samples) -> None:
    squares = gaussian.square_shapes(matrices)
    sizes = [shape[0] for shape in squares]
    for i, name in enumerate(gaussian.FORMULAS):
        ratios = [gaussian.ratios_to_formula(matrices, shape, name) for shape in squares]
        means, deviations = zip(*map(spread, ratios), strict=True)
        color = f"C{i}"
        axes.errorbar(sizes, means, deviations, fmt="o", capsize=3, color=color, label=name)
        laws = [
            gaussian.exact_asymptotic(shape, name) / gaussian.FORMULAS[name](*shape)
            for shape in squares
        ]
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

"""The picture of a comparison: curves at the best learning rates, and losses at all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from experiments.paper.tuning.comparison import Comparison
from lit_fanions.cli.curves import Curve, Curves, spread
from lit_fanions.cli.results import drawable, logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """A variant in the picture.

    Attributes:
        curves: Curves of each seed at the best lr.
        tried: Last values of seed 0 by lr.
        result: The last value, in words.
    """

    curves: Sequence[Curves]
    tried: Mapping[float, float]
    result: str


def draw(figure: Figure, lines: Mapping[str, Line], comparison: Comparison) -> None:
    """Draw the first metric, the learning rates, and the other metrics.

    Args:
        figure: An empty figure.
        lines: The variants by name.
        comparison: What is compared.
    """
    metric, *others = comparison.metrics
    columns = [metric, "lr", *others]
    axes = dict(zip(columns, figure.subplots(1, len(columns), squeeze=False)[0], strict=True))
    axes["lr"].sharey(axes[metric])
    suffix = "_cpu" if all(name.endswith("_cpu") for name in lines) else ""
    for i, (name, line) in enumerate(lines.items()):
        label = f"{name.removesuffix(suffix)}  {line.result}"
        for shown in comparison.metrics:
            _draw_curves(axes[shown], [curves[shown] for curves in line.curves], f"C{i}", label)
        axes["lr"].plot(
            list(line.tried), drawable([*line.tried.values()]), marker="o", color=f"C{i}"
        )
    seeds = max(len(line.curves) for line in lines.values())
    title = f"{seeds} seeds:\nmean ± standard deviation" if seeds > 1 else "seed 0"
    axes[metric].set(xlabel="optimizer step", ylabel=metric, title=f"at the best lr, {title}")
    axes["lr"].set(xlabel="lr of the matrices", title="after the last step, seed 0")
    logarithmic(axes["lr"])
    for other in others:
        axes[other].set(xlabel="optimizer step", title=f"{other}, at the best lr")
    if comparison.logarithmic:
        for axis in axes.values():
            axis.set_yscale("log")
    else:
        _limit_losses(axes[metric], lines, metric)
    handles, labels = axes[metric].get_legend_handles_labels()
    figure.legend(handles, labels, title=f"recipe, last {metric}", loc="outside right upper")


def _limit_losses(axis: Axes, lines: Mapping[str, Line], metric: str) -> None:
    """Limit the axis to the last losses; the first and the diverged ones would flatten them."""
    spreads = [spread([curves[metric][-1][1] for curves in line.curves]) for line in lines.values()]
    means = [mean for mean, _ in spreads if math.isfinite(mean)]
    if not means:
        return
    margin = 0.1 * (max(means) - min(means)) + 0.01
    # A single recipe has no others to be compared with: show its other learning rates.
    (tried,) = [line.tried for line in lines.values()] if len(lines) == 1 else [{}]
    tops = [loss for loss in tried.values() if math.isfinite(loss)]
    axis.set_ylim(min(means) - margin, max([*means, *tops]) + 4 * margin)


def _draw_curves(axis: Axes, curves: Sequence[Curve], color: str, label: str) -> None:
    """Draw the mean over the seeds, with a band of one standard deviation."""
    steps, means, deviations = mean_curve(curves)
    marker = "." if len(steps) < 3 else ""
    axis.plot(steps, drawable(means), marker=marker, color=color, label=label)
    axis.locator_params(axis="x", integer=True)
    low = drawable([m - d for m, d in zip(means, deviations, strict=True)])
    high = drawable([m + d for m, d in zip(means, deviations, strict=True)])
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Return the steps, means and standard deviations of several curves.

    Only steps that all curves have are used: a mean over the others would jump where one ends.
    """
    steps = [step for step, _ in curves[0]]
    columns: list[Mapping[int, float]] = [dict(curve) for curve in curves]
    shared = [step for step in steps if all(step in column for column in columns)]
    spreads = [spread([column[step] for column in columns]) for step in shared]
    return shared, [mean for mean, _ in spreads], [deviation for _, deviation in spreads]

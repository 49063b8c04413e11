"""Draw the figures of a report: each has all runs, so that they can be compared."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_fanions.callbacks import figures
from lit_fanions.callbacks.quantities import QUANTITIES, parse_tag
from lit_fanions.cli.report_logs import Curve, Run, is_metric, metric_order, print_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS, OTHER = "losses and metrics", "learning rates and others"
STABLE_RANKS, SPECTRA = "stable ranks", "spectra"
_COLUMNS = 3
# Most runs whose matrices are drawn beside the means over groups.
_MAX_BANDS = 6


class Drawing(NamedTuple):
    """A figure of the report, with the keys of ``QUANTITIES`` that it shows."""

    title: str
    figure: Figure
    quantities: list[str]


def draw(runs: Sequence[Run]) -> Iterator[Drawing]:
    """Yield the figures of some runs, losses first."""
    plain = {tag for run in runs for tag in run.curves if parse_tag(tag) is None}
    metrics = sorted(filter(is_metric, plain), key=metric_order)
    if metrics:
        print_progress(f"drawing {METRICS}")
        yield Drawing(METRICS, _scalar_grid(runs, metrics), [])
    quantities = {tag.quantity for run in runs for tag in map(parse_tag, run.curves) if tag}
    for family in dict.fromkeys(name.partition("_")[0] for name in QUANTITIES):
        members = [q for q in QUANTITIES if q in quantities and q.partition("_")[0] == family]
        if members:
            print_progress(f"drawing {family}: {len(members)} quantities")
            yield Drawing(family, _quantity_grid(runs, members), members)
    for run in runs:
        suffix = f" of {run.name}" if len(runs) > 1 else ""
        if history := _stable_ranks(run):
            print_progress(f"drawing {STABLE_RANKS}{suffix}")
            figure = figures.stable_ranks(history)
            yield Drawing(STABLE_RANKS + suffix, figure, ["weight_stable_rank"])
        if run.spectra:
            print_progress(f"drawing {SPECTRA}{suffix}")
            yield Drawing(SPECTRA + suffix, figures.spectra(run.spectra), [])
    if others := sorted(plain.difference(metrics)):
        print_progress(f"drawing {OTHER}")
        yield Drawing(OTHER, _scalar_grid(runs, others), [])


def _stable_ranks(run: Run) -> dict[int, dict[str, float]]:
    """Return the stable ranks of the weights: step -> matrix -> value."""
    history: dict[int, dict[str, float]] = {}
    matrices, _ = _curves(run, "weight_stable_rank")
    for matrix, curve in matrices.items():
        for step, value in curve:
            history.setdefault(step, {})[matrix] = value
    return dict(sorted(history.items()))


def _scalar_grid(runs: Sequence[Run], tags: Sequence[str]) -> Figure:
    """Return a figure with a panel for each tag and a line for each run."""
    figure, panels = _panels(len(tags), len(runs))
    for axes, tag in zip(panels, tags, strict=True):
        curves = {}
        for i, run in enumerate(runs):
            if curve := run.curves.get(tag):
                curves[run.name] = curve
                _plot(axes, curve, _run_color(i, len(runs)), 1.4, run.name)
        _finish(axes, tag, curves.values())
    if len(runs) > 1:
        figures.add_legend(figure, panels)
    return figure


def _quantity_grid(runs: Sequence[Run], quantities: Sequence[str]) -> Figure:
    """Return a figure with a panel for each quantity.

    A single run has a line for each matrix. Of several runs, each has a line for each group and a
    band from the smallest to the largest value of its matrices.
    """
    names = len(runs) if len(runs) > 1 else len(_curves(runs[0], quantities[0])[0])
    figure, panels = _panels(len(quantities), names)
    for axes, quantity in zip(panels, quantities, strict=True):
        curves: list[Curve] = []
        for i, run in enumerate(runs):
            matrices, groups = _curves(run, quantity)
            curves += [*matrices.values(), *groups.values()]
            if len(runs) == 1:
                for j, (name, curve) in enumerate(matrices.items()):
                    _plot(axes, curve, figures.color(j, len(matrices)), 0.8, name)
            elif len(runs) <= _MAX_BANDS:
                _plot_band(axes, matrices.values(), _run_color(i, len(runs)))
            for group, curve in groups.items():
                color = "tab:red" if len(runs) == 1 else _run_color(i, len(runs))
                label = f"mean of group {group}" if len(runs) == 1 else run.name
                _plot(axes, curve, color, 1.8, label, "--" if len(runs) == 1 else "-")
                axes.annotate(group, curve[-1], fontsize=8, color=color, parse_math=False)
        _finish(axes, QUANTITIES[quantity].title, curves)
    figures.add_legend(figure, panels)
    return figure


def _curves(run: Run, quantity: str) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Return a run's curves of a quantity, by matrix and by group."""
    matrices: dict[str, Curve] = {}
    groups: dict[str, Curve] = {}
    for tag, curve in run.curves.items():
        parsed = parse_tag(tag)
        if parsed and parsed.quantity == quantity:
            (groups if parsed.is_group else matrices)[parsed.matrix] = curve
    return matrices, groups


def _panels(count: int, names: int) -> tuple[Figure, list[Any]]:
    """Return a figure with some panels, high enough for a legend of some names."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    height = max(3.4 * rows, 4.0, figures.legend_height(names))
    figure = figures.new_figure(1.5 + 4.6 * columns, height)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _run_color(i: int, count: int) -> Any:
    return f"C{i}" if count <= 10 else figures.color(i, count)


def _plot(axes: Any, curve: Curve, color: Any, width: float, label: str, style: str = "-") -> None:
    marker = "o" if len(curve) == 1 else None  # one point makes no line
    axes.plot(*zip(*curve, strict=True), style, color=color, linewidth=width, marker=marker,
              label=label)  # fmt: skip


def _plot_band(axes: Any, curves: Iterable[Curve], color: Any) -> None:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    axes.fill_between(
        steps, [min(values[step]) for step in steps], [max(values[step]) for step in steps],
        color=color, alpha=0.12, linewidth=0,
    )  # fmt: skip


def _finish(axes: Any, title: str, curves: Iterable[Curve]) -> None:
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if _spans_decades(curves):
        axes.set_yscale("log")


def _spans_decades(curves: Iterable[Curve]) -> bool:
    """Return True if the 10-90 % range spans more than a factor of 30 (robust to outliers)."""
    values = sorted(value for curve in curves for _, value in curve if math.isfinite(value))
    if not values or values[0] <= 0:
        return False
    low, high = values[len(values) // 10], values[-1 - len(values) // 10]
    return high > 30 * low


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()

"""Draw the figures of a report: each has all runs, so that they can be compared."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_fanions.callbacks import figures
from lit_fanions.callbacks.quantities import QUANTITIES, parse_tag
from lit_fanions.cli import curves
from lit_fanions.cli.curves import Curve, Curves, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS, RATES, OTHER = "losses and metrics", "learning rates", "throughput and others"
STABLE_RANKS, SPECTRA = "stable ranks", "spectra"
_COLUMNS = 3
# Most runs whose matrices are drawn beside the means over groups.
_MAX_BANDS = 6
# Quantities that are sizes, drawn on a logarithmic scale in every report; by the end of the name.
_SIZES = ("_dual", "_nuclear", "_kyfan", "_frobenius", "_spectral", "_rms", "_relative")
_LINES = "-", "--", ":", "-."  # of runs beyond the ten colours, and of groups


class Drawing(NamedTuple):
    """A figure of the report, with the keys of ``QUANTITIES`` that it shows."""

    title: str
    figure: Figure
    quantities: Sequence[str] = ()


def draw(runs: Sequence[Run]) -> Iterator[Drawing]:
    """Yield the figures of some runs, losses first; test metrics stand in the summary alone."""
    plain = {tag for run in runs for tag in run.curves if parse_tag(tag) is None}
    metrics = {tag for tag in plain if curves.is_metric(tag)}
    curved = sorted(
        (tag for tag in metrics if curves.stage(tag) != "test"), key=curves.metric_order
    )
    yield from _scalars(METRICS, runs, curved)
    quantities = {tag.quantity for run in runs for tag in map(parse_tag, run.curves) if tag}
    for family in dict.fromkeys(name.partition("_")[0] for name in QUANTITIES):
        members = [q for q in QUANTITIES if q in quantities and q.partition("_")[0] == family]
        if members:
            curves.print_progress(f"drawing {family}: {len(members)} quantities")
            yield Drawing(family, _quantity_grid(runs, members), members)
    for run in runs:
        suffix = f" of {run.name}" if len(runs) > 1 else ""
        history: dict[int, dict[str, float]] = {}  # step -> matrix -> stable rank of the weight
        for matrix, curve in _quantity_curves(run, "weight_stable_rank", groups=False).items():
            for step, value in curve:
                history.setdefault(step, {})[matrix] = value
        if history:
            curves.print_progress(f"drawing {STABLE_RANKS}{suffix}")
            figure = figures.stable_ranks(history)
            yield Drawing(STABLE_RANKS + suffix, figure, ["weight_stable_rank"])
        if run.spectra:
            curves.print_progress(f"drawing {SPECTRA}{suffix}")
            yield Drawing(SPECTRA + suffix, figures.spectra(run.spectra))
    rates = sorted(tag for tag in plain - metrics if curves.stage(tag) == "lr")
    yield from _scalars(RATES, runs, rates)
    yield from _scalars(OTHER, runs, sorted(plain - metrics - {*rates}))


def _scalars(title: str, runs: Sequence[Run], tags: Sequence[str]) -> Iterator[Drawing]:
    """Yield a figure with a panel for each tag and a line for each run, if there are tags."""
    if not tags:
        return
    curves.print_progress(f"drawing {title}")
    figure, panels = panel_grid(len(tags), len(runs))
    for axes, tag in zip(panels, tags, strict=True):
        drawn = {i: run.curves[tag] for i, run in enumerate(runs) if tag in run.curves}
        for i, curve in drawn.items():
            plot_curve(axes, curve, runs[i].name, run_color(i), _LINES[i // 10 % 4])
        label_panel(axes, tag, _spans_decades(drawn.values()))
    if len(runs) > 1:
        figures.add_legend(figure, panels)
    yield Drawing(title, figure)


def _quantity_grid(runs: Sequence[Run], quantities: Sequence[str]) -> Figure:
    """Return a figure with a panel for each quantity.

    A single run has a line for each matrix. Of several runs, each has a line for each group and a
    band from the smallest to the largest value of its matrices.
    """
    is_single = len(runs) == 1
    names = len(_quantity_curves(runs[0], quantities[0], groups=False)) if is_single else len(runs)
    figure, panels = panel_grid(len(quantities), names)
    for axes, quantity in zip(panels, quantities, strict=True):
        for i, run in enumerate(runs):
            matrices = _quantity_curves(run, quantity, groups=False)
            if is_single:
                for j, (name, curve) in enumerate(matrices.items()):
                    plot_curve(axes, curve, name, figures.color(j, len(matrices)), width=0.8)
            elif len(runs) <= _MAX_BANDS:
                _plot_band(axes, matrices.values(), run_color(i))
            groups = _quantity_curves(run, quantity, groups=True)
            for j, (group, curve) in enumerate(groups.items()):
                label = f"mean of group {group}" if is_single else run.name
                if not is_single and len(groups) > 1:
                    label += f", {group}"
                line = _LINES[(j + is_single) % 4]  # solid lines are the matrices of a single run
                plot_curve(axes, curve, label, "black" if is_single else run_color(i), line, 1.8)
        label_panel(axes, QUANTITIES[quantity].title, quantity.endswith(_SIZES))
    figures.add_legend(figure, panels)
    return figure


def _quantity_curves(run: Run, quantity: str, groups: bool) -> Curves:
    """Return a run's curves of a quantity by matrix, or the means by group."""
    parsed = {tag: parse_tag(tag) for tag in run.curves}
    return {
        own.matrix: run.curves[tag]
        for tag, own in parsed.items()
        if own and own.quantity == quantity and own.is_group == groups
    }


def panel_grid(count: int, names: int) -> tuple[Figure, list[Any]]:
    """Return a figure with some panels, high enough for a legend of some names."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    height = max(3.4 * rows, 4.0, figures.legend_height(names))
    figure = figures.new_figure(1.5 + 4.6 * columns, height)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def run_color(i: int) -> str:
    """Return the colour of the i-th run."""
    return f"C{i % 10}"


def plot_curve(
    axes: Any, curve: Curve, label: str, color: Any, line: str = "-", width: float = 1.4
) -> None:
    """Plot a curve; a single point, which makes no line, as a dot."""
    marker = "o" if len(curve) == 1 else None
    steps, values = zip(*curve, strict=True)
    axes.plot(steps, values, line, color=color, linewidth=width, marker=marker, label=label)


def _plot_band(axes: Any, members: Iterable[Curve], color: Any) -> None:
    values: dict[int, list[float]] = {}
    for curve in members:
        for step, value in curve:
            values.setdefault(step, []).append(value)
    steps = sorted(values)
    low, high = ([choose(values[step]) for step in steps] for choose in (min, max))
    axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def label_panel(axes: Any, title: str, is_logarithmic: bool = False) -> None:
    """Give a panel its title, its grid, and a logarithmic scale if it has a positive value."""
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if is_logarithmic and any((line.get_ydata(orig=False) > 0).any() for line in axes.get_lines()):
        axes.set_yscale("log", nonpositive="mask")


def _spans_decades(drawn: Iterable[Curve]) -> bool:
    """Return True if the 10-90 % range spans more than a factor of 30 (robust to outliers)."""
    values = sorted(value for curve in drawn for _, value in curve if math.isfinite(value))
    if not values or values[0] <= 0:
        return False
    low, high = values[len(values) // 10], values[-1 - len(values) // 10]
    return high > 30 * low


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()

"""The picture of least_squares (Figure 1): loss and gradient norms over the iterations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.paper.least_squares.tables import title_of_setting
from experiments.paper.least_squares.traces import FIVE, Setting, Trace, Traces, setting_traces

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTINGS: tuple[Setting, ...] = ("article", "text", "draft", "lemma 7")
LABELS = {
    "loss": "loss",
    "spectral": "gradient, spectral norm",
    "frobenius": "gradient, Frobenius norm",
    "nuclear": "gradient, nuclear norm",
}


def draw(figure: Figure, traces: Traces, problems: int) -> None:
    """Draw a row of panels for each setting.

    Args:
        figure: An empty figure.
        traces: Traces by setting and recipe.
        problems: Number of problems.
    """
    settings = [setting for setting in SETTINGS if setting_traces(traces, setting)]
    axes = figure.subplots(len(settings), len(LABELS), squeeze=False)
    styles = _styles({name for _, name in traces})
    for row, setting in zip(axes, settings, strict=True):
        found = setting_traces(traces, setting)
        last = max(trace.steps[-1] for trace in found.values())
        for axis, (quantity, label) in zip(row, LABELS.items(), strict=True):
            for name in sorted(found, key=list(styles).index):
                _draw_curve(axis, found[name], quantity, {**styles[name], "label": name})
            axis.set(xscale="log", yscale="log", xlabel="iterations", title=label)
            axis.set_xlim(left=max(1, last / 1000))  # before that, hardly anything happens
        row[0].set_ylabel(title_of_setting(setting, found))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    band = f"median of {problems} problems\nband: all of them" if problems > 1 else "one problem"
    figure.legend(
        handles, labels, title=f"{band}\ndotted: smallest so far\n", loc="outside right upper"
    )


def _styles(names: set[str]) -> dict[str, dict[str, Any]]:
    """Return the style of each recipe; those beyond the article's figure are dashed."""
    others = sorted(names - {*FIVE})
    styles: dict[str, dict[str, Any]]
    styles = {name: {"color": f"C{i}"} for i, name in enumerate((*FIVE, *others))}
    return styles | {name: {**styles[name], "linestyle": "--"} for name in others}


def _draw_curve(axis: Axes, trace: Trace, quantity: str, style: Mapping[str, Any]) -> None:
    # A logarithmic axis has neither step 0 nor diverged values.
    steps, values = trace.steps[1:], np.nan_to_num(trace.values[quantity][1:], posinf=np.nan)
    axis.plot(steps, np.median(values, axis=1), linewidth=1.4, **style)
    low, high = values.min(1), values.max(1)
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    best = trace.values.get(f"best_{quantity}")
    if best is not None:
        dots = {**style, "linestyle": ":", "label": None}
        axis.plot(steps, np.median(best[1:], axis=1), linewidth=1.2, **dots)

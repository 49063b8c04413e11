"""The picture of topk: errors over time by rank, and times of directions by size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.paper.topk.measure import NEWTON_SCHULZ, Entry
from lit_fanions.cli.results import logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(
    figure: Figure, entries: Sequence[Entry], directions: Sequence[Entry], goal: float
) -> None:
    """Draw a panel for each rank with all settings that were tried, and one for the sizes.

    Args:
        figure: An empty figure.
        entries: Results of the race.
        directions: Times of directions by size.
        goal: The error to be reached.
    """
    ranks = list(dict.fromkeys(entry["k"] for entry in entries))
    *panels, last = figure.subplots(1, len(ranks) + 1)
    solvers = list(dict.fromkeys(entry["solver"] for entry in entries))
    for k, panel in zip(ranks, panels, strict=True):
        for entry in entries:
            if entry["k"] == k:
                _draw_settings(panel, entry, f"C{solvers.index(entry['solver'])}")
        panel.axhline(goal, color="black", linewidth=0.8, linestyle="--")
        panel.set(title=f"k = {k}", xlabel="seconds", yscale="log")
        logarithmic(panel)
    panels[0].set_ylabel("error of the rank-k direction")
    _draw_directions(last, directions)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(solvers))


def _draw_settings(axes: Axes, entry: Entry, color: str) -> None:
    """Draw the settings that a solver tried; the one that takes part in the race is filled."""
    finite = [t for t in entry["tried"] if math.isfinite(t["error"])]
    for chosen in (False, True):
        points = [t for t in finite if (t["setting"] == entry["setting"]) is chosen]
        axes.scatter(
            [t["seconds"] for t in points],
            [max(t["error"], 1e-5) for t in points],
            s=40 if chosen else 20,
            edgecolors=color,
            facecolors=color if chosen else "none",
            label=entry["solver"] if chosen else None,
        )


def _draw_directions(axes: Axes, directions: Sequence[Entry]) -> None:
    for name in dict.fromkeys(d["direction"] for d in directions):
        line = [d for d in directions if d["direction"] == name]
        times = [d["median_seconds"] for d in line]
        style = "k--" if name == NEWTON_SCHULZ else "-"
        label = name if name == NEWTON_SCHULZ else f"Lanczos, {name}"
        axes.plot([d["size"] for d in line], times, style, marker="o", label=label)
    sizes = list(dict.fromkeys(d["size"] for d in directions))
    axes.set(title="a direction", xlabel="rows = columns", ylabel="seconds")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.legend(fontsize="small")

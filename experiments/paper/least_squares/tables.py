"""Tables of the outcome: the last step, who leads, and theory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.paper.least_squares.theory import Promise
from experiments.paper.least_squares.traces import NORMS, Leads, Setting, Trace
from experiments.paper.least_squares.trainings import SIZES
from lit_fanions.cli.console import Table


def title_of_setting(setting: Setting, found: Mapping[str, Trace]) -> str:
    """Return size and lr of a setting as text.

    Args:
        setting: The setting.
        found: Its traces by recipe.
    """
    size = f"{SIZES[setting]} × {SIZES[setting]}"
    lrs = {trace.lr for trace in found.values()}
    if len(lrs) > 1:
        source = {"lemma 7": "of Lemma 7", "printed": "as printed"}.get(setting, "of its own")
        return f"{size}, each with its lr {source}"
    return f"{size}, lr {lrs.pop():g}"


def format_range(values: np.ndarray) -> str:
    """Return median, least and largest value as text."""
    middle, low, high = np.median(values), values.min(), values.max()
    return f"{middle:.3g} ({low:.3g} – {high:.3g})" if len(values) > 1 else f"{middle:.3g}"


def format_steps(needed: np.ndarray, last: int) -> str:
    """Return median, least and largest number of steps as text.

    Args:
        needed: Steps per problem; infinity if the target was not reached.
        last: The last step of the run.
    """

    def one(value: float) -> str:
        return f"{value:,.0f}" if math.isfinite(value) else f"> {last:,}"

    middle, low, high = (float(f(needed)) for f in (np.median, np.min, np.max))
    return one(middle) if low == high else f"{one(middle)} ({one(low)} – {one(high)})"


def last_table(setting: Setting, found: Mapping[str, Trace]) -> Table:
    """Return the table of loss and gradient norms after the last step."""
    steps = max(trace.steps[-1] for trace in found.values())
    title = (
        f"{title_of_setting(setting, found)}, after {steps:,} steps: median (least – largest) over "
        "the problems"
    )
    shown = ("loss", *NORMS, "best_spectral")
    order = sorted(found, key=lambda name: float(np.median(found[name].last("loss"))))
    cells = [[name, *(format_range(found[name].last(q)) for q in shown)] for name in order]
    return Table(title, ["recipe", *(q.replace("_", " ") for q in shown)], cells)


def leads_table(setting: Setting, found: Mapping[str, Trace], leads: Leads, problems: int) -> Table:
    """Return the table of how often each recipe has the smallest gradient."""
    names = list(next(iter(leads.values())))
    cells = [[reading, *counts.values()] for reading, counts in leads.items()]
    title = (
        f"{title_of_setting(setting, found)}: in how many of {problems} problems each has the "
        "smallest gradient"
    )
    return Table(title, ["reading", *names], cells)


def theory_table(promises: Sequence[Promise]) -> Table:
    """Return the table of promised and needed iterations."""
    columns = ["recipe", "theory", "L", "lr", "precision", "promised", "needed", "for spectral 1"]
    cells = [
        [
            p.name,
            p.source,
            format_range(p.smoothness),
            f"{p.lr:.3g}",
            f"{p.precision:.3g}",
            f"{p.promised:,}",
            format_steps(p.needed, p.last),
            format_steps(p.spectral, p.last),
        ]
        for p in promises
    ]
    title = "50 × 50: iterations until the dual norm of the gradient is down to the precision"
    return Table(title, columns, cells)

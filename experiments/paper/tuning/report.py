"""The outcome of a comparison: its table, numbers and verdicts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.paper import repetitions, verdicts
from experiments.paper.outcome import Claim, Outcome
from experiments.paper.tuning import figure
from experiments.paper.tuning.comparison import (
    NO_BEST,
    Comparison,
    Finals,
    Results,
    Variant,
    losses_by_lr,
)
from lit_fanions.cli.console import Table
from lit_fanions.cli.curves import Curves, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BIAS = "Seed 0 also chose the lr: a small bias in favour of every recipe."
EDGE = "at the edge: no lr beyond it was tried with success; a better one may lie there"
SMALL_FORM = "{:.3g} ± {:.2g}"


@dataclass(frozen=True)
class Summary:
    """A variant at its best lr.

    Attributes:
        lr: The best lr.
        curves: Curves of each seed.
        finals: Last value of the first metric by seed.
        tried: Last values of seed 0 by lr.
    """

    lr: float
    curves: Sequence[Curves]
    finals: Mapping[int, float]
    tried: Mapping[float, float]

    def is_at_edge(self) -> bool:
        """Return True if nothing was tried, or nothing succeeded, on one side of the lr."""
        return self.lr in (min(self.tried), max(self.tried))


def make_outcome(
    results: Results,
    best: Mapping[str, float],
    variants: Mapping[str, Variant],
    recipe: Sequence[str],
    comparison: Comparison,
    options: argparse.Namespace,
) -> Outcome:
    """Return the outcome of a comparison.

    Args:
        results: Curves by variant, lr and seed.
        best: The best lr by variant.
        variants: All variants.
        recipe: Further arguments of fit.
        comparison: What is compared.
        options: Options of the command.
    """
    metric = comparison.metrics[0]
    summaries = {name: _summarise(name, lr, results, metric) for name, lr in best.items()}
    summaries = dict(sorted(summaries.items(), key=lambda item: spread([*item[1].finals.values()])))
    edge = [name for name, summary in summaries.items() if summary.is_at_edge()]
    certain = {name: s.finals for name, s in summaries.items() if name not in edge}
    data = repetitions.describe_data(comparison.data, recipe)
    draw, size = _picture(summaries, comparison)
    return Outcome(
        tables=[
            _table(summaries, comparison),
            *tabulate_differences(certain, comparison.beside, metric),
            *comparison.tabulate(certain),
        ],
        columns=["recipe", "lr", "seed", "step", *comparison.metrics],
        rows=[
            [name, lr, seed, step, *(dict(curves[m]).get(step, math.nan) for m in curves)]
            for (name, lr, seed), curves in sorted(results.items())
            for step, _ in curves[metric]
        ],
        settings={
            "recipes": {name: str(variants[name].path) for name in summaries},
            "variants": {name: variants[name].args for name in summaries},
            "arguments": recipe,
            "seeds": sorted({seed for *_, seed in results}),
            "best_lr": best,
            "best_lr_at_the_edge": edge,
        },
        draw=draw,
        size=size,
        claims=_claims(certain, data, comparison, options),
        notes=[EDGE] if edge else [],
        arguments=options.arguments,
    )


def _claims(
    finals: Finals, data: str, comparison: Comparison, options: argparse.Namespace
) -> list[Claim]:
    """Return the verdicts on the claims that the recipes of the command can test."""
    if not repetitions.has_claims(options, some=True):
        return []
    some = options.config is not None or options.only is not None
    claims = comparison.judge(finals, data)
    return [claim for claim in claims if not (some and claim.rule == NO_BEST)]


def _summarise(name: str, lr: float, results: Results, metric: str) -> Summary:
    own = {
        seed: curves
        for (other, x, seed), curves in sorted(results.items())
        if (other, x) == (name, lr)
    }
    finals = {seed: curves[metric][-1][1] for seed, curves in own.items()}
    return Summary(lr, [*own.values()], finals, losses_by_lr(name, results, metric))


def _table(summaries: Mapping[str, Summary], comparison: Comparison) -> Table:
    metric, *others = comparison.metrics
    form = SMALL_FORM if comparison.logarithmic else "{:.4f} ± {:.4f}"
    number = "{:.3g}" if comparison.logarithmic else "{:.4f}"
    cells = [
        [
            name,
            f"{summary.lr:g}" + " (at the edge)" * summary.is_at_edge(),
            format_last(summary.curves, metric, form),
            *(format_last(summary.curves, other, SMALL_FORM) for other in others),
            len(summary.curves),
            "  ".join(f"{lr:g}: {number.format(loss)}" for lr, loss in summary.tried.items()),
        ]
        for name, summary in summaries.items()
    ]
    title = f"{metric}: mean ± standard deviation over the seeds. {BIAS}"
    return Table(title, ["recipe", "lr", *comparison.metrics, "seeds", "by lr, seed 0"], cells)


def tabulate_differences(finals: Finals, beside: Mapping[str, str], metric: str) -> list[Table]:
    """Return the table of variants minus what they are compared with, or none without a pair.

    Args:
        finals: Last values by variant and seed.
        beside: The variant that each is compared with.
        metric: Name of the values.
    """
    cells = [
        [name, other, str(verdicts.mean_difference(finals[name], finals[other]))]
        for name, other in beside.items()
        if {name, other} <= finals.keys()
    ]
    title = f"{metric}: mean difference at equal seeds"
    return [Table(title, ["variant", "minus", "difference"], cells)] if cells else []


def format_last(runs: Sequence[Curves], metric: str, form: str) -> str:
    """Return mean and standard deviation of the last values as text, or how many diverged.

    Args:
        runs: Curves of each seed.
        metric: The scalar.
        form: Format of mean and standard deviation.
    """
    last = [curves[metric][-1][1] for curves in runs]
    diverged = sum(not math.isfinite(loss) for loss in last)
    return f"diverged: {diverged} of {len(last)}" if diverged else form.format(*spread(last))


def _picture(
    summaries: Mapping[str, Summary], comparison: Comparison
) -> tuple[Callable[[Figure], None], tuple[float, float]]:
    """Return the function that draws the picture, and the size in inches."""
    if comparison.draw is not None:
        finals: Finals = {n: s.finals for n, s in summaries.items() if not s.is_at_edge()}
        draw_finals = comparison.draw
        return lambda canvas: draw_finals(canvas, finals), (7, 5)
    form = "{:.3g}" if comparison.logarithmic else "{:.3f}"
    lines = {
        name: figure.Line(
            summary.curves, summary.tried, format_last(summary.curves, comparison.metrics[0], form)
        )
        for name, summary in summaries.items()
    }
    panels = max(len(comparison.metrics) + 1, 3)
    return lambda canvas: figure.draw(canvas, lines, comparison), (5 + 4 * (panels - 1), 5)

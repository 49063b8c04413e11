"""What SpectralMonitor costs: its looks against the steps of the same training.

The recipe is trained with a monitor that looks at every other optimizer step, so that steps with
and without a look see the same noise of a shared machine. The difference of their medians is the
cost of a look; divided by the time of the steps between two looks (--every), it is the overhead.
The figures that TensorBoard gets after each validation are timed by themselves.

  python -m experiments.bench monitor --config configs/nanogpt/muon_cpu.yaml --steps 40

All options of fit are accepted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.bench import race, report
from lit_fanions.cli import console

if TYPE_CHECKING:
    from experiments.bench.timed_fits import Looks

GOAL = 0.02
_EVERY = 2  # steps between two looks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    parser.add_argument(
        "--steps", type=race.whole, default=40, help="timed steps, half of them with a look"
    )
    parser.add_argument(
        "--every",
        type=race.whole,
        default=50,
        help="interval between looks that the overhead is stated for (default: 50)",
    )
    parser.add_argument("--exact", action="store_true", help="time the monitor's exact mode")


def run(options: argparse.Namespace, recipe: Sequence[str]) -> report.Report:
    """Time the monitor.

    Args:
        options: Options of ``add_arguments``.
        recipe: Arguments of fit, such as ``--config FILE``.
    """
    timing = _train(recipe, options.steps, options.exact)
    plain, looking = (statistics.median(turns) for turns in (timing.plain, timing.looking))
    look = looking - plain
    overhead = look / (options.every * plain)
    return report.Report(
        title=f"SpectralMonitor in {' '.join(recipe)}",
        columns=["", "median seconds", "min", "max"],
        rows=[
            ["a step", plain, min(timing.plain), max(timing.plain)],
            ["a step with a look", looking, min(timing.looking), max(timing.looking)],
            *([["figures", timing.figures, "", ""]] if timing.figures is not None else []),
        ],
        notes=[
            f"{timing.matrices} matrices, {len(timing.looking)} looks of {look:.3g} s, "
            f"{'exact' if options.exact else 'estimates'}",
            "figures: after each validation"
            if timing.figures is not None
            else "figures: none without TensorBoard's logger and matplotlib",
            report.machine_line(timing.device),
            f"a look every {options.every} steps: {overhead:.2%} of the training time, without "
            f"figures; goal: at most {GOAL:.0%}: {'met' if overhead <= GOAL else 'missed'}",
        ],
        data={
            "recipe": list(recipe),
            "exact": options.exact,
            "device": str(timing.device),
            "matrices": timing.matrices,
            "plain_seconds": timing.plain,
            "looking_seconds": timing.looking,
            "figure_seconds": timing.figures,
            "every": options.every,
            "overhead": overhead,
        },
    )


def _train(recipe: Sequence[str], steps: int, exact: bool) -> Looks:
    """Train a recipe with a monitor instead of its own, and return the timings.

    Raises:
        Refused: If jsonargparse is missing.
    """
    console.require("jsonargparse", "training a recipe")
    from experiments.bench.recipe import builder
    from experiments.bench.timed_fits import Looks
    from lit_fanions.callbacks import SpectralMonitor

    monitor = SpectralMonitor(_EVERY, exact=exact)
    limits = f"--trainer.max_steps={_EVERY + steps}", "--trainer.limit_val_batches=0"
    with builder(*recipe, *limits) as build:
        fit, timing = build(), Looks(monitor, _EVERY)
        callbacks = fit.trainer.callbacks  # type: ignore[attr-defined]
        others = [each for each in callbacks if not isinstance(each, SpectralMonitor)]
        fit.trainer.callbacks = [*others, monitor, timing]  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, datamodule=fit.datamodule)
    return timing

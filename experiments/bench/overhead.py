"""What Lightning's loop costs over the bare steps of the same recipe.

The recipe is trained by Lightning's fit with its own callbacks and loggers. From inside it, a
second copy of model, optimizer, schedule, data and precision takes the very same steps in a bare
loop. The two take turns, one step each on a CPU and one epoch each on a GPU (where waiting for
every step would hide that Lightning's work overlaps with the device's), so that both see the same
noise of a shared machine. The clock of one stands still while the other runs; validation counts
for neither. All else that fit does between its first and last step counts for Lightning,
checkpoints and epoch ends included. The first epoch is warm-up.

  python -m experiments.bench overhead --config configs/quickstart.yaml --epochs 5

All options of fit are accepted, such as --trainer.limit_train_batches 20 for a long epoch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.bench import race, report
from lit_fanions.cli import console

if TYPE_CHECKING:
    from experiments.bench.timed_fits import PairedTraining

GOAL = 1.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    parser.add_argument("--epochs", type=race.whole, default=5, help="timed epochs of a run")
    parser.add_argument("--repeats", type=race.whole, default=1, help="runs, each from the start")


def run(options: argparse.Namespace, recipe: Sequence[str]) -> report.Report:
    """Time the recipe.

    Args:
        options: Options of ``add_arguments``.
        recipe: Arguments of fit, such as ``--config FILE``.
    """
    timings = [time_recipe(recipe, options.epochs) for _ in range(options.repeats)]
    fit = [turns for each in timings for turns in each.fit]
    bare = [turns for each in timings for turns in each.bare]
    fit_seconds, bare_seconds = [sum(turns) for turns in fit], [sum(turns) for turns in bare]
    ratios = [a / b for a, b in zip(fit_seconds, bare_seconds, strict=True)]
    ratio = typical_epoch(fit) / typical_epoch(bare)
    difference = max(each.difference for each in timings)
    last = timings[-1]
    return report.Report(
        title=f"Lightning's loop against bare steps: {' '.join(recipe)}",
        columns=["seconds per epoch", "typical", "min", "max"],
        rows=[
            ["Lightning's fit", typical_epoch(fit), min(fit_seconds), max(fit_seconds)],
            ["bare loop", typical_epoch(bare), min(bare_seconds), max(bare_seconds)],
            ["ratio", ratio, min(ratios), max(ratios)],
        ],
        notes=[
            f"{len(ratios)} paired epochs of {last.steps} steps; precision {last.precision}; "
            "typical: the sum of every step's median over the epochs",
            f"weights after the same steps: {_describe_difference(difference)}",
            report.machine_line(last.device),
            f"goal: ratio at most {GOAL}: {'met' if ratio <= GOAL else 'missed'}",
        ],
        data={
            "recipe": list(recipe),
            "steps_per_epoch": last.steps,
            "precision": last.precision,
            "device": str(last.device),
            "fit_seconds": fit,
            "bare_seconds": bare,
            "ratio": ratio,
            "largest_weight_difference": difference,
        },
    )


def typical_epoch(epochs: Sequence[Sequence[float]]) -> float:
    """Return the sum, over the turns of an epoch, of each turn's median over the epochs.

    On a shared machine a burst of other work hits a few turns; the sum of a single epoch would
    include it.

    Args:
        epochs: Seconds of every turn of each epoch.
    """
    return sum(statistics.median(turns) for turns in zip(*epochs, strict=True))


def time_recipe(recipe: Sequence[str], epochs: int) -> PairedTraining:
    """Train the recipe once, with the bare loop inside, and return the timings.

    Args:
        recipe: Arguments of fit.
        epochs: Number of epochs after the warm-up.

    Raises:
        Refused: If jsonargparse is missing.
        ValueError: If the recipe trains in several processes.
    """
    console.require("jsonargparse", "training a recipe")
    from experiments.bench.recipe import builder, training_batches
    from experiments.bench.timed_fits import PairedTraining

    with builder(
        *recipe, f"--trainer.max_epochs={epochs + 1}", "--trainer.limit_val_batches=1"
    ) as build:
        fit, twin = build(), build()
        if fit.trainer.world_size > 1:
            raise ValueError(
                f"overhead compares single processes, got {fit.trainer.world_size}: "
                "set --trainer.devices 1"
            )
        timing = PairedTraining(training_batches(twin))
        fit.trainer.callbacks.append(timing)  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, datamodule=fit.datamodule)
    return timing


def _describe_difference(difference: float) -> str:
    if difference == 0:
        return "equal"
    return f"up to {difference:.3g} apart (data drawn from torch's global random numbers differ)"

"""What SpectralMonitor costs: its looks against the steps of the same training.

The recipe is trained with a monitor that looks at every other optimizer step, so that steps with
and without a look see the same noise of a shared machine. The difference of their medians is the
cost of a look; divided by the time of the steps between two looks (--every), it is the overhead.
The figures that TensorBoard gets after each validation are timed by themselves.

  python -m experiments.bench monitor --config configs/nanogpt/muon_cpu.yaml --steps 40

All options of fit are accepted.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from experiments.bench import race, report
from lit_fanions.callbacks import SpectralMonitor
from lit_fanions.callbacks.quantities import parse_tag
from lit_fanions.cli import console

GOAL = 0.02
_EVERY = 2


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
    timing = _train(recipe, options.steps, SpectralMonitor(_EVERY, exact=options.exact))
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


def _train(recipe: Sequence[str], steps: int, monitor: SpectralMonitor) -> "Timing":
    """Train a recipe with this monitor instead of its own, and return the timings.

    Raises:
        Refused: If jsonargparse is missing.
    """
    console.require("jsonargparse", "training a recipe")
    from experiments.bench.recipe import builder

    limits = f"--trainer.max_steps={_EVERY + steps}", "--trainer.limit_val_batches=0"
    with builder(*recipe, *limits) as build:
        fit, timing = build(), Timing(monitor)
        callbacks = fit.trainer.callbacks  # type: ignore[attr-defined]
        others = [each for each in callbacks if not isinstance(each, SpectralMonitor)]
        fit.trainer.callbacks = [*others, monitor, timing]  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, datamodule=fit.datamodule)
    return timing


class Timing(Callback):
    """Times optimizer steps, those with a look of the monitor apart from those without.

    Args:
        monitor: The monitor.

    Attributes:
        plain: Seconds of each step without a look; the first steps are left out.
        looking: Seconds of each step with a look; the first one is left out.
        figures: Seconds that drawing takes; None if no logger takes figures.
        matrices: Number of monitored matrices.
    """

    def __init__(self, monitor: SpectralMonitor) -> None:
        self.monitor = monitor
        self.plain: list[float] = []
        self.looking: list[float] = []
        self.figures: float | None = None
        self.matrices = 0
        self._steps = 0
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.device = trainer.strategy.root_device
        self._clock = report.now(self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Note the time if an optimizer step has ended."""
        if trainer.global_step == self._steps:
            return
        self._steps, now = trainer.global_step, report.now(self.device)
        seconds, self._clock = now - self._clock, now
        if self._steps > _EVERY:
            # The monitor counts steps from 0, so the step that has just ended is global_step - 1.
            looked = (self._steps - 1) % _EVERY == 0
            (self.looking if looked else self.plain).append(seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time the figures."""
        self.monitor.draw(trainer)  # untimed: the first call imports matplotlib
        start = report.now(self.device)
        if self.monitor.draw(trainer):
            self.figures = report.now(self.device) - start
        tags = filter(None, map(parse_tag, trainer.callback_metrics))
        self.matrices = sum(tag.quantity == "update_rms" and not tag.is_group for tag in tags)

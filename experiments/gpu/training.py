"""What the measurements of trainings share: recipes without logging, and the time of each step."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from experiments.bench import report

# Arguments of fit that switch off all that is no training.
QUIET = (
    *("--trainer.logger=false", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"),
    "--trainer.limit_val_batches=0",
)


class StepClock(Callback):
    """Notes when the training starts and when each optimizer step has ended.

    Attributes:
        times: Seconds on the clock of ``report.now``: the start, then the end of each step.
    """

    def __init__(self, *, every_step: bool) -> None:
        self.times: list[float] = []
        self._every_step = every_step
        self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the start."""
        self.times = [report.now(trainer.strategy.root_device)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Note the end of a step, if all steps are wanted: that waits for the device."""
        if self._every_step and trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.times.append(report.now(trainer.strategy.root_device))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the end of the training."""
        if not self._every_step:
            self.times.append(report.now(trainer.strategy.root_device))

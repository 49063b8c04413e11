"""Progress of a run without a terminal, in plain lines."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar

from lit_fanions.progress import Meter


def without_bars(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return callbacks with plain lines in the place of a bar of Lightning's; others stay."""
    bars = (TQDMProgressBar, RichProgressBar)
    return [PlainProgress() if type(own) in bars else own for own in callbacks]


class PlainProgress(ProgressBar):
    """Says in plain lines how far a stage is; a stage of a few seconds says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._training: Meter | None = None
        self._evaluation: Meter | None = None

    def enable(self) -> None:
        """Report again."""
        self.is_enabled = True

    def disable(self) -> None:
        """Report nothing, as on other ranks than the first."""
        self.is_enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where a checkpoint has ended."""
        share = _trained_share(trainer)
        self._training = Meter("training", math.inf if share is None else 1.0, share or 0.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Report the step, the metrics of the bar and the time left."""
        if not self.is_enabled or self._training is None:
            return
        if self._training.is_due():  # metrics on a GPU make the host wait
            metrics = self.get_metrics(trainer, pl_module).items()
            numbers = [f"{key} {value:.4g}" for key, value in metrics if isinstance(value, float)]
            detail = ", ".join([f"step {trainer.global_step}", *numbers])
            self._training.reach(_trained_share(trainer) or 0.0, detail)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a validation."""
        self._evaluation = Meter("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a test."""
        self._evaluation = Meter("test", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a prediction."""
        self._evaluation = Meter("prediction", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        if self.is_enabled and self._evaluation is not None:
            self._evaluation.advance()

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end


def _trained_share(trainer: pl.Trainer) -> float | None:
    """Return the share of the training that is done, None if it has no end in steps or epochs."""
    shares = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    if epochs > 0 and math.isfinite(batches) and batches > 0:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches
        shares.append((trainer.current_epoch + done) / epochs)
    return max(shares, default=None)

"""Callbacks of every run from the command line; private, so that no help lists them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_fanions.cli.messages import print_warning

# Arguments of one call, which a saved recipe leaves out.
_CALL_ARGUMENTS = {
    *("config", "ckpt_path", "weights_only", "verbose", "return_predictions", "allow_untrained")
}


class WatchProgress(Callback):
    """Knows whether a batch was run, and keeps the progress bar right after a resume."""

    def __init__(self) -> None:
        self.has_begun = False
        self.checkpoint: str | None = None  # the one asked for

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start from scratch where `last` found no checkpoint."""
        if self.checkpoint == "last" and trainer.ckpt_path is None:
            raise MisconfigurationException(
                "--ckpt_path last looks in this run's own folder only, which has no checkpoint: "
                "give the path of one, or leave --ckpt_path out to start from scratch"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Give the progress bar of an epoch that is resumed in its middle its length.

        Lightning sets it when an epoch starts, and this one started before the checkpoint.
        """
        self.has_begun = True
        callback = trainer.progress_bar_callback
        if not isinstance(callback, TQDMProgressBar) or not callback.is_enabled:
            return
        bar, total = callback.train_progress_bar, callback.total_train_batches
        if bar.total is None and math.isfinite(total):
            bar.total = total
            bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note that the run has begun."""
        self.has_begun |= not trainer.sanity_checking

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]


class ReportRestoredOptions(Callback):
    """Warns where a resumed optimizer runs with other options than the configured ones.

    A checkpoint restores the options of every parameter group with its state.
    """

    def __init__(self) -> None:
        self._configured: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the configured options: nothing is restored yet."""
        self._configured = _group_options(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the configured options with the restored ones."""
        if trainer.ckpt_path:
            for line in _differences(self._configured, _group_options(trainer)):
                print_warning(line)


class SaveLastStep(Callback):
    """Lets last.ckpt hold the end of a fit that ends between two saves."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it again, for every ModelCheckpoint with save_last."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last is True:
                saved = getattr(callback, "_last_global_step_saved", trainer.global_step)
                if callback.last_model_path and saved != trainer.global_step:
                    trainer.save_checkpoint(
                        callback.last_model_path, weights_only=callback.save_weights_only
                    )


class SaveRecipe(SaveConfigCallback):
    """Saves the configuration without the arguments of one call, such as the checkpoint.

    The file beside the logs is then a recipe that every subcommand accepts.
    """

    def __init__(self, parser: Any, config: Namespace, *args: Any, **kwargs: Any) -> None:
        recipe = config.clone()
        for name in _CALL_ARGUMENTS:
            recipe.pop(name, None)
        super().__init__(parser, recipe, *args, **kwargs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save it, unless there is no logger: that would put it into the working directory."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def _group_options(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the options of every parameter group, before any schedule."""
    return [
        {
            name: group.get(f"initial_{name}", value)
            for name, value in group.items()
            if name not in ("params", "param_names") and not name.startswith("initial_")
        }
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    ]


def _differences(
    configured: Sequence[Mapping[str, Any]], restored: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a line for every option that a checkpoint sets to another value."""
    for index, (ours, theirs) in enumerate(zip(configured, restored, strict=False)):
        for name in ours:
            if name in theirs and ours[name] != theirs[name]:
                yield (
                    f"group {ours.get('name', index)}: {name} {theirs[name]} from the checkpoint "
                    f"is used, not the configured {ours[name]}"
                )

"""Resuming with whole optimizer steps, also with another number of micro-batches per step."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


def at_whole_step(progress: dict[str, Any], old: int, new: int) -> tuple[dict[str, Any], bool]:
    """Rewrite the progress of a fit so that it is resumed with a whole optimizer step.

    Args:
        progress: State of Lightning's count of batches: ready, started, processed and completed,
            in "current" (the epoch) and "total"; and "is_last_batch".
        old: Number of micro-batches per step when the progress was saved.
        new: Number of micro-batches per step from now on.

    Returns:
        The progress without an unfinished step, and whether there was one.
    """
    epoch, total = progress["current"], progress["total"]
    between_batches = all(
        count["ready"] == count["started"] == count["processed"] for count in (epoch, total)
    )
    # The last batch of an epoch always ends a step, also where limit_train_batches cuts it short.
    whole = between_batches and (epoch["processed"] % old == 0 or progress["is_last_batch"])
    if whole and old == new:
        return progress, False
    earlier = total["processed"] - epoch["processed"]
    if old != new:
        earlier = earlier // old * new
    reached = epoch["processed"] // old * new
    # A checkpoint saved at the end of a batch does not count that batch as completed yet. An
    # unfinished step is replaced by the state that the end of the last whole step would have saved.
    pending = total["processed"] - total["completed"] if whole else 1

    def count(batches: int) -> dict[str, int]:
        return {
            **dict.fromkeys(("ready", "started", "processed"), batches),
            "completed": batches - pending,
        }

    counts = {"current": count(reached), "total": count(earlier + reached)}
    return {**counts, "is_last_batch": whole and progress["is_last_batch"]}, not whole


class WholeSteps(Callback):
    """Translates a trainer's counts of batches between numbers of micro-batches per step.

    A data module adds it to the trainer, where it stays from fit to fit. It remembers which
    settings the data module made, so that the next fit starts from the user's own settings; and it
    translates the progress in a checkpoint before Lightning's loops read it.
    """

    SETTINGS = ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch")

    def __init__(self) -> None:
        self._by_user: dict[str, Any] = {}
        self._applied: dict[str, Any] = {}

    @classmethod
    def attached_to(cls, trainer: pl.Trainer) -> "WholeSteps":
        """Return the trainer's callback of this class, added if it has none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((c for c in callbacks if isinstance(c, cls)), None)
        if found is None:
            callbacks.append(found := cls())
        return found

    def user_settings(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return the settings as the user made them; None for one that the trainer lacks."""
        # The trainer lacks val_check_interval if the user gave a time.
        now = {name: getattr(trainer, name, None) for name in self.SETTINGS}
        return {
            name: self._by_user[name] if self._applied and value == self._applied[name] else value
            for name, value in now.items()
        }

    def apply(self, trainer: pl.Trainer, **settings: Any) -> None:
        """Set these settings for the next fit, and the other ones to the user's values."""
        self._by_user = self.user_settings(trainer)
        before, self._applied = self._applied, {**self._by_user, **settings}
        for name, value in self._applied.items():
            if getattr(trainer, name, None) != value:
                setattr(trainer, name, value)
        old, new = (made.get("accumulate_grad_batches") for made in (before, self._applied))
        if old is not None and new is not None and old != new:  # earlier fits counted in the old
            total = trainer.fit_loop.epoch_loop.batch_progress.total
            counts = total.state_dict().items()
            total.load_state_dict({name: count // old * new for name, count in counts})

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Translate the progress in the checkpoint of a fit with the same data module."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        saved = checkpoint.get(type(data).__qualname__, {}).get("accumulate_grad_batches")
        if saved is None or not trainer.training:
            return
        loop, name = checkpoint["loops"]["fit_loop"], "epoch_loop.batch_progress"  # both private
        loop[name], unfinished = at_whole_step(loop[name], saved, trainer.accumulate_grad_batches)
        # Lightning counts a step that it finds saved at its end once more for the loggers.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= unfinished

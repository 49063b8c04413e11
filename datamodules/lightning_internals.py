"""Private interfaces of Lightning that the data modules use, each with the reason.

tests/datamodules/test_lightning_internals.py fails with a version of Lightning that lacks one.
"""

from typing import Any

from lightning.pytorch import Trainer

# The count of batches in a checkpoint, nested as Lightning's loops are. A data module that changes
# the number of micro-batches per step has to translate it, and no public hook gives it.
_FIT_LOOP = "fit_loop"
_PROGRESS = "epoch_loop.batch_progress"
_STATE, _LOGGED_STEPS = "epoch_loop.state_dict", "_batches_that_stepped"


def batches_trained(trainer: Trainer) -> int:
    """Return how many batches all fits of a trainer have trained on.

    current_epoch and batch_idx, which are public, are stale after a checkpoint that was saved at
    the end of a fit; this count is right in every checkpoint.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def rescale_batches_trained(trainer: Trainer, old: int, new: int) -> None:
    """Convert the trainer's total counts of batches from ``old`` to ``new`` batches per step."""
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    total.load_state_dict({name: count // old * new for name, count in total.state_dict().items()})


def saved_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the count of batches in a checkpoint of a fit."""
    return checkpoint["loops"][_FIT_LOOP][_PROGRESS]


def replace_progress(checkpoint: dict[str, Any], progress: dict[str, Any], undone: int) -> None:
    """Replace the count of batches in a checkpoint.

    Args:
        checkpoint: The checkpoint, changed in place.
        progress: The new count.
        undone: Number of unfinished optimizer steps that are taken back; Lightning counts a step
            that it finds saved at its end once more for the loggers.
    """
    loop = checkpoint["loops"][_FIT_LOOP]
    loop[_PROGRESS] = progress
    loop[_STATE][_LOGGED_STEPS] -= undone

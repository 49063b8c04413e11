"""How many optimizer steps a Lightning Trainer will take, for schedules that end with the run.

Beside ``schedules``, which need no Trainer.
"""

from __future__ import annotations

import math
from typing import Any


def steps_left(trainer: Any) -> int:
    """Return how many optimizer steps a Lightning Trainer will take after the batch it is at.

    Counted from where the trainer stands, with the accumulation of every epoch to come, because
    what it depends on may change during a run: trials of BatchSizeFinder and lr_find set their own
    ``max_steps``, loaders are reloaded with another length, and a resumed run may have another
    batch size or number of devices. Meaningful at the end of a training batch.

    Args:
        trainer: A Trainer of ``lightning.pytorch`` or ``pytorch_lightning`` that is fitting.

    Raises:
        ValueError: If the run has no end that can be computed.
    """
    bounds = []
    if trainer.max_steps != -1:
        # Under manual optimization, global_step counts the steps of every optimizer.
        automatic = getattr(trainer.lightning_module, "automatic_optimization", True)
        steppers = 1 if automatic else max(1, len(trainer.optimizers))
        bounds.append((trainer.max_steps - trainer.global_step) // steppers)
    if trainer.max_epochs != -1:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        if trainer.num_training_batches != math.inf:
            bounds.append(_steps_left_in_epochs(trainer))
    if not bounds:
        raise ValueError(
            "the schedule needs the number of steps of the run, which a Trainer cannot tell for a "
            "loader without a length or an endless run: set trainer.max_steps"
        )
    return max(0, min(bounds))


def _steps_left_in_epochs(trainer: Any) -> int:
    """Return the optimizer steps left before ``max_epochs``, accumulation taken into account."""
    # By method, not by class: Lightning has two names, and the class exists once under each.
    by_epoch = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]

    def steps(batches: int, epoch: int) -> int:
        accumulate = trainer.accumulate_grad_batches
        if by_epoch:
            accumulate = by_epoch[-1].get_accumulate_grad_batches(epoch)
        return math.ceil(batches / accumulate)

    batches, current = trainer.num_training_batches, trainer.current_epoch
    begun = min(batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    epochs = range(current + 1, trainer.max_epochs)
    # Schedules ask after every step: one product where all epochs are alike.
    later = (
        sum(steps(batches, epoch) for epoch in epochs)
        if by_epoch
        else len(epochs) * steps(batches, current)
    )
    return steps(batches, current) - steps(begun, current) + later

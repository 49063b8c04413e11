"""Loaders that a Trainer resumes exactly, and what a data module asks of its trainer."""

import os
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, Generic, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_fanions.checks import whole_number

T = TypeVar("T")


class EpochLoader(Generic[T]):
    """Iterable over one rank's batches, in place of a DataLoader in a Lightning Trainer.

    Each iteration is an epoch. Lightning shards only DataLoaders, so ``batches`` yields this
    rank's part. The length is known, so that a Trainer prefetches nothing: a saved position is the
    number of batches yielded, and a loader that loads it continues with the next one.

    Args:
        batches: Function of epoch and first batch (both from 0) that returns the epoch's batches
            from that one on.
        length: Number of batches of an epoch.
        progress: Function that returns the position of a fit, (epoch, batches done), or None if no
            trainer is fitting. It overrides the loader's own count, because it is right after
            every kind of checkpoint and for a batch that was yielded but never trained on.
    """

    def __init__(
        self,
        batches: Callable[[int, int], Iterator[T]],
        length: int,
        progress: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        self.batches, self.length, self.progress = batches, length, progress
        self.epoch = 0
        self.position = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[T]:
        """Yield the batches of an epoch."""
        # A generator, so nothing here runs before the first batch is taken: by then a trainer has
        # restored its progress, however often it called iter() before.
        own = (self.epoch + 1, 0) if self.position and not self._resumed else None
        self.epoch, self.position = self.progress() or own or (self.epoch, self.position)
        self._resumed = False
        batches = self.batches(self.epoch, self.position)
        for done, batch in enumerate(batches, self.position + 1):
            self.position = done
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were yielded."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the next iteration at the saved position."""
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        if self.position >= self.length:
            self.epoch, self.position = self.epoch + 1, 0
        self._resumed = True


def repeated(batch: T, times: int, trainer: Trainer | None) -> EpochLoader[T]:
    """Return a loader that yields one batch, the whole of a small set, ``times`` per epoch."""
    return EpochLoader(
        lambda epoch, first: repeat(batch, times - first), times, lambda: fit_progress(trainer)
    )


def fit_progress(trainer: Trainer | None) -> tuple[int, int] | None:
    """Return the position of a fit, (epoch, batches done in it), or None without a fit.

    With overfit_batches the epoch is always 0, so that every epoch has the same batches. Lightning
    switches shuffling off by replacing the sampler, which an ``EpochLoader`` has none of.
    """
    if trainer is None or not trainer.training:
        return None
    # Private: current_epoch and batch_idx, which are public, are stale after a checkpoint that was
    # saved at the end of a fit; this count of all fits' batches is right in every checkpoint.
    trained = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    epoch, done = divmod(trained, int(trainer.num_training_batches))
    overfits = trainer.overfit_batches > 0  # type: ignore[attr-defined]
    return 0 if overfits else epoch, done


def warn_if_changed(saved: dict[str, Any] | None, recipe: dict[str, Any]) -> None:
    """Warn if a checkpoint's batches depended on something else than this run's."""
    if saved not in (None, recipe):
        rank_zero_warn(
            f"Resuming with {recipe}, while the checkpoint was made with {saved}: the batches "
            "differ from the uninterrupted run's."
        )


def rank_and_world(trainer: Trainer | None) -> tuple[int, int]:
    """Return this process' rank and the number of processes, (0, 1) without a trainer."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def resolve_seed(seed: int | None) -> int:
    """Return the seed; for None the seed of seed_everything, or 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def checked_seed(seed: int | None) -> int | None:
    """Return a seed option, refused with a ValueError if it is neither None nor non-negative."""
    return None if seed is None else whole_number("seed", seed, 0)

"""What the data modules hand to a Trainer: loaders that resume exactly."""

import os
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Generic, TypeVar

from lightning.pytorch import Trainer

T = TypeVar("T")


class EpochLoader(Generic[T]):
    """Iterable over one rank's batches, which stands in for a DataLoader in a Lightning Trainer.

    Each iteration is an epoch. Lightning shards only DataLoaders, so ``batches`` hands out what
    belongs to this rank. The length is known, so that a Trainer fetches nothing ahead: a saved
    position is the number of batches handed out, and a loader that loads it goes on with the next.

    Args:
        batches: Epoch and first batch (both from 0) -> the epoch's batches from that one on.
        length: Number of batches of an epoch.
        progress: Where a trainer stands, (epoch, batches done), None where no trainer is fitting.
            It rules over the loader's own count: it is right after every kind of checkpoint, and
            for a batch that was handed out but never trained on.
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
        # A generator: nothing here runs before the first batch is asked for, and by then a
        # trainer has restored its progress, however often it called iter() on the way.
        own = (self.epoch + 1, 0) if self.position and not self._resumed else None
        self.epoch, self.position = self.progress() or own or (self.epoch, self.position)
        self._resumed = False
        batches = self.batches(self.epoch, self.position)
        for done, batch in enumerate(batches, self.position + 1):
            self.position = done
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration go on where the saved one stood."""
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        if self.position >= self.length:
            self.epoch, self.position = self.epoch + 1, 0
        self._resumed = True


def repeated(batch: T, times: int, trainer: Trainer | None) -> EpochLoader[T]:
    """One batch, all of a small set, again and again.

    Args:
        batch: On the device where it is wanted.
        times: How often an epoch has it: an epoch that is a single step would cost more than that.
        trainer: Whose progress rules; None: without one.
    """
    return EpochLoader(
        lambda epoch, first: repeat(batch, times - first), times, lambda: fit_progress(trainer)
    )


def fit_progress(trainer: Trainer | None) -> tuple[int, int] | None:
    """Where a fit stands: (epoch, batches done in it), None if the trainer is not fitting."""
    if trainer is None or not trainer.training:
        return None
    # Not current_epoch and batch_idx: those are stale after a checkpoint saved at the end of a
    # fit. The number of batches trained on is right in every checkpoint.
    done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return divmod(done, int(trainer.num_training_batches))


def rank_and_world(trainer: Trainer | None) -> tuple[int, int]:
    """This process' rank and the number of processes, (0, 1) without a trainer."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def resolve_seed(seed: int | None) -> int:
    """The seed; for None that of seed_everything, 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

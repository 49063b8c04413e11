"""Image sets that live on the training device and are augmented a whole epoch at a time.

A small image set fits into any accelerator's memory, and picking, cropping and flipping all of it
is a handful of tensor operations, so no DataLoader, worker or copy stands between two steps. Below:
pure functions that make an epoch out of a set of images and batches out of the epoch, then the
LightningDataModule that the data sets share.

Every random choice of an epoch is a function of (seed, epoch) and is drawn on the CPU: all devices
and all ranks see the same stream, and an epoch can be entered anywhere.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.loader import EpochLoader, fit_progress, rank_and_world, resolve_seed

Batch = tuple[Tensor, Tensor]
Flip = Literal["alternating", "random", "none"]
Split = Literal["train", "test"]


# --- augmentation: pure functions over (n, channels, height, width) ---


def reflect_pad(images: Tensor, margin: int) -> Tensor:
    """Extend images by their own reflection, the edge pixel itself not repeated.

    Args:
        images: Any dtype, (n, channels, height, width).
        margin: Pixels added on each side; less than the height and the width.

    Returns:
        (n, channels, height + 2 margin, width + 2 margin).
    """

    def reflected(size: int) -> Tensor:
        position = torch.arange(-margin, size + margin, device=images.device).abs()
        return size - 1 - (size - 1 - position).abs()

    height, width = images.shape[-2:]
    return images[:, :, reflected(height)][:, :, :, reflected(width)]


def crop(images: Tensor, index: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Cut one square window out of each chosen image.

    Args:
        images: (n, channels, height, width).
        index: Which image, int64 (k,).
        top: First row of the window, int64 (k,).
        left: First column of the window, int64 (k,).
        size: Height and width of the window in pixels.

    Returns:
        (k, channels, size, size).
    """
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view: no copy is made
    return windows[index, :, top, left]


def mirror(images: Tensor, mask: Tensor) -> Tensor:
    """Flip the images where ``mask``, bool (n,), is true left to right."""
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def cut_out(images: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor) -> Tensor:
    """Paint one square of each image over.

    Args:
        images: (n, channels, height, width).
        top: First row of the square, int64 (n,).
        left: First column of the square, int64 (n,).
        size: Height and width of the square in pixels.
        fill: The colour, (channels,), dtype of the images.

    Returns:
        (n, channels, height, width).
    """

    def inside(first: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - first[:, None]
        return (offset >= 0) & (offset < size)

    height, width = images.shape[-2:]
    square = inside(top, height)[:, :, None] & inside(left, width)[:, None, :]
    return torch.where(square[:, None], fill[:, None, None], images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring uint8 images to zero mean and unit deviation.

    Args:
        images: uint8 (n, channels, height, width).
        mean: Per channel in [0, 1], (channels,).
        std: Per channel in [0, 1], (channels,).

    Returns:
        float32 (n, channels, height, width), channels last in memory.
    """
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return pixels.sub_(255 * mean[:, None, None]).div_(255 * std[:, None, None])


@dataclass(frozen=True)
class Draw:
    """The random choices of one epoch over n examples; all but ``order`` are per example.

    Attributes:
        order: Permutation of the examples, int64 (n,).
        mirrored: bool (n,).
        top: First row of the window in the padded image, int64 (n,).
        left: First column of the window in the padded image, int64 (n,).
        hole_top: First row of the painted square, int64 (n,).
        hole_left: First column of the painted square, int64 (n,).
    """

    order: Tensor
    mirrored: Tensor
    top: Tensor
    left: Tensor
    hole_top: Tensor
    hole_left: Tensor


def draw_epoch(
    count: int, size: int, *, seed: int, epoch: int, flip: Flip, translate: int, cutout: int
) -> Draw:
    """Draw one epoch's choices on the CPU, as a function of the arguments alone.

    With "alternating", a coin decides once per example whether it starts mirrored, and every
    odd epoch (counted from 0) shows all of them the other way round (airbench).

    Args:
        count: Number of examples.
        size: Height and width of an image in pixels.
        seed: Any non-negative integer.
        epoch: Counted from 0.
        flip: How examples are mirrored.
        translate: Largest shift in pixels, up, down, left and right.
        cutout: Height and width of the painted square in pixels; it lies inside the image.
    """
    # Stream 0 is the run's, stream 1 + e is epoch e's. Everything is drawn whether used or not,
    # so that switching one augmentation on leaves the others as they were.
    once = np.random.default_rng((seed, 0))
    rng = np.random.default_rng((seed, 1 + epoch))
    order = rng.permutation(count)
    coin = rng.random(count) < 0.5
    shift = rng.integers(0, 2 * translate + 1, size=(2, count))
    hole = rng.integers(0, size - cutout + 1, size=(2, count))
    mirrored = {
        "alternating": (once.random(count) < 0.5) ^ (epoch % 2 == 1),
        "random": coin,
        "none": np.zeros(count, dtype=bool),
    }[flip]
    return Draw(*map(torch.from_numpy, (order, mirrored, *shift, *hole)))


def rank_share(order: Tensor, batch_size: int, rank: int, world_size: int) -> Tensor:
    """One rank's part of each global batch, in order; the last partial batch is dropped.

    Args:
        order: int64 (n,).
        batch_size: Examples of a global batch, divisible by ``world_size``.
        rank: Which part.
        world_size: Number of parts.

    Returns:
        int64 (n // batch_size * batch_size / world_size,).
    """
    whole = order[: len(order) // batch_size * batch_size]
    return whole.view(-1, world_size, batch_size // world_size)[:, rank].flatten()


def train_epoch(
    images: Tensor,
    labels: Tensor,
    fill: Tensor,
    epoch: int,
    *,
    seed: int,
    batch_size: int,
    flip: Flip,
    translate: int,
    cutout: int,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Make one rank's augmented epoch, its examples in the order of the batches.

    Args:
        images: uint8 (n, channels, size + 2 translate, size + 2 translate), already padded.
        labels: int64 (n,).
        fill: Colour that cutout paints with, uint8 (channels,).
        epoch: Counted from 0.
        seed: See ``draw_epoch``, as for flip, translate and cutout.
        batch_size: Examples of a global batch.
        flip: "alternating", "random" or "none".
        translate: Pixels.
        cutout: Pixels.
        rank: Which part of each global batch.
        world_size: Number of parts.

    Returns:
        uint8 (m, channels, size, size) and int64 (m,).
    """
    size = images.shape[-1] - 2 * translate
    draw = draw_epoch(
        len(images),
        size,
        seed=seed,
        epoch=epoch,
        flip=flip,
        translate=translate,
        cutout=cutout,
    )
    share = rank_share(draw.order, batch_size, rank, world_size)

    def chosen(choice: Tensor) -> Tensor:
        return choice[share].to(images.device, non_blocking=True)

    index = share.to(images.device, non_blocking=True)
    augmented = crop(images, index, chosen(draw.top), chosen(draw.left), size)
    if flip != "none":
        augmented = mirror(augmented, chosen(draw.mirrored))
    if cutout:
        hole_top, hole_left = chosen(draw.hole_top), chosen(draw.hole_left)
        augmented = cut_out(augmented, hole_top, hole_left, cutout, fill)
    return augmented, labels[index]


def split_epoch(
    images: Tensor, labels: Tensor, length: int, first: int, mean: Tensor, std: Tensor
) -> Iterator[Batch]:
    """Split an epoch into batches, evenly to within one example.

    Args:
        images: uint8 (n, channels, height, width).
        labels: int64 (n,).
        length: Number of batches.
        first: The batch to begin with.
        mean: See ``normalize``.
        std: See ``normalize``.

    Yields:
        float32 images (b, channels, height, width) and int64 labels (b,).
    """
    parts = zip(images.tensor_split(length), labels.tensor_split(length), strict=True)
    for pixels, targets in islice(parts, first, None):
        yield normalize(pixels, mean, std), targets


# --- the DataModule ---


class ImageDataModule(LightningDataModule):
    """A set of small square images on the training device; subclasses read it from somewhere.

    Batches are float32 (batch, channels, size, size), normalised, channels last, with int64
    labels. ``batch_size`` is that of the global batch: each of w ranks gets batch_size / w
    different examples of it. Validation, test and prediction all use the test split, without
    augmentation, in its order, each example exactly once over all ranks.

    Attributes:
        mean: Of the training images in [0, 1], per channel.
        std: Likewise.
        size: Height and width of an image in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size = 32

    def __init__(
        self,
        batch_size: int,
        flip: Flip,
        translate: int,
        cutout: int,
        seed: int | None,
        show_images: int,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        if flip not in get_args(Flip):
            raise ValueError(f"flip={flip!r}: choose one of {', '.join(get_args(Flip))}")
        if not 0 <= translate < self.size:
            raise ValueError(f"translate={translate}: choose 0 to {self.size - 1} pixels")
        if not 0 <= cutout <= self.size:
            raise ValueError(f"cutout={cutout}: choose 0 to {self.size} pixels")
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed}: it must not be negative")
        if show_images < 0:
            raise ValueError(f"show_images={show_images}: it must not be negative")
        self.batch_size, self.seed, self.show_images = batch_size, seed, show_images
        self.flip: Flip = flip
        self.translate, self.cutout = translate, cutout
        self._splits: dict[Split, Batch] = {}
        self._saved_recipe: dict[str, Any] | None = None

    def read(self, split: Split) -> Batch:
        """Read one split: uint8 (n, channels, size, size) and int64 labels (n,) on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must implement read(split)")

    # -- Lightning's hooks --

    def setup(self, stage: str | None = None) -> None:
        """Put what the stage needs onto the trainer's device, or the CPU without a trainer."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        needed: tuple[Split, ...] = ("train", "test") if stage in ("fit", None) else ("test",)
        for split in needed:
            images, labels = self._splits.get(split) or self.read(split)
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            self._splits[split] = images, labels.to(device)

    def train_dataloader(self) -> EpochLoader[Batch]:
        """This rank's augmented training batches.

        Raises:
            ValueError: If the batch does not split evenly over the ranks, or is larger than the
                training set.
        """
        images, labels = self._split("train")
        rank, world_size = rank_and_world(self.trainer)
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size={self.batch_size} is that of the global batch and does not split "
                f"evenly over {world_size} ranks: choose a multiple of {world_size}"
            )
        if self.batch_size > len(images):
            raise ValueError(
                f"batch_size={self.batch_size}: choose at most {len(images)}, the number of "
                "training images"
            )
        recipe = self._recipe()
        if self._saved_recipe not in (None, recipe):
            rank_zero_warn(
                f"Resuming with {recipe}, while the checkpoint was made with "
                f"{self._saved_recipe}: the batches differ from the uninterrupted run's."
            )
        mean, std = self._statistics(images.device)
        fill = (255 * mean).round().to(torch.uint8)
        padded = reflect_pad(images, self.translate)

        def source(epoch: int) -> Batch:
            return train_epoch(
                padded, labels, fill, epoch, rank=rank, world_size=world_size, **recipe
            )

        length = len(images) // self.batch_size

        def batches(epoch: int, first: int) -> Iterator[Batch]:
            return split_epoch(*source(epoch), length, first, mean, std)

        if self.show_images:
            self._show(source(0)[0][: self.show_images])
        return EpochLoader(batches, length, lambda: fit_progress(self.trainer))

    def val_dataloader(self) -> EpochLoader[Batch]:
        """This rank's share of the test split."""
        images, labels = self._split("test")
        rank, world_size = rank_and_world(self.trainer)
        # Every rank gets the same number of batches; their sizes differ by at most one.
        share = images[rank::world_size], labels[rank::world_size]
        mean, std = self._statistics(images.device)
        length = math.ceil(len(images) / self.batch_size)
        return EpochLoader(
            lambda epoch, first: split_epoch(*share, length, first, mean, std), length
        )

    def test_dataloader(self) -> EpochLoader[Batch]:
        """The same as ``val_dataloader``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EpochLoader[Batch]:
        """The same as ``val_dataloader``: images with their labels."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """What the training batches depend on; a resumed run is told where it differs."""
        return self._recipe()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint was trained with, for the comparison."""
        self._saved_recipe = state_dict

    # -- for models --

    def training_images(self, n: int) -> Tensor:
        """The first ``n`` training images (all, if there are fewer), normalised, not augmented.

        Returns:
            float32 (n, channels, size, size) on the device of the set.
        """
        images = self._split("train")[0][:n]
        return normalize(images, *self._statistics(images.device))

    # -- private --

    def _split(self, split: Split) -> Batch:
        if split not in self._splits:
            stage = "fit" if split == "train" else "test"
            raise RuntimeError(f"the {split} images are not loaded: call setup({stage!r}) first")
        return self._splits[split]

    def _recipe(self) -> dict[str, Any]:
        return {
            "seed": resolve_seed(self.seed),
            "batch_size": self.batch_size,
            "flip": self.flip,
            "translate": self.translate,
            "cutout": self.cutout,
        }

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)

    def _show(self, images: Tensor) -> None:
        if self.trainer is None or not self.trainer.is_global_zero:
            return
        from torchvision.utils import make_grid

        grid = make_grid(images.cpu(), nrow=math.ceil(len(images) ** 0.5))
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("train/images", grid, self.trainer.global_step)

"""An epoch of augmented images at a time, as pure functions of tensors on any device.

A small image set fits into any accelerator's memory, and picking, cropping and flipping all of it
is a handful of tensor operations, so no DataLoader, worker or copy stands between two steps. Every
random choice of an epoch is a function of (seed, epoch) and is drawn on the CPU: all devices and
all ranks get the same choices, and a resumed run can start at any batch of an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
Flip = Literal["alternating", "random", "none"]


@dataclass(frozen=True)
class ImageRecipe:
    """What the training batches depend on beside the images.

    Attributes:
        seed: Non-negative seed of order and augmentation.
        batch_size: Number of examples of a global batch.
        flip: How images are mirrored: "alternating", a coin decides once per example whether it
            starts mirrored, and every odd epoch (from 0) shows all of them the other way round, as
            in airbench; "random", a coin per example and epoch; "none".
        translate: Largest shift in pixels, up, down, left and right.
        cutout: Height and width of the painted square in pixels; it lies inside the image.
    """

    seed: int
    batch_size: int
    flip: Flip
    translate: int
    cutout: int


# --- operations on (n, channels, height, width) ---


def reflect_pad(images: Tensor, margin: int) -> Tensor:
    """Extend images by ``margin`` reflected pixels on each side, without repeating the edge."""

    def reflected(size: int) -> Tensor:
        position = torch.arange(-margin, size + margin, device=images.device).abs()
        return size - 1 - (size - 1 - position).abs()

    height, width = images.shape[-2:]
    return images[:, :, reflected(height)][:, :, :, reflected(width)]


def crop(images: Tensor, index: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Cut a square window at (top, left) out of each chosen image: (k, channels, size, size).

    ``index``, ``top`` and ``left`` are int64 (k,).
    """
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view: no copy is made
    return windows[index, :, top, left]


def mirror(images: Tensor, mask: Tensor) -> Tensor:
    """Flip the images where ``mask``, bool (n,), is true left to right."""
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def cut_out(images: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor) -> Tensor:
    """Paint a square at (top, left), int64 (n,), of each image in the colour ``fill``."""

    def inside(first: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - first[:, None]
        return (offset >= 0) & (offset < size)

    height, width = images.shape[-2:]
    square = inside(top, height)[:, :, None] & inside(left, width)[:, None, :]
    return torch.where(square[:, None], fill[:, None, None], images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bring uint8 images to mean 0 and deviation 1: float32, channels last in memory.

    ``mean`` and ``std`` are per channel, of intensities from 0 to 1.
    """
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return pixels.sub_(255 * mean[:, None, None]).div_(255 * std[:, None, None])


# --- an epoch ---


@dataclass(frozen=True)
class Draw:
    """The random choices of one epoch over n examples; all but ``order`` are per example."""

    order: Tensor  # permutation of the examples, int64 (n,)
    mirrored: Tensor  # bool (n,)
    top: Tensor  # first row of the window in the padded image, int64 (n,)
    left: Tensor
    hole_top: Tensor  # first row of the painted square, int64 (n,)
    hole_left: Tensor


def draw_epoch(count: int, size: int, epoch: int, recipe: ImageRecipe) -> Draw:
    """Draw an epoch's choices for ``count`` images on the CPU, from the arguments alone."""
    # Random stream 0 belongs to the run, stream 1 + e to epoch e. Everything is drawn whether used
    # or not, so that switching one augmentation on does not change the others.
    run_rng = np.random.default_rng((recipe.seed, 0))
    epoch_rng = np.random.default_rng((recipe.seed, 1 + epoch))
    order = epoch_rng.permutation(count)
    coin = epoch_rng.random(count) < 0.5
    shift = epoch_rng.integers(0, 2 * recipe.translate + 1, size=(2, count))
    hole = epoch_rng.integers(0, size - recipe.cutout + 1, size=(2, count))
    mirrored = {
        "alternating": (run_rng.random(count) < 0.5) ^ (epoch % 2 == 1),
        "random": coin,
        "none": np.zeros(count, dtype=bool),
    }[recipe.flip]
    return Draw(*map(torch.from_numpy, (order, mirrored, *shift, *hole)))


def rank_share(order: Tensor, batch_size: int, rank: int, world_size: int) -> Tensor:
    """Return one rank's part of each global batch, in order; the last partial batch is dropped.

    ``batch_size`` is that of the global batch, divisible by ``world_size``.
    """
    whole = order[: len(order) // batch_size * batch_size]
    return whole.view(-1, world_size, batch_size // world_size)[:, rank].flatten()


def train_epoch(
    images: Tensor,
    labels: Tensor,
    fill: Tensor,
    epoch: int,
    recipe: ImageRecipe,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Make one rank's augmented epoch, its examples in the order of the batches.

    Args:
        images: uint8 (n, channels, size + 2 translate, size + 2 translate), already padded.
        labels: int64 (n,).
        fill: Colour that cutout paints with, uint8 (channels,).
        epoch: Number of the epoch, from 0.
        recipe: Seed, batch size and augmentation.
        rank: Rank of the process.
        world_size: Number of processes.
    """
    size = images.shape[-1] - 2 * recipe.translate
    draw = draw_epoch(len(images), size, epoch, recipe)
    share = rank_share(draw.order, recipe.batch_size, rank, world_size)

    def chosen(choice: Tensor) -> Tensor:
        return choice[share].to(images.device, non_blocking=True)

    index = share.to(images.device, non_blocking=True)
    augmented = crop(images, index, chosen(draw.top), chosen(draw.left), size)
    if recipe.flip != "none":
        augmented = mirror(augmented, chosen(draw.mirrored))
    if recipe.cutout:
        hole_top, hole_left = chosen(draw.hole_top), chosen(draw.hole_left)
        augmented = cut_out(augmented, hole_top, hole_left, recipe.cutout, fill)
    return augmented, labels[index]


def split_epoch(
    images: Tensor, labels: Tensor, length: int, first: int, mean: Tensor, std: Tensor
) -> Iterator[Batch]:
    """Yield ``length`` normalised batches, even to within one example, from number ``first`` on."""
    parts = zip(images.tensor_split(length), labels.tensor_split(length), strict=True)
    for pixels, targets in islice(parts, first, None):
        yield normalize(pixels, mean, std), targets

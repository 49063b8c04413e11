"""The LightningDataModule of image sets that stay on the training device."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from datamodules import augmentation, loader
from datamodules.augmentation import Batch, Flip, ImageRecipe
from datamodules.loader import EpochLoader, fit_progress, rank_and_world, resolve_seed
from lit_fanions.checks import check_choice, whole_number

Split = Literal["train", "test"]


class ImageDataModule(LightningDataModule):
    """A set of small square images on the training device; subclasses say where it comes from.

    Batches are float32 (batch, channels, size, size), normalised, channels last, with int64
    labels. ``batch_size`` counts the global batch: each of w ranks gets batch_size / w different
    examples of it. Validation, test and prediction all use the test split, without augmentation,
    in its order, each example exactly once over all ranks. With the trainer's overfit_batches,
    every epoch has the batches of the first one, augmentation included.

    Attributes:
        mean: Mean of the training images per channel, in [0, 1].
        std: Standard deviation of the training images per channel, in [0, 1].
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
        check_choice("flip", flip, get_args(Flip))
        if whole_number("translate", translate, 0) >= self.size:
            raise ValueError(f"translate={translate}: choose 0 to {self.size - 1} pixels")
        if whole_number("cutout", cutout, 0) > self.size:
            raise ValueError(f"cutout={cutout}: choose 0 to {self.size} pixels")
        self.batch_size = whole_number("batch_size", batch_size)
        self.seed = loader.checked_seed(seed)
        self.show_images = whole_number("show_images", show_images, 0)
        self.flip: Flip = flip
        self.translate, self.cutout = translate, cutout
        self._splits: dict[Split, Batch] = {}
        self._saved_recipe: dict[str, Any] | None = None

    def read(self, split: Split) -> Batch:
        """Read one split: uint8 (n, channels, size, size) and int64 labels (n,) on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must implement read(split)")

    # -- Lightning's hooks --

    def setup(self, stage: str | None = None) -> None:
        """Move the splits of the stage to the trainer's device, or to the CPU without a trainer."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        needed: tuple[Split, ...] = ("train", "test") if stage in ("fit", None) else ("test",)
        for split in needed:
            images, labels = self._splits.get(split) or self.read(split)
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            self._splits[split] = images, labels.to(device)

    def train_dataloader(self) -> EpochLoader[Batch]:
        """Return this rank's augmented training batches."""
        images, labels = self._split("train")
        rank, world_size = rank_and_world(self.trainer)
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size={self.batch_size} counts the global batch and does not split "
                f"evenly over {world_size} ranks: choose a multiple of {world_size}"
            )
        if self.batch_size > len(images):
            raise ValueError(
                f"batch_size={self.batch_size}: choose at most {len(images)}, the number of "
                "training images"
            )
        recipe = self._recipe()
        loader.warn_if_changed(self._saved_recipe, asdict(recipe))
        mean, std = self._statistics(images.device)
        fill = (255 * mean).round().to(torch.uint8)
        padded = augmentation.reflect_pad(images, self.translate)

        length = len(images) // self.batch_size

        def augmented(epoch: int) -> Batch:
            return augmentation.train_epoch(padded, labels, fill, epoch, recipe, rank, world_size)

        def batches(epoch: int, first: int) -> Iterator[Batch]:
            return augmentation.split_epoch(*augmented(epoch), length, first, mean, std)

        if self.show_images:
            self._show(augmented(0)[0][: self.show_images])
        return EpochLoader(batches, length, lambda: fit_progress(self.trainer))

    def val_dataloader(self) -> EpochLoader[Batch]:
        """Return this rank's share of the test split."""
        images, labels = self._split("test")
        rank, world_size = rank_and_world(self.trainer)
        # Every rank gets the same number of batches; their sizes differ by at most one.
        share = images[rank::world_size], labels[rank::world_size]
        mean, std = self._statistics(images.device)
        length = math.ceil(len(images) / self.batch_size)
        return EpochLoader(
            lambda epoch, first: augmentation.split_epoch(*share, length, first, mean, std), length
        )

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return what the training batches depend on."""
        return asdict(self._recipe())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint's batches depended on; train_dataloader warns if it differs."""
        self._saved_recipe = state_dict

    # -- for models --

    def training_images(self, n: int) -> Tensor:
        """Return the first n training images, normalised: float32 (n, channels, size, size)."""
        images = self._split("train")[0][:n]
        return augmentation.normalize(images, *self._statistics(images.device))

    # -- private --

    def _split(self, split: Split) -> Batch:
        if split not in self._splits:
            stage = "fit" if split == "train" else "test"
            raise RuntimeError(f"the {split} images are not loaded: call setup({stage!r}) first")
        return self._splits[split]

    def _recipe(self) -> ImageRecipe:
        seed = resolve_seed(self.seed)
        return ImageRecipe(seed, self.batch_size, self.flip, self.translate, self.cutout)

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

"""scikit-learn's handwritten digits: a real data set that needs no download."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from datamodules.augmentation import Batch
from datamodules.images import ImageDataModule, Split


def original_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's set: float64 (1797, 8, 8), whole numbers 0 to 16, and int64 (1797,)."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install scikit-learn, or install lit_fanions with its extra 'zoo'"
        ) from None
    digits = datasets.load_digits()
    return torch.from_numpy(digits.images), torch.from_numpy(digits.target).long()


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the set enlarged bilinearly, with three equal channels: uint8 (1797, 3, 32, 32)."""
    images, labels = original_digits()
    grey = images.float()[:, None] * (255 / 16)
    enlarged = interpolate(grey, size=32, mode="bilinear").round().to(torch.uint8)
    return enlarged.repeat(1, 3, 1, 1), labels


def split_indices(labels: Tensor, seed: int = 0) -> dict[Split, Tensor]:
    """Return the indices of each split: 80 % of each class to train on, the rest to test on."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, stratify=labels.numpy(), random_state=seed
    )
    return {"train": torch.from_numpy(train), "test": torch.from_numpy(test)}


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32; comes with scikit-learn.

    1,437 images to train on and 360 to test on, in a fixed stratified split. Images are shifted
    but never mirrored: switch off a model's test-time augmentation, which mirrors. They are grey:
    switch off a model's whitening of colours, too.

    Args:
        batch_size: Examples of a global batch; each of w ranks gets batch_size / w of them.
        translate: Largest shift up, down, left and right in pixels, over a reflected border.
        seed: Seed of order and augmentation; None: that of seed_everything, 0 without one.
        show_images: Number of augmented training images to show in TensorBoard when a fit starts.
    """

    mean = (0.3054,) * 3
    std = (0.3237,) * 3

    def __init__(
        self,
        batch_size: int = 128,
        translate: int = 2,
        seed: int | None = None,
        show_images: int = 0,
    ) -> None:
        super().__init__(batch_size, "none", translate, 0, seed, show_images)

    def read(self, split: Split) -> Batch:
        """Make one split: uint8 (n, 3, 32, 32) and int64 (n,)."""
        images, labels = load_digits()
        index = split_indices(labels)[split]
        return images[index], labels[index]

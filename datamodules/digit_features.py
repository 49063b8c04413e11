"""scikit-learn's digits as features of a linear classifier, all of them in every batch."""

from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.digits import original_digits, split_indices
from datamodules.loader import EpochLoader, checked_seed, repeated, resolve_seed
from lit_fanions.checks import whole_number


class Examples(NamedTuple):
    """Examples of a classification."""

    features: Tensor  # float64 (n, features)
    labels: Tensor  # classes, int64 (n,)


def polynomial(pixels: Tensor, degree: Literal[1, 2]) -> Tensor:
    """Return a constant 1, the pixels, (n, pixels), and for degree 2 all products of two pixels."""
    parts = [torch.ones_like(pixels[:, :1]), pixels]
    if degree == 2:
        first, second = torch.triu_indices(pixels.shape[1], pixels.shape[1])
        parts.append(pixels[:, first] * pixels[:, second])
    return torch.cat(parts, 1)


class DigitFeaturesDataModule(LightningDataModule):
    """1,797 handwritten digits, 8 x 8, with polynomials of their pixels as features.

    The first feature is 1, whose weights are biases. A training batch is all 1,437 examples of the
    training split, so that training is plain gradient descent; the other 360 are the test split.

    Args:
        degree: Degree of the polynomials: 1 gives 65 features, 2 gives 2,145.
        seed: Seed of the split; None: that of seed_everything, 0 without one.
        steps_per_epoch: Number of steps that Lightning counts as an epoch.
    """

    def __init__(
        self, degree: Literal[1, 2] = 2, seed: int | None = None, steps_per_epoch: int = 1000
    ) -> None:
        super().__init__()
        if degree not in (1, 2):
            raise ValueError(f"degree={degree}: choose 1 or 2")
        self.degree = degree
        self.seed = checked_seed(seed)
        self.steps_per_epoch = whole_number("steps_per_epoch", steps_per_epoch)
        self._splits: dict[str, Examples] = {}

    @property
    def features(self) -> int:
        """Number of features of an example."""
        return {1: 65, 2: 2145}[self.degree]

    def setup(self, stage: str | None = None) -> None:
        """Make both splits, on the trainer's device."""
        images, labels = original_digits()
        features = polynomial(images.flatten(1) / 16, self.degree)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        for split, index in split_indices(labels, resolve_seed(self.seed)).items():
            self._splits[split] = Examples(features[index].to(device), labels[index].to(device))

    def train_dataloader(self) -> EpochLoader[Examples]:
        """Return all training examples for every step."""
        return repeated(self._splits["train"], self.steps_per_epoch, self.trainer)

    def val_dataloader(self) -> EpochLoader[Examples]:
        """Return all test examples as one batch."""
        return repeated(self._splits["test"], 1, None)

    test_dataloader = predict_dataloader = val_dataloader

"""Random least-squares problems with known smoothness: section 5.1 of the paper on the Fanions."""

import math
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.loader import EpochLoader, repeated, resolve_seed


class Problems(NamedTuple):
    """F(X) = 1/2 <X - S, M (X - S) N> for several M, N and S (equation 19).

    Attributes:
        left: M, symmetric positive semidefinite, (problems, rows, rows).
        right: N, the same, (problems, cols, cols).
        target: S, (problems, rows, cols).
    """

    left: Tensor
    right: Tensor
    target: Tensor


def random_psd(size: int, rng: np.random.Generator) -> Tensor:
    """A symmetric matrix with eigenvalues uniform in (0, 1) and eigenvectors uniform (Haar).

    Args:
        size: Rows and columns.
        rng: Source of randomness.

    Returns:
        float64 (size, size).
    """
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    # Without this the signs that QR chooses are not uniform (Mezzadri, arXiv math-ph/0609050).
    vectors = q * np.sign(np.diagonal(r))
    return torch.from_numpy((vectors * rng.random(size)) @ vectors.T)


def random_problems(
    problems: int, rows: int, cols: int, target_scale: float = 1.0, seed: int = 0
) -> Problems:
    """Draw problems, each from a seed of its own: more of them leave the first as they are.

    Args:
        problems: How many.
        rows: Of the unknown matrix.
        cols: Of the unknown matrix.
        target_scale: Standard deviation of the Gaussian entries of S.
        seed: A non-negative number; problem i is a function of it and of i.

    Returns:
        The problems, float64.
    """
    drawn = []
    for problem in range(problems):
        rng = np.random.default_rng((seed, problem))
        target = torch.from_numpy(target_scale * rng.standard_normal((rows, cols)))
        drawn.append((random_psd(rows, rng), random_psd(cols, rng), target))
    return Problems(*map(torch.stack, zip(*drawn, strict=True)))


class LeastSquaresDataModule(LightningDataModule):
    """Random problems, all of them in every batch: steps are those of gradient descent.

    The paper does not say how S and the first X are drawn. Here the entries of S are independent
    and Gaussian, and ``models.LeastSquares`` starts at 0: only their difference matters.

    Args:
        problems: How many.
        rows: Of the unknown matrix.
        cols: Of the unknown matrix.
        target_scale: Standard deviation of the entries of S.
        seed: Of the problems; None: that of seed_everything, 0 without one.
        steps_per_epoch: What Lightning counts as an epoch.
    """

    def __init__(
        self,
        problems: int = 10,
        rows: int = 50,
        cols: int = 50,
        target_scale: float = 1.0,
        seed: int | None = None,
        steps_per_epoch: int = 1000,
    ) -> None:
        super().__init__()
        for name, count in (
            ("problems", problems),
            ("rows", rows),
            ("cols", cols),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if count < 1:
                raise ValueError(f"{name}={count}: it must be at least 1")
        if not 0 < target_scale < math.inf:
            raise ValueError(f"target_scale={target_scale}: it must be a positive number")
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed}: it must not be negative")
        self.shape = problems, rows, cols
        self.target_scale, self.seed, self.steps_per_epoch = target_scale, seed, steps_per_epoch

    def train_dataloader(self) -> EpochLoader[Problems]:
        """The same batch at every step, on the trainer's device."""
        problems = random_problems(*self.shape, self.target_scale, resolve_seed(self.seed))
        if self.trainer is not None:  # now, not at every step
            device = self.trainer.strategy.root_device
            problems = Problems(*(tensor.to(device) for tensor in problems))
        return repeated(problems, self.steps_per_epoch, self.trainer)

"""Random least-squares problems with known smoothness: section 5.1 of the paper on the Fanions."""

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.loader import EpochLoader, repeated, resolve_seed

Target = Literal["gaussian", "uniform"]


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
    vectors = np.linalg.qr(rng.standard_normal((size, size))).Q  # their signs do not matter
    return torch.from_numpy((vectors * rng.random(size)) @ vectors.T)


def random_problems(
    problems: int,
    rows: int,
    cols: int,
    target: Target = "gaussian",
    target_scale: float = 1.0,
    seed: int = 0,
) -> Problems:
    """Draw problems, each from a seed of its own: more of them leave the first as they are.

    Args:
        problems: How many.
        rows: Of the unknown matrix.
        cols: Of the unknown matrix.
        target: Whether the entries of S are normal around 0, or uniform from 0 to 1.
        target_scale: What they are multiplied by.
        seed: A non-negative number; problem i is a function of it and of i.

    Returns:
        The problems, float64.
    """
    drawn = []
    for problem in range(problems):
        rng = np.random.default_rng((seed, problem))
        draw = rng.standard_normal if target == "gaussian" else rng.random
        s = torch.from_numpy(target_scale * draw((rows, cols)))
        drawn.append((random_psd(rows, rng), random_psd(cols, rng), s))
    return Problems(*map(torch.stack, zip(*drawn, strict=True)))


class LeastSquaresDataModule(LightningDataModule):
    """Random problems, all of them in every batch: steps are those of gradient descent.

    The paper does not say how S and the first X are drawn, of which only the difference matters.
    Here ``models.LeastSquares`` starts at 0, and the entries of S are independent: normal, so that
    no singular value stands out, or uniform, so that one does, as the mean of a matrix has rank 1.

    Args:
        problems: How many.
        rows: Of the unknown matrix.
        cols: Of the unknown matrix.
        target: Whether the entries of S are normal around 0, or uniform from 0 to 1.
        target_scale: What they are multiplied by.
        seed: Of the problems; None: that of seed_everything, 0 without one.
        steps_per_epoch: What Lightning counts as an epoch.
    """

    def __init__(
        self,
        problems: int = 10,
        rows: int = 50,
        cols: int = 50,
        target: Target = "gaussian",
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
        if target not in get_args(Target):
            raise ValueError(f"target={target!r}: choose one of {', '.join(get_args(Target))}")
        if not 0 < target_scale < math.inf:
            raise ValueError(f"target_scale={target_scale}: it must be a positive number")
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed}: it must not be negative")
        self.shape = problems, rows, cols
        self.target: Target = target
        self.target_scale, self.seed, self.steps_per_epoch = target_scale, seed, steps_per_epoch

    def train_dataloader(self) -> EpochLoader[Problems]:
        """The same batch at every step, on the trainer's device."""
        seed = resolve_seed(self.seed)
        problems = random_problems(*self.shape, self.target, self.target_scale, seed)
        if self.trainer is not None:  # now, not at every step
            device = self.trainer.strategy.root_device
            problems = Problems(*(tensor.to(device) for tensor in problems))
        return repeated(problems, self.steps_per_epoch, self.trainer)

"""Random least-squares problems with known smoothness: section 5.1 of the paper on the Fanions."""

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.loader import EpochLoader, checked_seed, repeated, resolve_seed
from lit_fanions.checks import check_choice, real_number, whole_number

Target = Literal["gaussian", "uniform"]


class Problems(NamedTuple):
    """F(X) = 1/2 <X - S, M (X - S) N> for several M, N and S (equation 19)."""

    left: Tensor  # M, symmetric positive semidefinite, (problems, rows, rows)
    right: Tensor  # N, symmetric positive semidefinite, (problems, cols, cols)
    target: Tensor  # S, (problems, rows, cols)


def random_psd(size: int, rng: np.random.Generator) -> Tensor:
    """Draw a float64 symmetric matrix, eigenvalues uniform in (0, 1), eigenvectors by Haar."""
    vectors = np.linalg.qr(rng.standard_normal((size, size))).Q  # Haar up to signs, which cancel
    return torch.from_numpy((vectors * rng.random(size)) @ vectors.T)


def random_problems(
    problems: int,
    rows: int,
    cols: int,
    target: Target = "gaussian",
    target_scale: float = 1.0,
    seed: int = 0,
) -> Problems:
    """Draw float64 problems as ``LeastSquaresDataModule`` describes.

    Problem i depends on the seed and on i alone: a larger number has the same first ones.
    """
    drawn = []
    for problem in range(problems):
        rng = np.random.default_rng((seed, problem))
        draw = rng.standard_normal if target == "gaussian" else rng.random
        s = torch.from_numpy(target_scale * draw((rows, cols)))
        drawn.append((random_psd(rows, rng), random_psd(cols, rng), s))
    return Problems(*map(torch.stack, zip(*drawn, strict=True)))


class LeastSquaresDataModule(LightningDataModule):
    """Random problems, all of them in every batch, so that training is plain gradient descent.

    The paper does not say how it draws S and the first X, of which only the difference matters.
    Here ``models.LeastSquares`` starts at 0, and the entries of S are independent: normal, so that
    no singular value stands out, or uniform, so that one does, because the mean has rank 1.

    Args:
        problems: Number of problems.
        rows: Number of rows of the unknown matrix.
        cols: Number of columns of the unknown matrix.
        target: Distribution of the entries of S: normal around 0, or uniform from 0 to 1.
        target_scale: Factor on the entries of S.
        seed: Seed of the problems; None: that of seed_everything, 0 without one.
        steps_per_epoch: Number of steps that Lightning counts as an epoch.
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
        check_choice("target", target, get_args(Target))
        self.shape = (
            whole_number("problems", problems),
            whole_number("rows", rows),
            whole_number("cols", cols),
        )
        self.target: Target = target
        self.target_scale = real_number("target_scale", target_scale, above=0)
        self.seed = checked_seed(seed)
        self.steps_per_epoch = whole_number("steps_per_epoch", steps_per_epoch)

    def train_dataloader(self) -> EpochLoader[Problems]:
        """Return the same batch for every step, on the trainer's device."""
        seed = resolve_seed(self.seed)
        problems = random_problems(*self.shape, self.target, self.target_scale, seed)
        if self.trainer is not None:  # moved once, here, instead of at every step
            device = self.trainer.strategy.root_device
            problems = Problems(*(tensor.to(device) for tensor in problems))
        return repeated(problems, self.steps_per_epoch, self.trainer)

"""Controls for trainings: steps that keep one thing of a method and make another random.

They are callbacks for recipes, and no part of the library:

  python -m lit_fanions fit --config configs/nanogpt/muon_cpu.yaml \
      --trainer.callbacks+=experiments.controls.RandomSpectrum
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_fanions.lmo import BALLS, Answer, Problem
from lit_fanions.optim.algorithms import ALGORITHMS, is_entrywise, matrix_algorithm
from lit_fanions.optim.bases import default_seed
from lit_fanions.optim.schedules import ScheduleConfig, alpha_at

NAME = "random_spectrum"
_MUONS = ("muon", "f_muon", "s_muon")
# Of its own, so that a control sees the data in the recipe's order; seeded when a run starts.
_GENERATOR = torch.Generator()


def random_spectrum(problem: Problem) -> Answer:
    """Return U diag(w) V^T with random w in [0, 1), as long as U V^T.

    Singular values are drawn anew for every matrix and step: Kaon (arXiv 2605.11181).
    """
    u, s, vh = torch.linalg.svd(problem.normalised()[0].float(), full_matrices=False)
    w = torch.rand(s.shape, generator=_GENERATOR).to(s)
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    w = torch.where(s > 0, w * (s.shape[-1] ** 0.5 / length), 0.0)
    direction: Tensor = (u * w.unsqueeze(-2)) @ vh
    return Answer(direction)


def register() -> None:
    """Add the oracle to the tables of balls and of algorithms, in this process alone."""
    BALLS[NAME] = dataclasses.replace(
        BALLS["spectral"],
        summary="none: random singular values",
        direction="U diag(w) Vᵀ",
        oracle=random_spectrum,
        is_polar=lambda case: False,
    )
    ALGORITHMS[NAME] = matrix_algorithm(NAME)


def _matrix_groups(trainer: Trainer) -> Iterator[dict[str, Any]]:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if not is_entrywise(group["algorithm"]):
                yield group


class RandomSpectrum(Callback):
    """Steps of muon and its blends with random singular values: is it the norm that matters?

    Such a run cannot be resumed: its checkpoints name an algorithm that no table has at the start.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the groups the other oracle.

        Raises:
            ValueError: If there is no such group.
        """
        muons = [group for group in _matrix_groups(trainer) if group["algorithm"] in _MUONS]
        if not muons:
            raise ValueError(f"RandomSpectrum: no group has the algorithm {' or '.join(_MUONS)}")
        register()
        _GENERATOR.manual_seed(default_seed())
        for group in muons:
            group["algorithm"] = NAME


class ShuffledAlpha(Callback):
    """Takes the alphas of a linear schedule in random order: is it their order that matters?

    Args:
        first: Alpha with which the schedule would start.
        last: Alpha with which it would end.
    """

    def __init__(self, first: float = 1.1, last: float = 0.5) -> None:
        self.first = first
        self.last = last
        self._alphas: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the order of the alphas of all steps."""
        total = int(trainer.estimated_stepping_batches)
        schedule = ScheduleConfig(alpha_end=self.last)
        order = torch.randperm(total, generator=_GENERATOR.manual_seed(default_seed())).tolist()
        self._alphas = [alpha_at(schedule, self.first, step, total) for step in order]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Set the alpha of this step."""
        for group in _matrix_groups(trainer):
            group["alpha"] = self._alphas[trainer.global_step]

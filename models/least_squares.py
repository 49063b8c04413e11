"""Randomised linear least squares: section 5.1 of the paper on the Fanions."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from datamodules.least_squares import Problems
from lit_fanions import FanionConfig, bounds, configure_optimizers
from models.gradients import NORMS, gradient_norms, is_logged, own_norm

_TOGETHER = 64  # gradients that are decomposed in one call


def value_and_gradient(x: Tensor, problems: Problems) -> tuple[Tensor, Tensor]:
    """F(X) = 1/2 <X - S, M (X - S) N> and its gradient M (X - S) N (equations 19 and 20).

    Args:
        x: (problems, rows, cols).
        problems: M, N and S.

    Returns:
        (problems,) and (problems, rows, cols).
    """
    difference = x - problems.target
    gradient = problems.left @ difference @ problems.right
    return (difference * gradient).sum((-2, -1)) / 2, gradient


class LeastSquares(LightningModule):
    """Solves several random problems at once, each with a matrix of its own that starts at 0.

    The matrices are one parameter, a stack that ``Fanion`` steps as a batch of matrices, and the
    loss is the sum over the problems: none has to do with another. All is in float64, so that what
    is compared is algorithms, not rounding; let the trainer have precision 64-true.

    Logged are train/loss, gradient/{spectral,frobenius,nuclear,dual} (``gradients.NORMS``) and
    best/..., the smallest of these norms so far, looked at in every step: means over the problems,
    and the same of each problem as problemI/{loss,spectral,best_spectral,...}. A value logged at
    step k is that of X after k steps. Logged are multiples of the trainer's log_every_n_steps,
    steps evenly spread over a logarithmic axis, and the last. problemI/smoothness, at the start, is
    the Lipschitz constant of the gradient in the norm of the algorithm (``bounds.smoothness``).

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        problems: How many; as many as the data has.
        rows: Of the unknown matrices.
        cols: Of the unknown matrices.
        points_per_decade: Steps that are logged from each power of ten to the next.
    """

    best: Tensor

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        problems: int = 10,
        rows: int = 50,
        cols: int = 50,
        points_per_decade: int = 20,
    ) -> None:
        super().__init__()
        for name, count in (
            ("problems", problems),
            ("rows", rows),
            ("cols", cols),
            ("points_per_decade", points_per_decade),
        ):
            if count < 1:
                raise ValueError(f"{name}={count}: it must be at least 1")
        self.fanion_config = FanionConfig.from_dict(optimizer)
        # Checkpoints must hold plain data: a dataclass would not load with weights_only.
        self.save_hyperparameters(ignore="optimizer")
        self.save_hyperparameters({"optimizer": self.fanion_config.to_dict()})
        self.shape = problems, rows, cols
        self.points_per_decade = points_per_decade
        # A stack of a single matrix would be taken for a positional parameter.
        self.x = nn.Parameter(torch.zeros(self.shape, dtype=torch.float64).squeeze(0))
        best = torch.full((len(NORMS), problems), math.inf, dtype=torch.float64)
        self.register_buffer("best", best)
        self._problems: Problems | None = None
        self._gradients: list[Tensor] = []  # that have not been looked at yet

    # -- Lightning's hooks --

    def setup(self, stage: str) -> None:
        """Check that the data has problems of this size.

        Raises:
            ValueError: If it has others.
        """
        given = getattr(getattr(self.trainer, "datamodule", None), "shape", self.shape)
        if given != self.shape:
            raise ValueError(
                f"the data has (problems, rows, cols) = {given} and the model {self.shape}: give "
                "both the same"
            )

    def on_train_start(self) -> None:
        """Start anew."""
        self._gradients.clear()  # of a step that an error ended
        if self.trainer.global_step == 0:
            self.best.fill_(math.inf)

    def training_step(self, batch: Problems, batch_idx: int) -> Tensor:
        """Return the sum of the losses, whose gradient is each problem's own."""
        self._problems = batch
        losses, gradient = value_and_gradient(self.x, batch)
        self._gradients.append(gradient.detach())
        step = self.trainer.global_step
        if step == 0:
            self._log_smoothness(batch)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if is_logged(step, every, self.points_per_decade):
            self._log(losses)
        elif len(self._gradients) == _TOGETHER:
            self._look()
        return losses.sum()

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Log where the last step led."""
        if self._problems is not None:
            losses, gradient = value_and_gradient(self.x, self._problems)
            self._gradients.append(gradient)
            self._log(losses)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the smallest norms be those of all steps so far."""
        if self._gradients:
            self._look()
            checkpoint["state_dict"]["best"] = self.best.clone()

    def configure_optimizers(self) -> Any:
        """One optimizer, with the schedule that the configuration has."""
        return configure_optimizers(self, self.fanion_config)

    # -- private --

    @torch.no_grad()
    def _look(self) -> Tensor:
        """The norms of the last gradient, (4, problems), after updating the smallest."""
        (group,) = self.trainer.optimizers[0].param_groups
        norms = gradient_norms(torch.stack(self._gradients), group)
        self._gradients.clear()
        torch.minimum(self.best, norms.amin(1), out=self.best)
        return norms[:, -1]

    def _log_smoothness(self, problems: Problems) -> None:
        (group,) = self.trainer.optimizers[0].param_groups
        norm = own_norm(group, *self.shape[1:])
        values = bounds.smoothness(norm, problems.left, problems.right).tolist()
        self._write({f"problem{i}/smoothness": value for i, value in enumerate(values)})

    def _log(self, losses: Tensor) -> None:
        values = {"train/loss": losses.tolist()}
        for kind, norms in (("gradient", self._look()), ("best", self.best)):
            values |= {f"{kind}/{name}": norms[i].tolist() for i, name in enumerate(NORMS)}
        metrics = {name: sum(each) / len(each) for name, each in values.items()}
        for name, each in values.items():
            short = name.removeprefix("train/").removeprefix("gradient/").replace("/", "_")
            metrics |= {f"problem{i}/{short}": value for i, value in enumerate(each)}
        self._write(metrics)

    def _write(self, metrics: dict[str, float]) -> None:
        # Not self.log: that would take its time in every step.
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

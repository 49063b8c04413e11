"""Convex problems of a matrix: the loss, and the gradient in several norms, logged exactly."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_fanions import FanionConfig, configure_optimizers, oracle
from lit_fanions.checks import whole_number
from lit_fanions.lmo import spectrum as spectra

NORMS = ("spectral", "frobenius", "nuclear", "dual")
_BUFFERED = 64  # gradients that are decomposed in one call, which takes less time than one by one


def gradient_norms(gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the norms of ``NORMS``: dual norms of neon, nsgd and muon, and of the group's ball.

    ``group`` is the parameter group of ``Fanion`` that steps along the gradient, (..., rows, cols).
    The norms are float64 (4, ...).
    """
    spectrum = spectra.measure(gradient, exact=True)
    found = (
        spectra.spectral(spectrum),
        spectrum.frobenius,
        spectra.nuclear(spectrum),
        oracle(group, *gradient.shape[-2:]).dual(spectrum, gradient),
    )
    return torch.stack(found)


def is_logged(step: int, every: int, per_decade: int) -> bool:
    """Return whether a plot over a linear or a logarithmic axis needs this step, from 0.

    Of the linear axis every ``every`` steps, of the logarithmic one ``per_decade`` steps from each
    power of ten to the next; fewer where they coincide.
    """
    if step % every == 0 or step == 1:
        return True
    places = (math.floor(per_decade * math.log10(k)) for k in (step, step - 1))
    return next(places) > next(places)


class ConvexProblem(LightningModule):
    """One or several convex problems, each over a matrix that starts at 0; subclasses define F.

    The matrices are one parameter, a stack that ``Fanion`` steps as a batch of matrices. The loss
    is the sum over the problems, so that each problem's gradient is its own. Everything is in
    float64, so that algorithms are compared and not their rounding; set the trainer's precision to
    64-true.

    Logs train/loss, gradient/{spectral,frobenius,nuclear,dual} (``NORMS``) and best/..., the
    smallest of each norm over all steps so far: means over the problems and, with
    ``logs_each_problem``, also problemI/{loss,spectral,best_spectral,...} of each problem. A value
    logged at step k belongs to the matrices after k steps. Logged steps are the multiples of the
    trainer's log_every_n_steps, steps evenly spread over a logarithmic axis, and the last step.

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        problems: Number of problems.
        rows: Number of rows of the matrices.
        cols: Number of columns of the matrices.
        points_per_decade: Number of logged steps from each power of ten to the next.
    """

    logs_each_problem = False
    best: Tensor

    def __init__(
        self, optimizer: FanionConfig, problems: int, rows: int, cols: int, points_per_decade: int
    ) -> None:
        super().__init__()
        self.fanion_config = FanionConfig.from_dict(optimizer)
        self.shape = (
            whole_number("problems", problems),
            whole_number("rows", rows),
            whole_number("cols", cols),
        )
        self.points_per_decade = whole_number("points_per_decade", points_per_decade)
        # split_parameters would take a stack of a single matrix for a positional parameter.
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.float64).squeeze(0))
        best = torch.full((len(NORMS), problems), math.inf, dtype=torch.float64)
        self.register_buffer("best", best)
        self._batch: Any = None
        self._losses = torch.empty(0)
        self._gradients: list[Tensor] = []  # gradients whose norms are not in ``best`` yet

    @abstractmethod
    def losses(self, batch: Any) -> Tensor:
        """Return the loss of each problem, float64 (problems,)."""

    # -- Lightning's hooks --

    def on_train_start(self) -> None:
        """Reset the smallest norms, unless the run is resumed."""
        self._gradients.clear()  # an error may have ended an earlier fit between two steps
        if self.trainer.global_step == 0:
            self.best.fill_(math.inf)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses: its gradient holds each problem's own gradient."""
        losses = self.losses(batch)
        self._batch, self._losses = batch, losses.detach()
        return losses.sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Record the gradient, and log on due steps."""
        assert self.weight.grad is not None
        self._gradients.append(self.weight.grad.view(self.shape))
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if is_logged(self.trainer.global_step, every, self.points_per_decade):
            self._log()
        elif len(self._gradients) == _BUFFERED:
            self._update_best()

    def on_train_end(self) -> None:
        """Log loss and gradient after the last step."""
        if self._batch is None:
            return
        with torch.enable_grad():
            losses = self.losses(self._batch)
            (gradient,) = torch.autograd.grad(losses.sum(), self.weight)
        self._losses = losses.detach()
        self._gradients.append(gradient.view(self.shape))
        self._log()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the smallest norms of all steps so far, the recorded gradients included."""
        if self._gradients:
            self._update_best()
            checkpoint["state_dict"]["best"] = self.best.clone()

    def configure_optimizers(self) -> Any:
        """Return one optimizer, with the schedule of the configuration."""
        return configure_optimizers(self, self.fanion_config)

    # -- private --

    @property
    def _group(self) -> Mapping[str, Any]:
        (group,) = self.trainer.optimizers[0].param_groups
        return group

    def _update_best(self) -> Tensor:
        """Update the smallest norms; return the norms of the last gradient, (4, problems)."""
        norms = gradient_norms(torch.stack(self._gradients), self._group)
        self._gradients.clear()
        torch.minimum(self.best, norms.amin(1), out=self.best)
        return norms[:, -1]

    def _log(self) -> None:
        values = {"train/loss": self._losses.tolist()}
        for kind, found in (("gradient", self._update_best()), ("best", self.best)):
            values |= {f"{kind}/{name}": found[i].tolist() for i, name in enumerate(NORMS)}
        metrics = {name: sum(each) / len(each) for name, each in values.items()}
        for name, each in values.items() if self.logs_each_problem else ():
            short = name.removeprefix("train/").removeprefix("gradient/").replace("/", "_")
            metrics |= {f"problem{i}/{short}": value for i, value in enumerate(each)}
        self.log_now(metrics)

    def log_now(self, metrics: dict[str, float]) -> None:
        """Send values of this step to the loggers; unlike ``log``, at once and not again later."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

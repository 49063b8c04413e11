"""Convex problems of a matrix: what is logged of the loss and of the gradient in each norm."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_fanions import FanionConfig, configure_optimizers, norms
from lit_fanions.callbacks import quantities
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.optim.algorithms import oracle

NORMS = ("spectral", "frobenius", "nuclear", "dual")
_TOGETHER = 64  # gradients that are decomposed in one call


def gradient_norms(gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The norms of ``NORMS``: the dual norms of neon, of nsgd, of muon, and of the group's own.

    Args:
        gradient: (..., rows, cols).
        group: Options of the parameter group of ``Fanion`` that steps along it.

    Returns:
        (4, ...), float64.
    """
    spectrum = spectra.measure(gradient, exact=True)
    found = (
        spectra.spectral(spectrum),
        spectrum.frobenius,
        spectra.nuclear(spectrum),
        quantities.own_dual(spectrum, gradient, group),
    )
    return torch.stack(found)


def own_norm(group: Mapping[str, Any], rows: int, cols: int) -> norms.Norm:
    """The norm in whose ball a parameter group of ``Fanion`` steps.

    Args:
        group: Its options; not of dion, adamw and sgd.
        rows: Of the matrices.
        cols: Of the matrices.
    """
    return oracle(group, rows, cols).norm()


def is_logged(step: int, every: int, per_decade: int) -> bool:
    """Whether a step is one of those that a plot over a linear or a logarithmic axis needs.

    Args:
        step: Counted from 0, which is one.
        every: So are the multiples of this.
        per_decade: So are about so many from each power of ten to the next, evenly spread.
    """
    if step % every == 0 or step == 1:
        return True
    places = (math.floor(per_decade * math.log10(k)) for k in (step, step - 1))
    return next(places) > next(places)


def check_positive(**counts: int) -> None:
    """Refuse counts below 1, by their names.

    Raises:
        ValueError: At the first.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: it must be at least 1")


class ConvexProblem(LightningModule):
    """One or several convex problems, each of a matrix that starts at 0; subclasses say which.

    The matrices are one parameter, a stack that ``Fanion`` steps as a batch of matrices, and the
    loss is the sum over the problems: none has to do with another. All is in float64, so that what
    is compared is algorithms, not rounding; let the trainer have precision 64-true.

    Logged are train/loss, gradient/{spectral,frobenius,nuclear,dual} (``NORMS``) and best/..., the
    smallest of these norms so far, looked at in every step: means over the problems, and where
    ``apart`` says so of each problem as problemI/{loss,spectral,best_spectral,...}. A value logged
    at step k is that of the matrices after k steps. Logged are the multiples of the trainer's
    log_every_n_steps, steps evenly spread over a logarithmic axis, and the last.

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        problems: How many.
        rows: Of the matrices.
        cols: Of the matrices.
        points_per_decade: Steps that are logged from each power of ten to the next.
    """

    apart = False
    best: Tensor

    def __init__(
        self,
        optimizer: FanionConfig,
        problems: int,
        rows: int,
        cols: int,
        points_per_decade: int,
    ) -> None:
        super().__init__()
        check_positive(problems=problems, rows=rows, cols=cols, points_per_decade=points_per_decade)
        self.fanion_config = FanionConfig.from_dict(optimizer)
        self.shape = problems, rows, cols
        self.points_per_decade = points_per_decade
        # A stack of a single matrix would be taken for a positional parameter.
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.float64).squeeze(0))
        best = torch.full((len(NORMS), problems), math.inf, dtype=torch.float64)
        self.register_buffer("best", best)
        self._batch: Any = None
        self._losses = torch.empty(0)
        self._gradients: list[Tensor] = []  # that have not been looked at yet

    @abstractmethod
    def losses(self, batch: Any) -> Tensor:
        """The loss of each problem: (problems,), float64."""

    # -- Lightning's hooks --

    def on_train_start(self) -> None:
        """Start anew."""
        self._gradients.clear()  # of a step that an error ended
        if self.trainer.global_step == 0:
            self.best.fill_(math.inf)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses, whose gradient is each problem's own."""
        losses = self.losses(batch)
        self._batch, self._losses = batch, losses.detach()
        return losses.sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Look at the gradient."""
        assert self.weight.grad is not None
        self._gradients.append(self.weight.grad.view(self.shape))
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if is_logged(self.trainer.global_step, every, self.points_per_decade):
            self._log()
        elif len(self._gradients) == _TOGETHER:
            self._look()

    def on_train_end(self) -> None:
        """Log where the last step led."""
        if self._batch is None:
            return
        with torch.enable_grad():
            losses = self.losses(self._batch)
            (gradient,) = torch.autograd.grad(losses.sum(), self.weight)
        self._losses = losses.detach()
        self._gradients.append(gradient.view(self.shape))
        self._log()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the smallest norms be those of all steps so far."""
        if self._gradients:
            self._look()
            checkpoint["state_dict"]["best"] = self.best.clone()

    def configure_optimizers(self) -> Any:
        """One optimizer, with the schedule that the configuration has."""
        return configure_optimizers(self, self.fanion_config)

    # -- private --

    @property
    def _group(self) -> Mapping[str, Any]:
        (group,) = self.trainer.optimizers[0].param_groups
        return group

    def _look(self) -> Tensor:
        """The norms of the last gradient, (4, problems), after updating the smallest."""
        norms = gradient_norms(torch.stack(self._gradients), self._group)
        self._gradients.clear()
        torch.minimum(self.best, norms.amin(1), out=self.best)
        return norms[:, -1]

    def _log(self) -> None:
        values = {"train/loss": self._losses.tolist()}
        for kind, found in (("gradient", self._look()), ("best", self.best)):
            values |= {f"{kind}/{name}": found[i].tolist() for i, name in enumerate(NORMS)}
        metrics = {name: sum(each) / len(each) for name, each in values.items()}
        for name, each in values.items() if self.apart else ():
            short = name.removeprefix("train/").removeprefix("gradient/").replace("/", "_")
            metrics |= {f"problem{i}/{short}": value for i, value in enumerate(each)}
        self.write(metrics)

    def write(self, metrics: dict[str, float]) -> None:
        """Log values of this moment. Unlike ``log``, it takes time only when it is called."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

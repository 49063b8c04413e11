"""Estimate the smoothness of the loss in each layer's own norm, and theory's step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_fanions import bounds
from lit_fanions.callbacks.extra_pass import RecordedBatch
from lit_fanions.callbacks.lightning_interface import MisconfigurationException, optimizer_steps
from lit_fanions.callbacks.watching import MatrixStep, Watcher, log_values, matrix_names
from lit_fanions.norms import Blend, Frobenius, Norm
from lit_fanions.optim.algorithms import is_entrywise, oracle
from lit_fanions.optim.fanion import Fanion
from lit_fanions.optim.matrices import gather, local_grad, to_matrices

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Number of looks that the fit uses; beyond it every other one is dropped.
_MAX_HISTORY = 512


class _Move(NamedTuple):
    """A step of the matrices of one parameter. Numbers of matrices are (count,)."""

    names: list[str]
    group: str
    norm: Norm
    distance: Tensor  # between the weights, in the norm
    lr: Tensor


class SmoothnessMonitor(Watcher):
    """Log the smoothness of the loss along the run, and theory's step sizes beside those in use.

    At a look the gradient G of the first batch of the training, the probe, is computed before and
    after the optimizer's step, and for each matrix of Fanion's groups, in the norm of its ball,

        L = |G(W_after) - G(W_before)|_dual / |W_after - W_before|.

    All layers move at once, as in Gluon (arXiv 2505.13416, version 1), whose Assumption 1 is
    L <= L0 + L1 |G(W_before)|_dual for each layer. L0 and L1 are fitted to all looks so far by
    least squares, neither negative. Gluon's own estimate (equation 10 there) differs in three
    things: its gradients are those of each step's batch, so that noise counts as curvature; L is
    fitted against the gradient after the step, while here it is the one that the step is chosen
    by; and its fit weighs underestimates more, so that a step from it is shorter. Logged as
    ``spectral/QUANTITY/MATRIX``, means over groups beside them (docs/quantities.md):

    - ``smoothness_estimate``, ``smoothness_constant``, ``smoothness_slope``: L, L0, L1;
    - ``smoothness_gluon_lr``: |G|_dual / (L0 + L1 |G|_dual), the step of Gluon's Theorem 1;
    - ``smoothness_descent_lr``: |G|_dual / L with the largest L so far, the step of the paper's
      Lemma 7 (equation 16) for the precision |G|_dual;
    - ``smoothness_lr``: lr times the step-size factor, the step in use.

    A look takes two passes of the probe and three singular value decompositions of each matrix in
    float64: for studies of small networks, or rare looks. It repeats the random numbers of the
    first look and changes no bit of the training. A resumed run takes another probe and keeps the
    history of its checkpoint.

    Args:
        every_n_steps: Interval in optimizer steps, starting with the first step.
        parameters: Patterns of parameter names to log, with * as wildcard; None logs all.

    Raises:
        MisconfigurationException: With manual optimization or another optimizer than Fanion; for
            a blend whose norm is unknown or takes an iteration: all but those with frobenius.
        ValueError: If the interval is below 1, or a pattern matches no parameter.
    """

    def __init__(self, every_n_steps: int = 50, parameters: Sequence[str] | None = None) -> None:
        super().__init__(every_n_steps, parameters)
        self.history: dict[str, list[tuple[float, float]]] = {}  # matrix -> (dual norm of G, L)
        self._probe: RecordedBatch | None = None
        self._before: dict[str, Tensor] = {}
        self._moves: list[_Move] = []

    @property
    def state_key(self) -> str:
        """Key that keeps the states of monitors with different arguments apart."""
        return self._generate_state_key(
            every_n_steps=self.every_n_steps, parameters=self.parameters
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the step counts."""
        return {"history": self.history, "step_counts": dict(self._step_counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and the step counts."""
        history = state_dict["history"].items()
        self.history = {name: [tuple(pair) for pair in pairs] for name, pairs in history}
        self._step_counts = dict(state_dict["step_counts"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse manual optimization; clear the history, unless the run is resumed."""
        super().on_train_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException("SmoothnessMonitor needs automatic optimization")
        if not isinstance(trainer.optimizers[0], Fanion):
            raise MisconfigurationException(
                f"SmoothnessMonitor needs Fanion: {type(trainer.optimizers[0]).__name__} steps in "
                "no norm ball"
            )
        if trainer.ckpt_path is None and optimizer_steps(trainer) == 0:
            self.history = {}
        self._moves = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batch as the probe."""
        if self._probe is None:
            self._probe = RecordedBatch.now(pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Compute the probe's gradient before the step, if it is due."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._is_recording:
            self._before = self._probe_gradients(trainer, pl_module, optimizer)

    def record(self, step: MatrixStep) -> None:
        """Measure how far the matrices have moved."""
        if step.observation is None:  # a group without a ball
            return
        count, rows, cols = step.before.shape
        norm = oracle(step.observation.group, rows, cols).norm()
        if isinstance(norm, Blend) and not _is_fast(norm):
            raise MisconfigurationException(
                f"SmoothnessMonitor: group {step.group!r} steps in {norm!r}, whose norm is unknown "
                "or slow to compute; choose the other parameters by `parameters`"
            )
        distance = _finite_norms(norm.value, step.after.double() - step.before.double())
        factor = step.observation.factor
        if isinstance(factor, Tensor):
            factor = factor.double().expand(count, 1, 1)[:, 0, 0].to(distance.device)
        lr = step.lr * factor * torch.ones_like(distance)
        self._moves.append(_Move(step.names, step.group, norm, distance, lr))

    def finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the probe's gradient after the step, and log."""
        moves, before = self._moves, self._before
        self._moves, self._before = [], {}
        if not moves or not before:  # a gradient scaler has skipped the step
            return
        after = self._probe_gradients(trainer, pl_module, trainer.optimizers[0])
        values: dict[str, dict[str, float]] = {}
        groups: dict[str, str] = {}
        for move in moves:
            old, new = (torch.stack([g[name] for name in move.names]) for g in (before, after))
            sizes = _finite_norms(move.norm.dual, old)
            estimates = _finite_norms(move.norm.dual, new.double() - old.double()) / move.distance
            numbers = sizes.tolist(), estimates.tolist(), move.lr.tolist()
            for name, size, estimate, lr in zip(move.names, *numbers, strict=True):
                if math.isfinite(size + estimate):
                    groups[name] = move.group
                    for quantity, value in self._quantities(name, size, estimate, lr).items():
                        values.setdefault(quantity, {})[name] = value
        log_values(trainer, values, groups)

    def _quantities(self, name: str, size: float, estimate: float, lr: float) -> dict[str, float]:
        """Add a look at a matrix to its history and return its quantities."""
        history = self.history.setdefault(name, [])
        history.append((size, estimate))
        if len(history) > _MAX_HISTORY:
            del history[1::2]
        constant, slope = bounds.fit_smoothness(history)
        values = {
            "smoothness_estimate": estimate,
            "smoothness_constant": constant,
            "smoothness_slope": slope,
            "smoothness_lr": lr,
        }
        largest = max(smoothness for _, smoothness in history)
        if largest > 0:  # else the gradient has never changed, and any step is right
            values["smoothness_gluon_lr"] = size / (constant + slope * size)
            values["smoothness_descent_lr"] = size / largest
        return values

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the probe: another fit takes its own first batch."""
        super().teardown(trainer, pl_module, stage)
        self._probe = None

    def _probe_gradients(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> dict[str, Tensor]:
        """Return the gradient of each watched matrix on the probe; the training's stays."""
        assert self._probe is not None
        saved = [
            (p, p.grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()
        ]
        try:
            for p, _, _ in saved:
                p.grad = None
            with self._probe.replay(trainer, module) as loss:
                if loss is None:
                    return {}
                loss.backward()
            return self._matrices(optimizer)
        finally:
            with torch.no_grad():
                for p, gradient, copy in saved:
                    p.grad = gradient
                    if gradient is not None and copy is not None:
                        # DDP may have written into the same memory.
                        gradient.copy_(copy)

    @torch.no_grad()
    def _matrices(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return copies of the gradients of the matrices in Fanion's groups, by name."""
        found: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            if is_entrywise(group["algorithm"]):
                continue
            for p in group["params"]:
                if p in self._names and p.grad is not None:
                    gradient = gather(local_grad(p), p)
                    parts = to_matrices(gradient, group["layout"], group["splits"])
                    matrices = [matrix.clone() for part in parts for matrix in part]
                    names = matrix_names(self._names[p], 0, len(matrices), len(matrices))
                    found |= dict(zip(names, matrices, strict=True))
        return found


def _finite_norms(norm: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Return the norm of each matrix, NaN for those that are not finite: an SVD would raise."""
    finite = matrices.isfinite().flatten(-2).all(-1)
    return norm(matrices.where(finite[..., None, None], 0.0)).where(finite, math.nan)


def _is_fast(norm: Blend) -> bool:
    """Return True if the value of a blend is one search, and not an iteration over matrices."""
    return 0 <= norm.alpha <= 1 and (
        norm.alpha in (0, 1) or any(isinstance(part, Frobenius) for part in (norm.norm, norm.other))
    )

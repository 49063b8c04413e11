"""Show callbacks the matrices of some optimizer steps, with any optimizer."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_fanions.callbacks.lightning_interface import (
    Callback,
    name_without_wrappers,
    optimizer_steps,
)
from lit_fanions.callbacks.quantities import Tag
from lit_fanions.checks import whole_number
from lit_fanions.optim.algorithms import is_entrywise
from lit_fanions.optim.fanion import Fanion
from lit_fanions.optim.groups import configured_group
from lit_fanions.optim.matrices import gather, local, local_grad, matrix_shapes, to_matrices
from lit_fanions.optim.observing import Observation
from lit_fanions.optim.parameters import assign

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class MatrixStep(NamedTuple):
    """One optimizer step of matrices of one parameter. Tensors are (count, rows, cols)."""

    # Name of each matrix: the parameter's, with an index if it holds several matrices.
    names: list[str]
    group: str  # name of the parameter's group
    parameter: str  # name of the parameter
    lr: float  # learning rate of the step
    # The gradient used by the step, clipped and accumulated; None if it was deleted.
    gradient: Tensor | None
    before: Tensor  # the weights before the step
    after: Tensor  # the weights after the step
    # Fanion's own record of the step; None for other optimizers and for Fanion's groups of adamw
    # and sgd.
    observation: Observation | None


class Watcher(Callback):
    """Show a subclass the matrices of every n-th optimizer step, the first included.

    Fanion reports the matrices of its groups itself, through an observer. For other optimizers the
    weights that ``split_parameters`` calls matrices are copied before the step and compared after.
    ``parameters`` are patterns of names, with * as wildcard; None watches all.
    """

    def __init__(self, every_n_steps: int, parameters: Sequence[str] | None) -> None:
        self.every_n_steps = whole_number("every_n_steps", every_n_steps)
        if isinstance(parameters, str) or (parameters is not None and not parameters):
            raise ValueError(
                f"parameters must be a list of patterns, or None for all, got {parameters!r}"
            )
        self.parameters = None if parameters is None else list(parameters)
        self._names: dict[Tensor, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._step_counts: dict[int, int] = {}  # index of the optimizer -> its steps so far
        self._is_recording = False

    @abstractmethod
    def record(self, step: MatrixStep) -> None:
        """Measure some matrices; the tensors must be neither changed nor kept."""

    @abstractmethod
    def finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Process what was recorded, after all matrices of the step."""

    def is_due(self, step: int) -> bool:
        """Return True if the step with this index is to be recorded."""
        return step % self.every_n_steps == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse patterns that match no parameter; restart the step counts in a fresh run."""
        if trainer.ckpt_path is None and optimizer_steps(trainer) == 0:
            self._step_counts = {}
        for pattern in self.parameters or ():
            if not parameter_names(pl_module, [pattern]):
                raise ValueError(
                    f"parameters of {type(self).__name__}: no parameter's name matches {pattern!r}"
                )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Attach to the optimizer if its step is due."""
        # Count each optimizer's own steps: manual optimization does not step each in every batch.
        index = trainer.optimizers.index(optimizer)
        step = self._step_counts.get(index, 0)
        self._step_counts[index] = step + 1
        if trainer.barebones or not self.is_due(step):
            return
        self._is_recording = True
        self._names = parameter_names(pl_module, self.parameters)
        groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
        if isinstance(optimizer, Fanion):
            if self._observe not in optimizer.observers:
                optimizer.observers += (self._observe,)
            groups = [group for group in groups if is_entrywise(group["algorithm"])]
        if copies := self._copy_weights(pl_module, groups):
            # A hook of the step, not the end of the batch, by when gradients and weights may have
            # changed again. A step that a gradient scaler skips never calls it.
            hook = functools.partial(self._record_copies, copies)
            self._hooks.append(optimizer.register_step_post_hook(hook))

    def _copy_weights(
        self, module: nn.Module, groups: Sequence[Mapping[str, Any]]
    ) -> list[Callable[[], Iterator[MatrixStep]]]:
        """Copy parameters before a step; return what compares each of them with its copy."""
        if not any(p.ndim > 1 and p in self._names for g in groups for p in g["params"]):
            return []
        with warnings.catch_warnings():  # the factory has already warned about adapters
            warnings.simplefilter("ignore")
            forms = {a.parameter: a.options for a in assign(module) if a.role == "matrix"}
        return [
            functools.partial(
                _compare_with_copy, p, local(p).detach().clone(), self._names[p],
                configured_group(group), float(group["lr"]), forms[p],
            )
            for group in groups
            for p in group["params"]
            if p in self._names and p in forms and p.grad is not None
        ]  # fmt: skip

    @torch.no_grad()
    def _record_copies(self, copies: list[Callable[[], Iterator[MatrixStep]]], *args: Any) -> None:
        while copies:
            for step in copies.pop(0)():
                self.record(step)

    def _observe(self, observation: Observation) -> None:
        name = self._names.get(observation.parameter)
        if name is None:
            return
        group = observation.group
        shapes = matrix_shapes(observation.parameter.shape, group["layout"], group["splits"])
        count, total = len(observation.before), sum(shape[0] for shape in shapes)
        names = matrix_names(name, observation.first, count, total)
        step = MatrixStep(
            names, configured_group(group), name, float(group["lr"]), observation.gradient,
            observation.before, observation.after, observation,
        )  # fmt: skip
        self.record(step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Detach from the optimizer and process what was recorded."""
        if self._is_recording:
            self._detach(trainer)
            self.finish_step(trainer, pl_module)

    def on_exception(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Detach from the optimizer."""
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the module's parameters."""
        self._names = {}

    def _detach(self, trainer: Trainer) -> None:
        self._is_recording = False
        while self._hooks:
            self._hooks.pop().remove()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Fanion):
                others = [own for own in optimizer.observers if own != self._observe]
                optimizer.observers = tuple(others)

    def sort_by_parameter(self, matrices: Iterable[str]) -> list[str]:
        """Return names of matrices in the order of the module's parameters."""
        positions = {name: i for i, name in enumerate(self._names.values())}

        def position(matrix: str) -> tuple[int, int]:
            name, _, index = matrix.removesuffix("]").rpartition("[")
            if name in positions:
                return positions[name], int(index)
            return positions.get(matrix, 0), 0

        return sorted(matrices, key=position)


def log_values(
    trainer: Trainer, values: Mapping[str, Mapping[str, float]], groups: Mapping[str, str]
) -> dict[str, float]:
    """Log values (quantity -> matrix -> value) and their means over each group; return them by tag.

    They go to every logger and to the metrics that EarlyStopping and ModelCheckpoint monitor.
    """
    tagged = {}
    for quantity, by_matrix in values.items():
        by_group: dict[str, list[float]] = {}
        for name, value in by_matrix.items():
            tagged[str(Tag(quantity, name))] = value
            by_group.setdefault(groups[name], []).append(value)
        for group, members in by_group.items():
            tagged[str(Tag(quantity, group, is_group=True))] = sum(members) / len(members)
    metrics = {tag: torch.tensor(v, device="cpu") for tag, v in tagged.items()}
    trainer.callback_metrics.update(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(tagged, step=optimizer_steps(trainer))
    return tagged


def parameter_names(module: nn.Module, patterns: Sequence[str] | None = None) -> dict[Tensor, str]:
    """Return the names, without the levels of torch.compile, that match a pattern; None: all."""
    named = ((p, name_without_wrappers(name)) for name, p in module.named_parameters())
    return {
        p: name
        for p, name in named
        if patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def matrix_names(parameter: str, first: int, count: int, total: int) -> list[str]:
    """Return the names of ``count`` of a parameter's ``total`` matrices, from ``first`` on."""
    if total == 1:
        return [parameter]
    return [f"{parameter}[{i}]" for i in range(first, first + count)]


def _compare_with_copy(
    p: Tensor, copy: Tensor, name: str, group: str, lr: float, form: Mapping[str, Any]
) -> Iterator[MatrixStep]:
    """Yield the steps of a parameter's matrices; ``copy`` is its shard before the step."""
    layout, splits = form.get("layout", "flatten"), form.get("splits")

    def matrices(shard: Tensor) -> list[Tensor]:
        return to_matrices(gather(shard.detach(), p), layout, splits)

    before, after = matrices(copy), matrices(local(p))
    gradients = [None] * len(before) if p.grad is None else matrices(local_grad(p))
    total, first = sum(map(len, before)), 0
    for gradient, old, new in zip(gradients, before, after, strict=True):
        names = matrix_names(name, first, len(old), total)
        yield MatrixStep(names, group, name, lr, gradient, old, new, None)
        first += len(old)

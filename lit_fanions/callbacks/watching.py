"""How callbacks come to see the optimizer's matrices in some of its steps, with any optimizer."""

from __future__ import annotations

import fnmatch
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_fanions.optim.algorithms import is_entrywise
from lit_fanions.optim.fanion import Fanion
from lit_fanions.optim.matrices import gather, local, local_grad, matrix_shapes, to_matrices
from lit_fanions.optim.observing import Observation
from lit_fanions.optim.parameters import assign


class Seen(NamedTuple):
    """Matrices of one parameter in one step of an optimizer. Tensors are (count, rows, cols).

    Attributes:
        names: Of each matrix: the parameter's, numbered where it is several matrices.
        group: Name of the parameter's group.
        parameter: Name of the parameter.
        lr: Learning rate of the step.
        gradient: As the step found it, clipped and accumulated; None where it has been deleted.
        before: The weights before the step.
        after: The weights after it.
        inside: What Fanion tells of the step beyond that; None for other optimizers, and for its
            groups of adamw and sgd.
    """

    names: list[str]
    group: str
    parameter: str
    lr: float
    gradient: Tensor | None
    before: Tensor
    after: Tensor
    inside: Observation | None


class _Copied(NamedTuple):
    """A parameter before a step of an optimizer that tells nothing itself."""

    group: str
    lr: float
    shard: Tensor


class Watcher(Callback):
    """Shows its subclass the matrices of every n-th optimizer step.

    The matrices of Fanion's matrix groups are shown from inside the step. Of other optimizers,
    those weights are copied that ``split_parameters`` calls matrices, and compared afterwards.

    Args:
        every_n_steps: Interval in optimizer steps, from the first one on.
        parameters: Patterns of the names of parameters to look at, * for anything; None: all.

    Raises:
        ValueError: If the interval is below 1.
    """

    def __init__(self, every_n_steps: int, parameters: Sequence[str] | None) -> None:
        self.every_n_steps = positive_int(every_n_steps, "every_n_steps")
        self.parameters = None if parameters is None else list(parameters)
        self._names: dict[Tensor, str] = {}
        self._copies: dict[Tensor, _Copied] = {}
        self._forms: dict[Tensor, dict[str, Any]] = {}
        self._hooks: list[RemovableHandle] = []
        self._taken: dict[int, int] = {}  # optimizer -> its steps so far
        self._looking = False

    @abstractmethod
    def _look(self, seen: Seen) -> None:
        """Take what is wanted of some matrices; tensors are not to be kept or changed."""

    @abstractmethod
    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything of this step has been shown."""

    def _is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses patterns that no parameter matches; a fresh run's steps are counted anew."""
        if trainer.ckpt_path is None and stepped(trainer) == 0:
            self._taken = {}
        names = _names(pl_module)
        for pattern in self.parameters or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names.values()):
                raise ValueError(
                    f"parameters of {type(self).__name__}: no parameter's name matches {pattern!r}"
                )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sees to it that this step is shown, if it is one to look at."""
        # Each optimizer's own steps: in manual optimization not every batch is one.
        index = next(i for i, own in enumerate(trainer.optimizers) if own is optimizer)
        self._taken[index] = self._taken.get(index, 0) + 1
        if trainer.barebones or not self._is_due(self._taken[index] - 1):
            return
        self._looking = True
        self._names = {
            p: name
            for p, name in _names(pl_module).items()
            if self.parameters is None
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.parameters)
        }
        others = []
        for group in optimizer.param_groups:
            if isinstance(optimizer, Fanion) and not is_entrywise(group["algorithm"]):
                if self._observe not in optimizer.observers:
                    optimizer.observers += (self._observe,)
            else:
                others.append(group)
        self._copy(pl_module, others)
        if self._copies:
            # Not at the end of the batch, until when gradients and weights may change once more;
            # and not at all where a scaler skips the step.
            self._hooks.append(optimizer.register_step_post_hook(self._show_copies))

    def _show_copies(self, *args: Any) -> None:
        with torch.no_grad():
            for p in list(self._copies):
                for seen in _compared(p, self._names[p], self._copies.pop(p), self._forms[p]):
                    self._look(seen)

    def _copy(self, module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
        if not any(p.ndim > 1 and p in self._names for g in groups for p in g["params"]):
            return
        with warnings.catch_warnings():  # of low-rank adapters: the factory has said it
            warnings.simplefilter("ignore")
            assignments = assign(module)
        self._forms = {a.parameter: a.options for a in assignments if a.role == "matrix"}
        for group in groups:
            for p in group["params"]:
                if p in self._names and p in self._forms and p.grad is not None:
                    shard = local(p).detach().clone()
                    name = group.get("name", "matrix")
                    self._copies[p] = _Copied(name, float(group["lr"]), shard)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Ends the look."""
        if not self._looking:
            return
        self._release(trainer)
        self._finish(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves the optimizer alone."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the module."""
        self._names = {}

    def _release(self, trainer: Trainer) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._looking = False
        self._copies, self._forms = {}, {}
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Fanion):
                kept = [observe for observe in optimizer.observers if observe != self._observe]
                optimizer.observers = tuple(kept)

    def _in_order(self, matrices: Iterable[str]) -> list[str]:
        """Names of matrices in the order of the module's parameters."""
        order = {name: i for i, name in enumerate(self._names.values())}

        def place(matrix: str) -> tuple[int, int]:
            name, _, number = matrix.removesuffix("]").rpartition("[")
            return (order[name], int(number)) if name in order else (order.get(matrix, 0), 0)

        return sorted(matrices, key=place)

    def _observe(self, seen: Observation) -> None:
        name = self._names.get(seen.parameter)
        if name is None:
            return
        layout, splits = seen.group["layout"], seen.group["splits"]
        total = sum(s[0] for s in matrix_shapes(seen.parameter.shape, layout, splits))
        self._look(
            Seen(
                _numbered(name, seen.first, len(seen.before), total), seen.group["name"], name,
                float(seen.group["lr"]), seen.gradient, seen.before, seen.after, seen,
            )
        )  # fmt: skip


def positive_int(value: Any, name: str) -> int:
    """The value, if it is a whole number of at least 1.

    Raises:
        ValueError: If not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _names(module: nn.Module) -> dict[Tensor, str]:
    """Parameters by name, that of the module without its compiled wrappers."""
    return {p: name.replace("_orig_mod.", "") for name, p in module.named_parameters()}


def stepped(trainer: Trainer) -> int:
    """Optimizer steps before this one, by which Lightning logs training metrics."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _compared(p: Tensor, name: str, copied: _Copied, form: Mapping[str, Any]) -> Iterator[Seen]:
    layout, splits = form.get("layout", "flatten"), form.get("splits")

    def matrices(shard: Tensor) -> list[Tensor]:
        return to_matrices(gather(shard.detach(), p), layout, splits)

    before, after = matrices(copied.shard), matrices(local(p))
    gradients = [None] * len(before) if p.grad is None else matrices(local_grad(p))
    total, first = sum(map(len, before)), 0
    for part, weights in enumerate(before):
        names = _numbered(name, first, len(weights), total)
        yield Seen(
            names, copied.group, name, copied.lr, gradients[part], weights, after[part], None
        )
        first += len(weights)


def _numbered(name: str, first: int, count: int, total: int) -> list[str]:
    return [name] if total == 1 else [f"{name}[{i}]" for i in range(first, first + count)]

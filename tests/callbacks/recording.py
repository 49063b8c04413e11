"""Callbacks that record runs, and the matrices and norms that their values are compared with."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_fanions.callbacks.quantities import PREFIX
from lit_fanions.optim.matrices import to_matrices


def config(algorithm: str = "muon", **options: Any) -> dict[str, Any]:
    matrix = {"algorithm": algorithm, "lr": 0.05, "weight_decay": 0.1, **options}
    return {"matrix": matrix, "other": {"lr": 0.01}}


class LoggedValues(Callback):
    """The monitor's values after each step, by tag without the prefix."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.steps.append(
            {k.removeprefix(PREFIX): float(v) for k, v in metrics if k.startswith(PREFIX)}
        )


class BreakOneGradient(Callback):
    """Makes a scaled gradient infinite in the third step."""

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == 2:
            pl_module.down.weight.grad[0, 0] = torch.inf


class StepRecords(Callback):
    """Gradients and weights around every step, seen from outside."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.momenta: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.before.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        named = dict(pl_module.named_parameters())
        self.gradients.append({n: p.grad.clone() for n, p in named.items()})
        self.after.append({n: p.detach().clone() for n, p in named.items()})
        state = trainer.optimizers[0].state
        self.momenta.append(
            {n: state[p]["momentum"].clone() for n, p in named.items() if "momentum" in state[p]}
        )


FORMS = {"attention.in_proj_weight": {"splits": 3}, "experts": {"layout": "batch"}}


def matrix(tensors: dict[str, Tensor], name: str) -> Tensor:
    parameter, _, index = name.removesuffix("]").partition("[")
    parts = to_matrices(tensors[parameter], **FORMS.get(parameter, {}))
    return torch.cat(parts)[int(index or 0)].double()


def svd(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x)


def norms_and_ranks(x: Tensor, k: int) -> dict[str, Tensor]:
    s = svd(x)
    square = s.square().sum()
    return {
        "nuclear": s.sum(), "spectral": s[0], "frobenius": square.sqrt(), "kyfan": s[:k].sum(),
        "nuclear_rank": s.sum().square() / square, "energy": s[:k].square().sum() / square,
    }  # fmt: skip


def scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]

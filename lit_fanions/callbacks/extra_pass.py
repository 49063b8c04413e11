"""Run ``training_step`` once more within a step, without a trace in logs and states."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RandomState(NamedTuple):
    """States of torch's generators, by which a pass repeats the random numbers of another."""

    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @classmethod
    def now(cls, module: nn.Module) -> RandomState:
        """Return the states of the CPU and of the GPUs that hold the module."""
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        return cls(torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices})


@contextlib.contextmanager
def unnoticed_pass(module: LightningModule, random: RandomState) -> Iterator[None]:
    """Use random numbers from a state; log nothing; restore running statistics and generators."""
    buffers = [
        buffer
        for part in module.modules()
        if getattr(part, "track_running_stats", False)
        for buffer in part.buffers(recurse=False)
    ]
    copies = [buffer.clone() for buffer in buffers]
    loggers = [vars(part) for part in module.modules() if hasattr(part, "log_dict")]
    with torch.enable_grad(), torch.random.fork_rng([*random.cuda]):
        torch.set_rng_state(random.cpu)
        for device, state in random.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for attributes in loggers:  # attributes of the instance precede the class's methods
            attributes["log"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            for attributes in loggers:
                del attributes["log"]
            with torch.no_grad():
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.copy_(copy)


def training_loss(
    trainer: Trainer, module: LightningModule, batch: Any, index: int
) -> Tensor | None:
    """Return the loss of ``training_step``, run as the Trainer runs it; None if it has none."""
    arguments = [batch, index] if _takes_index(module.training_step) else [batch]
    output: Any = trainer.strategy.training_step(*arguments)
    return output["loss"] if isinstance(output, Mapping) else output


def _takes_index(training_step: Any) -> bool:
    """Return whether ``training_step`` takes the index of the batch, as Lightning decides it."""
    parameters = inspect.signature(training_step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(
        p.name == "batch_idx" or p.kind is p.VAR_POSITIONAL for p in parameters
    )

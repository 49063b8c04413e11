"""Run ``training_step`` once more within a step, without a trace in logs and states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions.callbacks.lightning_interface import is_param_in_hook_signature

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RecordedBatch(NamedTuple):
    """A batch, and the states of torch's generators, by which a pass can be repeated."""

    batch: Any
    batch_idx: int
    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @classmethod
    def now(cls, module: LightningModule, batch: Any, batch_idx: int) -> RecordedBatch:
        """Record a batch with the states of the CPU and of the GPUs that hold the module."""
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        states = {device: torch.cuda.get_rng_state(device) for device in devices}
        return cls(batch, batch_idx, torch.get_rng_state(), states)

    @contextlib.contextmanager
    def replay(self, trainer: Trainer, module: LightningModule) -> Iterator[Tensor | None]:
        """Run ``training_step`` as the Trainer runs it, and yield its loss; None if it has none.

        Until the end of the context nothing is logged; then running statistics and generators are
        restored.
        """
        buffers = [
            buffer
            for part in module.modules()
            if getattr(part, "track_running_stats", False)
            for buffer in part.buffers(recurse=False)
        ]
        copies = [buffer.clone() for buffer in buffers]
        loggers = [vars(part) for part in module.modules() if hasattr(part, "log_dict")]
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with torch.enable_grad(), torch.random.fork_rng([*self.cuda]):
            torch.set_rng_state(self.cpu)
            for device, state in self.cuda.items():
                torch.cuda.set_rng_state(state, device)
            for attributes in loggers:  # attributes of the instance precede the class's methods
                attributes["log"] = lambda *args, **kwargs: None
            try:
                arguments = [self.batch, self.batch_idx] if takes_index else [self.batch]
                output: Any = trainer.strategy.training_step(*arguments)
                yield output["loss"] if isinstance(output, Mapping) else output
            finally:
                for attributes in loggers:
                    del attributes["log"]
                with torch.no_grad():
                    for buffer, copy in zip(buffers, copies, strict=True):
                        buffer.copy_(copy)

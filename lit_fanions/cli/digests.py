"""A callback that records digests of the weights, by which two trainings can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_fanions.cli.tensors import DIGESTS, digest


class RecordDigests(Callback):
    """Write a digest of every weight and buffer after each optimizer step.

    ``compare`` finds in them the first step and tensor in which two runs differ. Each step copies
    the weights to the CPU: meant for short runs of small networks.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights that the training starts from."""
        self._step = -1
        self._record(trainer, pl_module, "w")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the weights if the batch has ended a step."""
        self._record(trainer, pl_module, "a")

    def _record(self, trainer: Trainer, module: LightningModule, mode: str) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        values = {k: digest(v) for k, v in module.state_dict().items() if isinstance(v, Tensor)}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / DIGESTS).open(mode) as file:
            file.write(json.dumps({"step": self._step, "digests": values}) + "\n")

"""A training step never makes the host wait for the device; only logged steps do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils._python_dispatch import TorchDispatchMode

from lit_fanions.callbacks import StepMonitor
from models import Airbench, NanoGPT
from tests.models import airbench_runs, nanogpt_runs

EVERY = 4  # steps from one logged step to the next
# What the host cannot know before a device has computed it.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}


class CountWaits(TorchDispatchMode):
    """Counts the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.partition(".")[0] in WAITS
        return func(*args, **kwargs or {})


class ByStep(Callback):
    """Notes how many waits there were before each batch, and its optimizer step."""

    def __init__(self, waits: CountWaits) -> None:
        self.waits, self.seen = waits, []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.seen.append((trainer.global_step, self.waits.count))


def sgd(self: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(self.parameters(), lr=1e-3)  # Fanion looks at values on a CPU


@pytest.fixture
def waits() -> CountWaits:
    return CountWaits()


def steps_that_wait(module: Any, data: Any, waits: CountWaits, folder: Path, **options: Any) -> Any:
    by_step = ByStep(waits)
    callbacks = [StepMonitor(), by_step, TQDMProgressBar(), ModelCheckpoint(save_top_k=0)]
    trainer = Trainer(
        accelerator="cpu", callbacks=callbacks, logger=TensorBoardLogger(folder),
        log_every_n_steps=EVERY, limit_val_batches=0, enable_model_summary=False, **options,
    )  # fmt: skip
    with waits:
        trainer.fit(module, datamodule=data)
    pairs = zip(by_step.seen, by_step.seen[1:], strict=False)
    return {step for (step, before), (_, after) in pairs if after > before}, len(by_step.seen)


@pytest.mark.filterwarnings("ignore")
def test_nanogpt_waits_at_logged_steps_only(
    shards: Path, tmp_path: Path, waits: CountWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NanoGPT, "configure_optimizers", sgd)
    data = nanogpt_runs.data(shards, micro_batch_size=4)
    found, batches = steps_that_wait(nanogpt_runs.model(), data, waits, tmp_path, max_steps=11)
    assert batches == 22
    assert found == {3, 7}


@pytest.mark.filterwarnings("ignore")
def test_airbench_waits_at_logged_steps_only(
    tmp_path: Path, waits: CountWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Airbench, "configure_optimizers", sgd)
    data = airbench_runs.Stripes(batch_size=4)  # 16 steps an epoch
    module = airbench_runs.small(whiten=0)
    found, batches = steps_that_wait(module, data, waits, tmp_path, max_epochs=1)
    assert batches == 16
    assert found == {3, 7, 11}

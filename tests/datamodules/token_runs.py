"""Small token shards, a data module of them, and fits that record what they train on."""

import contextlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy

from datamodules import tokens as tk
from datamodules import windows as win
from datamodules.shards import write_shard
from datamodules.tokenizers import ByteTokenizer

BOS = 256


SIZES = (70, 3, 101, 77)  # 251 tokens: 31 windows of 8, of which 6 make a step and 5 an epoch


VAL = 45


LENGTH, SEQUENCES = 8, 6


def make_text(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write shards whose training windows all differ; return both splits' tokens."""
    rng = np.random.default_rng(0)
    train, val = (rng.integers(0, 256, n).astype(np.uint16) for n in (sum(SIZES), VAL))
    train[[3, 4, 30, 72, 73, 74, 75, 120, 160, 161, 200, 230, 249]] = BOS
    for i, part in enumerate(np.split(train, np.cumsum(SIZES)[:-1])):
        write_shard(folder / f"t_train_{i:06d}.bin", part)
    write_shard(folder / "t_val_000000.bin", val)
    return train.astype(np.int64), val.astype(np.int64)


class Tiny(tk.TokenDataModule):
    """Reads the shards of a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        defaults = {
            "batch_tokens": SEQUENCES * LENGTH, "sequence_length": LENGTH, "micro_batch_size": 4,
            "seed": 0,
        }  # fmt: skip
        super().__init__(ByteTokenizer(), **{**defaults, **options})
        self.folder = folder

    def shard_paths(self, split: tk.Split) -> list[Path]:
        return sorted(self.folder.glob(f"*_{split}_*.bin"))


class FakeTrainer:
    """A stand-in for a Trainer with the attributes that a DataModule reads outside a fit."""

    training = False
    fast_dev_run = False
    val_check_interval = 1.0
    check_val_every_n_epoch = 1

    def __init__(self, rank: int, world_size: int, accumulate_grad_batches: int = 1) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()
        self.accumulate_grad_batches = accumulate_grad_batches
        self.callbacks: list[Callback] = []


def ready(folder: Path, rank: int = 0, world_size: int = 1, **options: Any) -> Tiny:
    data = Tiny(folder, **options)
    data.trainer = FakeTrainer(rank, world_size)
    data.setup("fit")
    return data


def windows_of(batch: win.Batch) -> list[tuple[int, ...]]:
    """Return the sequences of a batch that have targets, each with its last target."""
    inputs, targets = batch
    found = []
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        if any(token != win.IGNORED for token in y):
            assert x[1:] == y[:-1]
            found.append((*x, y[-1]))
        else:
            assert x == [BOS] * len(x)
    return found


class Recorder(LightningModule):
    """Trains a bigram model in double precision and records its windows."""

    def __init__(self, fail_at: int = -1, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.ask_for_steps = ask_for_steps
        self.table = torch.nn.Embedding(257, 257, dtype=torch.float64)
        torch.nn.init.zeros_(self.table.weight)
        self.fail_at = fail_at
        self.batches = 0
        self.steps: dict[int, list[Any]] = defaultdict(list)
        self.validations: list[tuple[int, int]] = []

    def loss(self, batch: win.Batch) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.table(inputs).flatten(0, 1), targets.flatten(), reduction="sum")

    def training_step(self, batch: win.Batch, batch_idx: int) -> Tensor:
        if self.batches == self.fail_at:
            raise ArithmeticError("as the test wants it")
        self.batches += 1
        trainer = self.trainer
        assert trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.global_step
        self.steps[trainer.global_step] += windows_of(batch)
        return self.loss(batch) * trainer.world_size * trainer.accumulate_grad_batches / 48

    def on_validation_epoch_start(self) -> None:
        self.counted = 0

    def validation_step(self, batch: win.Batch, batch_idx: int) -> None:
        self.counted += int((batch[1] != win.IGNORED).sum())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append((self.trainer.global_step, self.counted))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # sets the loader up before the checkpoint's states are restored
            assert self.trainer.estimated_stepping_batches == 15
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class SaveAfter(Callback):
    """Saves a checkpoint after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"batch{done}.ckpt")


class Report(Callback):
    """Saves each process' windows, validations and weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Recorder)
        seen = dict(pl_module.steps), pl_module.validations, pl_module.table.weight.detach()
        torch.save(seen, self.folder / f"rank{trainer.global_rank}.pt")


class Result:
    """Windows, validations and weights of all processes of a fit."""

    def __init__(self, folder: Path, world_size: int) -> None:
        parts = [
            torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)
        ]
        self.steps = {
            step: sorted(window for part in parts for window in part[0][step])
            for step in parts[0][0]
        }
        self.validations = [
            (step, sum(part[1][i][1] for part in parts)) for i, (step, _) in enumerate(parts[0][1])
        ]
        self.weight = parts[0][2]
        assert all(torch.equal(part[2], self.weight) for part in parts)


def fit(
    folder: Path,
    *callbacks: Callback,
    world_size: int = 1,
    ckpt_path: Path | None = None,
    fail_at: int = -1,
    ask_for_steps: bool = False,
    max_steps: int = 12,
    options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> Result:
    seed_everything(0, verbose=False)
    for old in folder.glob("rank*.pt"):
        old.unlink()
    trainer = Trainer(
        **{"max_epochs": -1, "max_steps": max_steps, **trainer_options},
        accelerator="cpu",
        devices=world_size,
        strategy="ddp_fork" if world_size > 1 else "auto",
        callbacks=[*callbacks, Report(folder)],
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    data = Tiny(folder, **{"shuffle": True, "val_every_n_steps": 4, **(options or {})})
    with contextlib.suppress(ArithmeticError):
        trainer.fit(
            Recorder(fail_at, ask_for_steps),
            datamodule=data,
            ckpt_path=ckpt_path and str(ckpt_path),
        )
    if fail_at >= 0:
        return None  # type: ignore[return-value]
    return Result(folder, world_size)


def assert_continues(resumed: Result, full: Result, done: int) -> None:
    assert resumed.steps == {step: seen for step, seen in full.steps.items() if step >= done}
    later = [validation for validation in full.validations if validation[0] > done]
    assert [v for v in resumed.validations if v[0] > done] == later
    torch.testing.assert_close(resumed.weight, full.weight, rtol=0, atol=1e-12)

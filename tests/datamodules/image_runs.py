"""Small image sets, a data module of them, and fits that record what they train on."""

import contextlib
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from datamodules import augmentation as aug
from datamodules import images as im

COUNT, TEST_COUNT = 45, 23


class Tiny(im.ImageDataModule):
    """Random images; the label of an example is its index."""

    mean = (0.5, 0.4, 0.6)
    std = (0.25, 0.2, 0.3)

    def __init__(self, batch_size: int = 10, **options: Any) -> None:
        defaults = {
            "flip": "alternating", "translate": 2, "cutout": 4, "seed": 0, "show_images": 0
        }  # fmt: skip
        super().__init__(batch_size, **{**defaults, **options})

    def read(self, split: im.Split) -> aug.Batch:
        count = COUNT if split == "train" else TEST_COUNT
        return random_images(count, seed=count), torch.arange(count)


class FakeTrainer:
    """A stand-in for a Trainer with the attributes that a DataModule reads outside a fit."""

    training = False

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


class Recorder(LightningModule):
    """Trains one linear layer and records its batches."""

    def __init__(self, fail_at: int = -1, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 1)
        self.fail_at, self.ask_for_steps = fail_at, ask_for_steps
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: aug.Batch, batch_idx: int) -> Tensor:
        pixels, labels = batch
        if len(self.seen) == self.fail_at:
            raise ArithmeticError("as the test wants it")
        self.seen.append((labels.tolist(), pixels.double().sum().item()))
        return self.layer(pixels.flatten(1)).square().mean()

    def validation_step(self, batch: aug.Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # sets the loader up before the checkpoint's states are restored
            assert self.trainer.estimated_stepping_batches == 12
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def random_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def ready(rank: int = 0, world_size: int = 1, **options: Any) -> Tiny:
    data = Tiny(**options)
    data.trainer = FakeTrainer(rank, world_size)
    data.setup("fit")
    return data


def assert_same_batches(actual: list[aug.Batch], expected: list[aug.Batch]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def fit(
    tmp_path: Any,
    *callbacks: Any,
    ckpt_path: str | None = None,
    fail_at: int = -1,
    ask_for_steps: bool = False,
    **options: Any,
) -> Recorder:
    seed_everything(0, verbose=False)
    module = Recorder(fail_at, ask_for_steps)
    trainer = Trainer(
        **{"max_epochs": 3, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    with contextlib.suppress(ArithmeticError):
        trainer.fit(module, datamodule=Tiny(), ckpt_path=ckpt_path)
    module.finished_trainer = trainer
    return module


def assert_continues(resumed: Recorder, full: Recorder, done: int) -> None:
    assert resumed.seen == full.seen[done:]
    assert torch.equal(resumed.layer.weight, full.layer.weight)


BY_STEPS = {"max_epochs": -1, "max_steps": 12}

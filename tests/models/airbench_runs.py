"""Small airbench networks, their data and their Trainers."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from datamodules.augmentation import Batch
from datamodules.images import ImageDataModule, Split
from models import Airbench

SMALL: dict[str, Any] = {"widths": (8, 12, 16), "whiten": 40}


OPTIMIZER = {
    "matrix": {"lr": 0.24, "momentum": 0.6, "scale": "none", "renormalize": True},
    "other": {"algorithm": "sgd", "lr": 0.01, "momentum": 0.8, "nesterov": True},
    "schedule": {"shape": "linear"},
}


class Stripes(ImageDataModule):
    """Images of stripes whose width and direction determine the class."""

    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__(batch_size, "none", 1, 0, 0, 0)

    def read(self, split: Split) -> Batch:
        count = 64 if split == "train" else 30
        generator = torch.Generator().manual_seed(count)
        labels = torch.arange(count) % 10
        frequency = torch.stack([labels % 5 - 2, 1 + labels // 5 * 2], -1) / 10
        phase = torch.rand(count, 1, 1, generator=generator)
        position = torch.arange(32.0)
        across, down = (frequency[:, i, None, None] * position for i in (0, 1))
        wave = torch.sin(2 * torch.pi * (across + down.mT + phase))
        noise = torch.rand(count, 3, 32, 32, generator=generator)
        return (100 * (1 + wave)[:, None] + 50 * noise).to(torch.uint8), labels


def trainer(tmp_path: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 2, "logger": False, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def small(seed: int = 0, **options: Any) -> Airbench:
    seed_everything(seed, verbose=False)
    return Airbench(**{"optimizer": OPTIMIZER, **SMALL, **options})


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

"""A model and data that train in a moment; tests copy this file into a project folder."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_fanions import FanionConfig, configure_optimizers


class ToyNet(LightningModule):
    """Two linear layers.

    Args:
        width: Hidden units.
        smoothing: Label smoothing.
        optimizer: How to train.
    """

    def __init__(
        self, width: int = 8, smoothing: float = 0.0, optimizer: FanionConfig = FanionConfig()
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        self.smoothing = smoothing
        self.fanion_config = optimizer
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.net(x), y, label_smoothing=self.smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/acc", self._accuracy(batch))

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test/acc", self._accuracy(batch))
        self.log("test/acc_no_tta", self._accuracy(batch))
        self.log("test/loss", cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).argmax(-1)

    def configure_optimizers(self):
        return configure_optimizers(self, self.fanion_config)

    def _accuracy(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0]).argmax(-1) == batch[1]).float().mean()


class Failing(ToyNet):
    """Fails in the third step."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 2:
            raise RuntimeError("the third step\n  went wrong")
        return super().training_step(batch, index)


class Interrupted(ToyNet):
    """Gets Ctrl-C in the fifth step of its first epoch.

    Args:
        times: Number of Ctrl-C signals, one right after the other.
    """

    def __init__(self, times: int = 1, optimizer: FanionConfig = FanionConfig()) -> None:
        super().__init__(optimizer=optimizer)
        self.times = times

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 4 and self.current_epoch == 0:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return super().training_step(batch, index)


class Slow(ToyNet):
    """Writes a file in each step, and trains slowly."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        Path("training").write_text(str(os.getpid()))
        time.sleep(0.05)
        return super().training_step(batch, index)


class ToyData(LightningDataModule):
    """64 points of two classes.

    Args:
        data_dir: A folder that must exist.
        batch_size: Points per batch.
    """

    def __init__(self, data_dir: str | None = None, batch_size: int = 8) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise FileNotFoundError(f"no folder {self.data_dir}: pass --data.data_dir")

    def train_dataloader(self) -> "ResumableLoader":
        return ResumableLoader(self.val_dataloader(), self)

    def val_dataloader(self) -> DataLoader:
        points = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
        labels = (points[:, 0] > points[:, 1]).long()
        return DataLoader(TensorDataset(points, labels), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class ResumableLoader:
    """Starts every epoch at the batch that the trainer has reached.

    Args:
        loader: Batches of an epoch.
        datamodule: Data module whose trainer has the position.
    """

    def __init__(self, loader: DataLoader, datamodule: ToyData) -> None:
        self.loader = loader
        self.datamodule = datamodule

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        progress = self.datamodule.trainer.fit_loop.epoch_loop.batch_progress
        yield from itertools.islice(self.loader, progress.current.completed, None)

    def state_dict(self) -> dict[str, int]:
        """Return nothing; Lightning continues a resumed epoch only for loaders with this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass

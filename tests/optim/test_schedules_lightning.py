"""Schedules as long as a Lightning run, whatever changes the length of the run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_fanions import Fanion, ScheduleConfig
from lit_fanions.optim.factory import steps_left
from lit_fanions.optim.schedules import GroupSchedule

EXAMPLES = 64
LR = 0.1


class Net(LightningModule):
    """Records its lr at every optimizer step; batch_size(epoch) may change by epoch."""

    def __init__(self, batch_size: int | Callable[[int], int] = 8) -> None:
        super().__init__()
        self.layer, self.batch_size = nn.Linear(4, 4, bias=False), batch_size
        self.lrs: list[float] = []

    def train_dataloader(self) -> DataLoader:
        size = self.batch_size
        data = TensorDataset(torch.randn(EXAMPLES, 4))
        return DataLoader(data, size(self.current_epoch) if callable(size) else size)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def on_before_optimizer_step(self, optimizer: Fanion) -> None:
        self.lrs.append(round(optimizer.param_groups[0]["lr"] / LR, 6))

    def scheduled(self, layer: nn.Module) -> tuple[Fanion, dict[str, Any]]:
        optimizer = Fanion(layer.parameters(), lr=LR)
        schedule = ScheduleConfig(shape="linear")
        scheduler = GroupSchedule(optimizer, [schedule], lambda: steps_left(self.trainer))
        return optimizer, {"scheduler": scheduler, "interval": "step"}

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.scheduled(self.layer)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(tmp_path, **options: Any) -> Trainer:
    quiet = dict.fromkeys(
        ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False
    )
    return Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options}
    )


def straight(steps: int) -> list[float]:
    """Multipliers of a linear schedule over so many steps."""
    return [pytest.approx(1 - i / steps, abs=1e-5) for i in range(steps)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 24),
        ({"accumulate_grad_batches": 3}, 9),
        ({"limit_train_batches": 3}, 9),
        ({"max_epochs": -1, "max_steps": 10}, 10),
        ({"max_steps": 10}, 10),
        ({"callbacks": [GradientAccumulationScheduler({0: 2, 1: 1})]}, 20),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 2: 4})]}, 18),
        ({"overfit_batches": 2}, 6),
    ],
)
def test_schedule_ends_with_the_run(tmp_path, options, steps):
    net = Net()
    run = trainer(tmp_path, **options)
    run.fit(net)
    assert net.lrs == straight(steps)
    assert run.lr_scheduler_configs[0].scheduler.total_steps == steps


def test_steps_of_batch_size_trials_are_not_the_length_of_the_schedule(tmp_path):
    net = Net(batch_size=2)
    trainer(tmp_path, callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=3)]).fit(net)
    assert net.batch_size == 4
    assert net.lrs[-48:] == straight(48)


def test_steps_of_lr_find_are_not_the_length_of_the_schedule(tmp_path):
    class Finder(LearningRateFinder):
        def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().lr_find(trainer, pl_module)
            pl_module.lrs.clear()

    net = Net()
    net.lr = LR
    finder = Finder(num_training_steps=3, update_attr=False)
    trainer(tmp_path, callbacks=[finder]).fit(net)
    # lr_find sets its suggestion in the optimizer before the first step.
    assert net.lrs[1:] == straight(24)[1:]


def test_second_fit_has_a_schedule_of_its_own_steps(tmp_path):
    net, run = Net(), trainer(tmp_path)
    run.fit(net)
    run.fit_loop.max_epochs = 5
    run.fit(net)
    assert net.lrs == straight(24) + straight(16)


def test_longer_run_continues_the_schedule_of_a_checkpoint(tmp_path):
    first, longer = Net(), Net()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, callbacks=[saved], enable_checkpointing=True).fit(first)
    path = str(tmp_path / "epoch=0-step=4.ckpt")
    trainer(tmp_path, max_epochs=6).fit(longer, ckpt_path=path)
    assert longer.lrs[1:] == straight(48)[5:]


def test_run_resumed_with_another_batch_size_ends_at_the_floor(tmp_path):
    first, second = Net(), Net(batch_size=16)
    saved = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer(tmp_path, callbacks=[saved], enable_checkpointing=True).fit(first)
    trainer(tmp_path).fit(second, ckpt_path=str(tmp_path / "epoch=0-step=8.ckpt"))
    assert second.lrs[1:] == straight(8 + 8)[9:]


def test_run_continued_on_the_same_trainer_keeps_its_schedule(tmp_path):
    net = Net()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    run = trainer(tmp_path, callbacks=[saved], enable_checkpointing=True)
    run.fit(net)
    net.lrs.clear()
    run.fit(net, ckpt_path=str(tmp_path / "epoch=0-step=4.ckpt"))
    assert net.lrs == straight(24)[4:]


@pytest.mark.parametrize("sizes", [(8, 16, 16), (16, 8, 4)])
def test_loader_with_another_length_in_every_epoch_never_has_a_zero_lr(tmp_path, sizes):
    net = Net(batch_size=lambda epoch: sizes[epoch])
    trainer(tmp_path, reload_dataloaders_every_n_epochs=1).fit(net)
    assert len(net.lrs) == sum(EXAMPLES // size for size in sizes)
    assert all(lr > 0 for lr in net.lrs) and net.lrs[-1] < 0.1


def test_changed_max_epochs_are_noticed_during_the_run(tmp_path):
    class Extend(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.fit_loop.max_epochs = 4

    net = Net()
    trainer(tmp_path, max_epochs=2, callbacks=[Extend()]).fit(net)
    assert net.lrs == straight(32)


class TwoOptimizers(Net):
    """Both optimizers step in every batch, under manual optimization."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 4, bias=False)

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        for optimizer, scheduler, layer in zip(
            self.optimizers(), self.lr_schedulers(), (self.layer, self.other), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).square().mean())
            self.lrs.append(round(optimizer.param_groups[0]["lr"] / LR, 6))
            optimizer.step()
            scheduler.step()

    def on_before_optimizer_step(self, optimizer: Fanion) -> None:
        pass

    def configure_optimizers(self) -> Any:
        made = [self.scheduled(layer) for layer in (self.layer, self.other)]
        return [optimizer for optimizer, _ in made], [scheduler for _, scheduler in made]


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 24), ({"max_epochs": -1, "max_steps": 20}, 10)]
)
def test_both_schedules_of_two_optimizers_end_with_the_run(tmp_path, options, steps):
    net = TwoOptimizers()
    trainer(tmp_path, **options).fit(net)
    assert net.lrs[::2] == straight(steps)
    assert net.lrs[1::2][:-1] == straight(steps)[:-1]

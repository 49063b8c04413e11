"""Lightning's fine-tuning callbacks, which add groups with nothing but parameters and an lr."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn

from lit_fanions import Fanion, configure_optimizers
from lit_fanions.callbacks import FanionOptimizer, SpectralMonitor
from tests.callbacks.nets import BATCHES, Net, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:vectors were added without an algorithm"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Finetuned(Net):
    """A backbone with vectors under a head.

    Args:
        way: How the module comes to Fanion.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))
        for part in (self.embed, self.conv, self.attention, self.down, self.head):
            part.requires_grad_(False)
        self.experts.requires_grad_(False)
        self.top = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.backbone(x.float()).tanh())

    def configure_optimizers(self) -> Any:
        trainable = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if self.way == "drop-in":
            optimizer = torch.optim.SGD([p for _, p in trainable], lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        if self.way in ("factory", "factory with a schedule"):
            shape = "linear" if "schedule" in self.way else "constant"
            return configure_optimizers(self, schedule={"shape": shape})
        matrices = [pair for pair in trainable if pair[1].ndim > 1]
        if self.way == "names":
            return Fanion(matrices, lr=0.02)
        return Fanion([p for _, p in matrices], lr=0.02)


class TwoStages(BaseFinetuning):
    """Unfreeze one layer after the other."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch < 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[2 - 2 * epoch], optimizer)


WAYS = ["factory", "factory with a schedule", "drop-in", "no names", "names"]


def backbone(epoch: int) -> BackboneFinetuning:
    return BackboneFinetuning(epoch, backbone_initial_ratio_lr=0.1)


@pytest.mark.parametrize("callback", ["backbone", "two stages"])
@pytest.mark.parametrize("way", WAYS)
def test_unfrozen_layers_train(tmp_path, way, callback):
    net = Finetuned(way)
    before = {name: p.detach().clone() for name, p in net.backbone.named_parameters()}
    finetuning = backbone(1) if callback == "backbone" else TwoStages()
    extra = [FanionOptimizer()] if way == "drop-in" else []
    run = fit(tmp_path, net, finetuning, *extra, SpectralMonitor(every_n_steps=2), max_epochs=3)
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, Fanion)
    algorithms = {p: g["algorithm"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in net.backbone.named_parameters():
        if callback == "two stages" and name.startswith("1."):
            continue  # never unfrozen
        assert algorithms[p] == ("muon" if p.ndim > 1 else "adamw")
        assert not torch.equal(p, before[name])
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)


def test_matrices_of_a_backbone_start_at_the_ratio_of_their_own_lr(tmp_path):
    run = fit(tmp_path, Finetuned("factory"), backbone(1), max_epochs=2)
    lrs = {group["name"]: group["lr"] for group in run.optimizers[0].param_groups}
    # The callback takes its lr from the head's, .001 of AdamW.
    assert lrs["matrix.late"] == pytest.approx(0.02 / 10)
    assert lrs["vector.late"] == pytest.approx(0.001 / 10)


def test_late_groups_reach_the_end_of_the_schedule(tmp_path):
    run = fit(tmp_path, Finetuned("factory with a schedule"), backbone(1), max_epochs=3)
    steps = 3 * BATCHES
    (schedule,) = [config.scheduler for config in run.lr_scheduler_configs]
    assert schedule.last_epoch == steps
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0] * 4


def test_run_is_resumed_after_unfreezing(tmp_path):
    def run(ckpt_path: Path | None = None) -> Any:
        keep = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
        net = Finetuned("factory with a schedule")
        return fit(tmp_path, net, backbone(1), keep, max_epochs=4, ckpt_path=ckpt_path)

    straight = run()
    (saved,) = (tmp_path / "saved").glob("*epoch=1.ckpt")
    resumed = run(saved)
    names, lrs = (
        [[group[key] for group in r.optimizers[0].param_groups] for r in (straight, resumed)]
        for key in ("name", "lr")
    )
    assert names[0] == names[1] and lrs[0] == lrs[1]

"""The controls: what they keep, what they make random, and that they reach the groups."""

import lightning
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from experiments import controls
from lit_fanions import Fanion
from lit_fanions.lmo import BALLS, Case, Problem
from lit_fanions.optim.algorithms import ALGORITHMS
from lit_fanions.optim.schedules import ScheduleConfig, alpha_at


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Leave the tables of balls and algorithms as they were."""
    for table in (BALLS, ALGORITHMS):
        for name in [*table]:
            monkeypatch.setitem(table, name, table[name])
        monkeypatch.delitem(table, controls.NAME, raising=False)
    yield
    for table in (BALLS, ALGORITHMS):
        table.pop(controls.NAME, None)


def test_random_spectrum_keeps_singular_vectors_and_length():
    m = torch.randn(3, 4, 6, dtype=torch.float32)
    d = controls.random_spectrum(Problem(m, Case(4, 4, 6))).direction
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    values = u.mT @ d @ vh.mT
    w = values.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(values, torch.diag_embed(w), atol=1e-5)
    assert (w > 0).all()
    assert torch.allclose(torch.linalg.matrix_norm(d), torch.tensor(2.0))  # as U V^T
    other = controls.random_spectrum(Problem(m, Case(4, 4, 6))).direction
    assert not torch.allclose(d, other)
    zero = controls.random_spectrum(Problem(torch.zeros(4, 6), Case(4, 4, 6))).direction
    assert not zero.any()


class Net(lightning.LightningModule):
    """A linear layer in one group, which records the group's options at every step."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        self.options = options
        self.seen = []

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return Fanion(self.layer.parameters(), lr=0.1, **self.options)

    def optimizer_step(self, epoch, index, optimizer, closure):
        super().optimizer_step(epoch, index, optimizer, closure)
        self.seen.append(
            (optimizer.param_groups[0]["algorithm"], optimizer.param_groups[0]["alpha"])
        )


class ScheduledAlpha(Callback):
    """Sets alpha as a schedule from .9 to .5 does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        schedule = ScheduleConfig(alpha_end=0.5)
        for group in optimizer.param_groups:
            group["alpha"] = alpha_at(schedule, 0.9, trainer.global_step, 4)


def train(callback, tmp_path, **options):
    net = Net(**options)
    trainer = Trainer(
        accelerator="cpu", max_steps=4, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, DataLoader(torch.randn(16, 4), 4))
    return net


def test_random_spectrum_steps_muon_and_its_blends(tmp_path):
    net = train(controls.RandomSpectrum(), tmp_path, algorithm="f_muon")
    assert net.seen == [(controls.NAME, 0.5)] * 4


def test_random_spectrum_refuses_a_training_without_muon(tmp_path):
    with pytest.raises(ValueError, match="no group has the algorithm muon or"):
        train(controls.RandomSpectrum(), tmp_path, algorithm="neon")


def test_shuffled_alphas_are_those_of_the_schedule_in_another_order(tmp_path):
    lightning.seed_everything(1)
    alphas = [
        [alpha for _, alpha in train(callback, tmp_path, algorithm="f_muon", alpha=0.9).seen]
        for callback in (controls.ShuffledAlpha(0.9, 0.5), ScheduledAlpha())
    ]
    assert sorted(alphas[0]) == pytest.approx(sorted(alphas[1]))
    assert alphas[0] != alphas[1]
    assert alphas[1] == pytest.approx([0.9, 0.8, 0.7, 0.6])


def test_another_seed_is_another_order(tmp_path):
    orders = []
    for seed in (1, 2, 1):
        lightning.seed_everything(seed)
        net = train(controls.ShuffledAlpha(0.9, 0.5), tmp_path, algorithm="f_muon")
        orders.append(net.seen)
    assert orders[0] == orders[2] != orders[1]

"""SharpnessAware: the second pass repeats the first at other weights, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_fanions import SharpnessAscent
from lit_fanions.callbacks import SharpnessAware, SpectralMonitor
from tests.callbacks.nets import Net, assert_bit_equal, everything, fit, loader
from tests.callbacks.recording import LoggedValues, config
from tests.callbacks.test_two_processes import Sharded, run_ranks, strategy, whole_weights

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:SpectralMonitor has no logger"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


class WithStatistics(Net):
    """A network with dropout and running statistics."""

    def __init__(self, options: dict[str, Any] | None = None, dropout: float = 0.3) -> None:
        super().__init__(options or config(), dropout=dropout)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(x).mT)).mT
        x = x + self.down((x.unsqueeze(1) @ self.experts).relu().sum(1))
        return self.head(self.dropout(x.mean(1)))


@pytest.mark.parametrize("how", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
                         ids=str)  # fmt: skip
def test_a_radius_of_zero_changes_no_bit_of_the_training(tmp_path, how):
    folders = [tmp_path / "plain", tmp_path / "repeated"]
    plain = fit(folders[0], WithStatistics(), logger=CSVLogger(folders[0], "", ""), **how)
    callback = SharpnessAware(rho=0.0)
    repeated = fit(
        folders[1], WithStatistics(), callback, logger=CSVLogger(folders[1], "", ""), **how
    )
    assert_bit_equal(everything(plain), everything(repeated))
    first, second = ((folder / "metrics.csv").read_text() for folder in folders)
    assert first == second and "train/loss" in first
    assert "log" not in vars(repeated.lightning_module)


@pytest.mark.parametrize("exact", [True, False])
def test_training_is_that_of_the_plain_loop(tmp_path, exact):
    net = Net(config())
    fit(tmp_path, net, SharpnessAware(0.2, exact=exact))
    other = Net(config())
    optimizer = other.configure_optimizers()["optimizer"]
    ascent = SharpnessAscent(other, 0.2, exact=exact)

    def backward(batch: list[Tensor]) -> None:
        optimizer.zero_grad()
        cross_entropy(other(batch[0]), batch[1]).backward()

    for batch in loader():
        backward(batch)
        with ascent:
            backward(batch)
        optimizer.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    plain = fit(tmp_path, Net(config())).lightning_module
    assert not torch.equal(net.down.weight, plain.down.weight)


class GradientsAtStep(Callback):
    """Weights and gradients that the optimizer sees."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.weight = pl_module.down.weight.detach().clone()
        self.gradient = pl_module.down.weight.grad.clone()


@pytest.mark.parametrize("after", [True, False])
def test_monitors_see_the_second_gradient_at_the_restored_weights(tmp_path, after):
    values, seen = LoggedValues(), GradientsAtStep()
    callbacks = [SpectralMonitor(1, exact=True), SharpnessAware(0.2)]
    callbacks = callbacks[::-1] if after else callbacks
    net = Net(torch_optimizer=True)
    fit(tmp_path, net, *callbacks, seen, values, max_steps=1)
    step = values.steps[0]
    assert step["weight_spectral/down.weight"] == pytest.approx(
        float(torch.linalg.matrix_norm(seen.weight.double(), 2)), rel=1e-6
    )
    assert step["gradient_frobenius/down.weight"] == pytest.approx(
        float(seen.gradient.norm()), rel=1e-5
    )
    torch.testing.assert_close(net.down.weight, seen.weight - 0.05 * seen.gradient)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__(config())
        self.automatic_optimization = False


def test_trainings_that_it_cannot_repeat_are_refused(tmp_path):
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    for net, options, message in (
        (Manual(), {}, "automatic optimization"),
        (Net(config()), {"accumulate_grad_batches": 2}, "accumulate_grad_batches = 2"),
        (Net(config()), {"plugins": [scaler]}, "gradient scaler"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(tmp_path, net, SharpnessAware(), **options)
    with pytest.raises(ValueError, match="rho"):
        SharpnessAware(rho=-1)


class Skipping(Net):
    """Skips its second batch."""

    def training_step(self, batch: list[Tensor]) -> Tensor | None:
        if self.global_step == 1 and not hasattr(self, "skipped"):
            self.skipped = True
            return None
        return cross_entropy(self(batch[0]), batch[1])


def test_steps_without_a_loss_or_an_index_are_repeated_too(tmp_path):
    net = Skipping(config())
    run = fit(tmp_path, net, SharpnessAware(0.1))
    assert net.skipped and run.global_step == 6
    assert all(p.isfinite().all() for p in net.parameters())


# Adam would make whole steps of the rounding errors that are the gradient of some biases.
SMOOTH = {**config("nsgd"), "other": {"algorithm": "sgd", "lr": 0.01}}


def _halves(base: type[Net]) -> type[Net]:
    """Return a network that takes this rank's half of each batch."""

    class Halved(base):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return super().training_step([x[self.global_rank :: 2] for x in batch], index)

    return Halved


def _train(rank: int, folder: Path, kind: str) -> None:
    net = _halves(Net if kind == "ddp" else Sharded)(SMOOTH)
    run = fit(folder, net, SharpnessAware(0.2), strategy=strategy(kind), devices=2,
              use_distributed_sampler=False)  # fmt: skip
    torch.save(whole_weights(run), folder / f"{rank}.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(tmp_path, kind):
    run_ranks(_train, tmp_path, kind)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_bit_equal(first, second)
    one = fit(tmp_path, Net(SMOOTH), SharpnessAware(0.2))
    want = dict(one.lightning_module.named_parameters())
    for name, weight in first.items():
        torch.testing.assert_close(weight, want[name].detach(), rtol=1e-3, atol=1e-4, msg=name)
    plain = fit(tmp_path, Net(SMOOTH)).lightning_module.down.weight
    assert not torch.allclose(plain, first["down.weight"], rtol=1e-3, atol=1e-4)

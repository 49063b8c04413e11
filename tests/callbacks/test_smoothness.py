"""SmoothnessMonitor: L on problems whose L is known, and no trace in the training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lit_fanions import Fanion, bounds, norms
from lit_fanions.callbacks import SmoothnessMonitor
from tests.callbacks.nets import MATRICES, Net, assert_bit_equal, everything, fit
from tests.callbacks.recording import LoggedValues, config
from tests.callbacks.test_sharpness import WithStatistics

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
A, B, LR = 3.0, 0.5, 0.1


class Quadratic(Net):
    """The loss 1/2 <W - S, A (W - S) B> of one matrix in float64; the batch plays no part."""

    def __init__(self, algorithm: str, left: Tensor, right: Tensor, **options: Any) -> None:
        nn.Module.__init__(self)
        super().__init__()
        for name in ("embed", "conv", "attention", "down", "head", "dropout"):
            setattr(self, name, None)
        del self.experts
        self.algorithm, self.options = algorithm, options
        self.left, self.right = left, right
        generator = torch.Generator().manual_seed(1)
        shape = len(left), len(right)
        self.target = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        rest = self.weight - self.target
        return (rest * (self.left @ rest @ self.right)).sum() / 2

    def configure_optimizers(self) -> Fanion:
        return Fanion(
            [("weight", self.weight)], lr=LR, algorithm=self.algorithm, momentum=0.0,
            weight_decay=0.0, polar="exact", solver="exact", **self.options,
        )  # fmt: skip


def values_of(path: Path, net: Quadratic) -> list[dict[str, float]]:
    values = LoggedValues()
    fit(path, net, SmoothnessMonitor(1), values)
    return [{tag.split("/")[0]: x for tag, x in step.items()} for step in values.steps]


@pytest.mark.parametrize(
    ("algorithm", "norm"),
    [("muon", norms.Spectral()), ("neon", norms.Nuclear()), ("nsgd", norms.Frobenius()),
     ("signum", norms.MaxEntry())],
)  # fmt: skip
def test_the_estimate_of_a_scalar_quadratic_is_its_smoothness(tmp_path, algorithm, norm):
    """With A = a I and B = b I the oracle's directions attain L of the ball, a constant."""
    left, right = A * torch.eye(5).double(), B * torch.eye(4).double()
    net = Quadratic(algorithm, left, right, scale="original")
    want = float(bounds.smoothness(norm, left, right))
    for step in values_of(tmp_path, net):
        assert step["smoothness_estimate"] == pytest.approx(want, rel=1e-6)
        fitted = step["smoothness_constant"] + 0 * step["smoothness_slope"]
        assert fitted == pytest.approx(want, rel=1e-3)
        assert step["smoothness_slope"] == pytest.approx(0, abs=1e-3)
        assert step["smoothness_lr"] == pytest.approx(LR * (5 / 4) ** 0.5)
        assert step["smoothness_gluon_lr"] == pytest.approx(step["smoothness_descent_lr"], rel=1e-3)


@pytest.mark.parametrize("algorithm", ["muon", "f_muon", "fanion"])
def test_estimates_stay_below_the_smoothness_and_steps_follow_from_it(tmp_path, algorithm):
    generator = torch.Generator().manual_seed(2)
    roots = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (5, 4)]
    left, right = (root @ root.mT for root in roots)
    options = {"rank": 2} if algorithm == "fanion" else {}
    net = Quadratic(algorithm, left, right, **options)
    norm = {
        "muon": norms.Spectral(),
        "f_muon": norms.Blend(norms.Spectral(), 0.5),
        "fanion": norms.KyFanDual(2),
    }[algorithm]
    bound = float(bounds.smoothness(norm, left, right))
    steps = values_of(tmp_path, net)
    gradient = -left @ net.target @ right  # of the first step
    largest = 0.0
    for i, step in enumerate(steps):
        assert 0 < step["smoothness_estimate"] <= bound * (1 + 1e-9)
        largest = max(largest, step["smoothness_estimate"])
        if i == 0:
            size = float(norm.dual(gradient))
            assert step["smoothness_descent_lr"] == pytest.approx(size / largest, rel=1e-6)
            assert step["smoothness_gluon_lr"] == pytest.approx(size / largest, rel=1e-6)


class Exponential(Quadratic):
    """The loss exp <W, A>: along the oracle's direction the gradient shrinks in a known way."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.weight * self.left).sum().exp()


@pytest.mark.parametrize(
    ("algorithm", "norm"),
    [("muon", norms.Spectral()), ("neon", norms.Nuclear()), ("nsgd", norms.Frobenius())],
)
def test_the_fit_of_an_exponential_is_its_slope_alone(tmp_path, algorithm, norm):
    """A step of lr divides the loss by e^(lr a), a the dual norm of A: L = L1 |G|_dual."""
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()
    net = Exponential(algorithm, a, torch.eye(4).double(), scale="none")
    slope = (1 - math.exp(-LR * float(norm.dual(a)))) / LR
    steps = values_of(tmp_path, net)
    assert len(steps) > 2
    for step in steps[1:]:  # one look alone tells no slope
        assert step["smoothness_slope"] == pytest.approx(slope, rel=1e-6)
        assert step["smoothness_constant"] == pytest.approx(0, abs=1e-6)
        assert step["smoothness_gluon_lr"] == pytest.approx(1 / slope, rel=1e-6)


def test_steps_of_lemma_7_and_gluon_decrease_a_quadratic_as_promised(tmp_path):
    """With L0 = L and L1 = 0 both steps are |G|_dual / L, which gains |G|_dual^2 / (2 L)."""
    left, right = A * torch.eye(5).double(), B * torch.eye(4).double()
    net = Quadratic("muon", left, right, scale="none")
    norm, rest = norms.Spectral(), -net.target
    bound = float(bounds.smoothness(norm, left, right))
    step = values_of(tmp_path, net)[0]
    gradient = left @ rest @ right
    size = float(norm.dual(gradient))
    for lr in (step["smoothness_descent_lr"], step["smoothness_gluon_lr"]):
        assert lr == pytest.approx(size / bound, rel=1e-6)
        moved = rest - lr * norm.lmo(gradient)
        before, after = ((x * (left @ x @ right)).sum() / 2 for x in (rest, moved))
        assert float(before - after) >= size**2 / (2 * bound) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (config("muon"), {"gradient_clip_val": 0.1}),
        (config("fanion", rank=2), {"accumulate_grad_batches": 2}),
        (config("f_neon"), {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_a_look_changes_no_bit_of_the_training(tmp_path, options, how):
    folders = [tmp_path / "plain", tmp_path / "watched"]
    plain = fit(folders[0], WithStatistics(options), logger=CSVLogger(folders[0], "", ""), **how)
    watched = fit(folders[1], WithStatistics(options), SmoothnessMonitor(2),
                  logger=CSVLogger(folders[1], "", ""), **how)  # fmt: skip
    assert_bit_equal(everything(plain), everything(watched))
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in folders]
    losses = [[row.split(",")[-1] for row in own] for own in rows]
    assert "train/loss" in losses[0][0] and set(losses[0]) <= {*losses[1], ""}
    names = [name for name in MATRICES if not name.startswith("attention")]
    logged = watched.callback_metrics
    assert {f"spectral/smoothness_estimate/{name}" for name in names} <= set(logged)
    assert "spectral/smoothness_gluon_lr/group/matrix" in logged


class Diverged(WithStatistics):
    """Has no finite gradient."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step(batch, index) * math.nan


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_non_finite_gradients_and_weights_are_not_logged_and_end_no_run(tmp_path, nonfinite):
    monitor = SmoothnessMonitor(1)
    trainer = fit(tmp_path, Diverged(config("muon", nonfinite=nonfinite)), monitor)
    assert trainer.global_step > 1
    assert monitor.history == {}


def test_a_resumed_run_keeps_the_history(tmp_path):
    monitor = SmoothnessMonitor(1)
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3)
    fit(tmp_path, Net(config()), monitor, saving, max_steps=3)
    resumed = SmoothnessMonitor(1)
    fit(tmp_path, Net(config()), resumed, ckpt_path=tmp_path / "last.ckpt", max_steps=5)
    assert resumed._probe is None  # the batch is not kept after the fit
    for name in MATRICES:
        assert resumed.history[name][:3] == monitor.history[name]
        assert len(resumed.history[name]) == 5


def test_what_has_no_ball_or_no_quick_norm_is_refused(tmp_path):
    manual = Net(config())
    manual.automatic_optimization = False
    for net, message in (
        (Net(torch_optimizer=True), "SmoothnessMonitor needs Fanion: SGD"),
        (Net(config("s_muon")), "unknown or slow"),
        (Net(config("f_muon", alpha=1.1)), "unknown or slow"),
        (manual, "automatic optimization"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(tmp_path, net, SmoothnessMonitor(1))

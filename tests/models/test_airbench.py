"""The airbench network: its parts against slow references, and its life in a Trainer."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from datamodules.images import Batch, ImageDataModule, Split
from lit_fanions import FanionConfig
from models import Airbench
from models.airbench import BatchNorm, augmented_logits, whitening_filters

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

SMALL: dict[str, Any] = {"widths": (8, 12, 16), "whiten": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "94 muon": {},
    "93": {"widths": (64, 128, 128), "logit_scale": 1 / 9, "unit_head": False},
    "94": {"logit_scale": 1 / 9, "unit_head": False},
    "95": {"widths": (128, 384, 384), "logit_scale": 1 / 9, "unit_head": False},
    "96": {
        "widths": (128, 384, 512),
        "depth": 3,
        "residual": True,
        "bn_momentum": 0.1,
        "logit_scale": 1 / 9,
        "unit_head": False,
    },
}
OPTIMIZER = {
    "matrix": {"lr": 0.24, "momentum": 0.6, "scale": "none", "renormalize": True},
    "other": {"algorithm": "sgd", "lr": 0.01, "momentum": 0.8, "nesterov": True},
    "schedule": {"shape": "linear"},
}


class Stripes(ImageDataModule):
    """Stripes whose width and direction tell their class."""

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


# --- the network ---


@pytest.mark.parametrize(
    ("variant", "total"),
    [
        ("94 muon", 1_971_640),
        ("93", 569_016),
        ("94", 1_971_640),
        ("95", 4_604_728),
        ("96", 9_915_704),
    ],
)
def test_parameter_counts(variant: str, total: int) -> None:
    model = Airbench(**VARIANTS[variant])
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == total
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == total - 288
    assert not parameters["whiten.weight"].requires_grad


def test_muon_variants_matrices() -> None:
    filters = [conv.weight for group in Airbench().groups for conv in group.convs]
    assert [(w.shape[0], w[0].numel()) for w in filters] == [
        (64, 216), (64, 576), (256, 576), (256, 2304), (256, 2304), (256, 2304)
    ]  # fmt: skip
    assert sum(w.numel() for w in filters) == 1_967_616


def test_scales_of_batch_norm_are_ones_and_no_parameters() -> None:
    model = small()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 6
    for norm in norms:
        assert [name for name, _ in norm.named_parameters()] == ["bias"]
        assert torch.equal(norm.weight, torch.ones_like(norm.bias))
        assert (norm.eps, norm.momentum) == (1e-12, 0.4)


def reference(model: Airbench, x: Tensor) -> Tensor:
    """The network in evaluation mode, spelled out."""

    def norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        x = (x - layer.running_mean[:, None, None]) / layer.running_var[:, None, None].sqrt()
        return x + layer.bias[:, None, None]

    sizes = [x.shape[-1]]
    x = F.gelu(F.conv2d(x, model.whiten.weight, model.whiten.bias))
    sizes.append(x.shape[-1])
    for group in model.groups:
        x = F.max_pool2d(F.conv2d(x, group.convs[0].weight, padding=1), 2)
        x = first = F.gelu(norm(group.norms[0], x))
        x = norm(group.norms[1], F.conv2d(x, group.convs[1].weight, padding=1))
        if len(group.convs) == 3:
            x = norm(group.norms[2], F.conv2d(F.gelu(x), group.convs[2].weight, padding=1))
        if group.residual:
            x = x + first
        x = F.gelu(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 31, 15, 7, 3]
    x = x.amax((2, 3))
    return x @ model.head.weight.T * model.logit_scale


@pytest.mark.parametrize("variant", ["94 muon", "96"])
def test_forward_is_the_recipes(variant: str) -> None:
    torch.manual_seed(0)
    model = Airbench(**{**VARIANTS[variant], "widths": (8, 12, 16)}).double()
    x = images(8).double()
    model.train()
    for _ in range(3):
        model(x)  # gives the batch norms statistics
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.bias)
    model.eval()
    torch.testing.assert_close(model(x).double(), reference(model, x), atol=1e-6, rtol=1e-5)


def test_logit_scale_defaults_to_one_over_the_width() -> None:
    assert Airbench().logit_scale == 1 / 256
    assert Airbench(logit_scale=1 / 9).logit_scale == 1 / 9


def test_convolutions_start_by_copying_their_input() -> None:
    for group in Airbench().groups:
        for conv in group.convs:
            copied = conv.weight[: conv.in_channels]
            expected = torch.zeros_like(copied)
            expected[range(len(copied)), range(len(copied)), 1, 1] = 1
            assert torch.equal(copied, expected)
            rest = conv.weight[conv.in_channels :]
            bound = (conv.in_channels * 9) ** -0.5  # torch's default
            assert rest.numel() == 0 or 0.5 * bound < rest.std() < bound


def test_head_starts_with_unit_deviation_unless_told_otherwise() -> None:
    assert Airbench().head.bias is None
    assert Airbench().head.weight.std().item() == pytest.approx(1)
    assert Airbench(unit_head=False).head.weight.std().item() == pytest.approx(
        1 / 16 / 3**0.5, rel=0.1
    )


def test_running_statistics_take_bn_momentum_of_the_new_batch() -> None:
    norm = small(bn_momentum=0.25).groups[0].norms[0]
    norm(torch.full((2, 8, 3, 3), 8.0))
    torch.testing.assert_close(norm.running_mean, torch.full((8,), 2.0))


def test_batch_norm_stays_float32_under_autocast() -> None:
    model = small()
    x = images(16)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.float32
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
        state = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        assert {t.dtype for t in state} == {torch.float32}
    torch.testing.assert_close(low, model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (64, 256)},
        {"widths": (64, 0, 256)},
        {"depth": 0},
        {"depth": 1, "residual": True},
        {"whiten": -1},
        {"val_tta": 3},
        {"test_tta": -1},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError) as caught:
        Airbench(**options)
    assert str(caught.value).startswith(f"{name}={value}: ")


# --- whitening ---


def correlated_images() -> Tensor:
    x = F.avg_pool2d(images(200, seed=3), 3, stride=1)  # neighbours are alike
    return torch.einsum("ij,njhw->nihw", torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 1, 1]]), x)


def test_whitened_patches_are_uncorrelated_of_unit_size() -> None:
    x = correlated_images()
    filters = whitening_filters(x, eps=0.0)
    assert filters.shape == (24, 3, 2, 2) and filters.dtype == torch.float32
    assert torch.equal(filters[12:], -filters[:12])
    responses = F.conv2d(x.double(), filters[:12].double()).transpose(0, 1).flatten(1)
    covariance = responses @ responses.T / responses.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12, dtype=torch.double), atol=1e-3, rtol=0)


def test_eps_bounds_the_filters() -> None:
    constant = torch.ones(3, 3, 8, 8)  # eleven of the twelve directions have no variance at all
    filters = whitening_filters(constant, eps=5e-4)
    assert filters.flatten(1).norm(dim=1).max() <= 5e-4**-0.5 * 1.001
    response = F.conv2d(constant, filters[:1]).abs().mean().item()
    assert response == pytest.approx((12 / (12 + 5e-4)) ** 0.5, rel=1e-5)


def test_filters_come_from_the_datamodule_when_fit_starts(tmp_path: Path) -> None:
    model, data = small(), Stripes()
    trainer(tmp_path, max_steps=1).fit(model, datamodule=data)
    expected = whitening_filters(data.training_images(SMALL["whiten"]))
    torch.testing.assert_close(model.whiten.weight.data, expected)
    # A second fit, on other images, keeps them: what is trained stands on them.
    model.whiten.weight.data += 1
    trainer(tmp_path, max_steps=1).fit(model, datamodule=Stripes())
    torch.testing.assert_close(model.whiten.weight.data, expected + 1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_computes_no_filters(stage: str) -> None:
    model = small()
    before = model.whiten.weight.clone()
    model.setup(stage)
    assert torch.equal(model.whiten.weight, before)


def test_without_training_images_it_says_what_to_do(tmp_path: Path) -> None:
    data = Stripes()
    data.setup("fit")
    with pytest.raises(RuntimeError, match=r"given no DataModule.*CIFAR10DataModule.*whiten=0"):
        trainer(tmp_path).fit(small(), data.train_dataloader())
    model = small()
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace())
    with pytest.raises(RuntimeError, match="given SimpleNamespace"):
        model.setup("fit")


def test_grey_images_get_a_warning() -> None:
    grey = images(40)[:, :1].repeat(1, 3, 1, 1)
    for training_images, warns in ((grey, True), (images(40), False)):
        model = small()
        datamodule = SimpleNamespace(training_images=lambda n, x=training_images: x)
        model._trainer = SimpleNamespace(datamodule=datamodule)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.setup("fit")
        assert ["Set whiten=0" in str(w.message) for w in caught] == [True] * warns


def test_whiten_0_trains_the_first_layer() -> None:
    model = small(whiten=0)
    assert model.whiten.weight.requires_grad
    before = model.whiten.weight.clone()
    model.setup("fit")
    assert torch.equal(model.whiten.weight, before)


# --- test-time augmentation ---


def shifted(x: Tensor, rows: int, columns: int) -> Tensor:
    """Pixel (i, j) of the view is pixel (i + rows, j + columns), reflected at the border."""

    def reflect(position: int) -> int:
        return -position if position < 0 else 62 - position if position > 31 else position

    view = torch.empty_like(x)
    for i in range(32):
        for j in range(32):
            view[..., i, j] = x[..., reflect(i + rows), reflect(j + columns)]
    return view


def test_augmented_logits_against_the_slow_way() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 5, stride=3), nn.GELU(), nn.Flatten())
    x = images(3)
    with torch.no_grad():

        def both(view: Tensor) -> Tensor:
            return torch.stack([network(view), network(view.flip(3))]).mean(0)

        corners = torch.stack([both(shifted(x, -1, -1)), both(shifted(x, 1, 1))]).mean(0)
        expected = {0: network(x), 1: both(x), 2: 0.5 * both(x) + 0.5 * corners}
        for level, logits in expected.items():
            plain, augmented = augmented_logits(network, x, level)
            torch.testing.assert_close(plain, network(x))
            torch.testing.assert_close(augmented, logits)


# --- training ---


def test_losses_are_label_smoothed_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    labels = torch.tensor([0, 1])
    model = small(num_classes=3, label_smoothing=0.2)
    log_p = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()
    target = torch.tensor([[0.8, 0, 0], [0, 0.8, 0]]) + 0.2 / 3
    torch.testing.assert_close(model.losses(logits, labels), -(target * log_p).sum(1))


def test_the_loss_is_the_sum_over_ranks_and_accumulated_batches() -> None:
    model = small()
    model.log = lambda *args, **kwargs: None
    model._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3)
    batch = images(5), torch.arange(5)
    model.eval()
    expected = model.losses(model(batch[0]), batch[1]).sum()
    # Distributed training averages over 2 ranks and Lightning divides by 3 batches.
    torch.testing.assert_close(model.training_step(batch, 0), 6 * expected)


class Metrics:
    """What a fit and a test log."""

    def __init__(self, tmp_path: Path) -> None:
        self.model, data = small(test_tta=1, val_tta=2), Stripes()
        runner = trainer(tmp_path)
        runner.fit(self.model, datamodule=data)
        self.fit = {name: value.item() for name, value in runner.callback_metrics.items()}
        (self.test,) = runner.test(self.model, datamodule=data, verbose=False)
        self.predictions = runner.predict(self.model, datamodule=data)
        batches = list(data.test_dataloader())
        self.images = torch.cat([pixels for pixels, _ in batches])
        self.labels = torch.cat([labels for _, labels in batches])
        self.model.eval()

    def expected(self, level: Any) -> tuple[float, float, Tensor]:
        with torch.no_grad():
            _, logits = augmented_logits(self.model, self.images, level)
        accuracy = (logits.argmax(1) == self.labels).float().mean().item()
        return self.model.losses(logits, self.labels).mean().item(), accuracy, logits


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    return Metrics(tmp_path_factory.mktemp("metrics"))


def test_fit_and_test_log_what_the_network_does(metrics: Metrics) -> None:
    assert set(metrics.fit) == {
        "train/loss", "train/loss_step", "train/acc", "val/loss", "val/acc"
    }  # fmt: skip
    assert set(metrics.test) == {"test/loss", "test/acc", "test/acc_no_tta"}
    loss, accuracy, _ = metrics.expected(2)
    assert metrics.fit["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics.fit["val/acc"] == pytest.approx(accuracy)
    loss, accuracy, _ = metrics.expected(1)
    assert metrics.test["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics.test["test/acc"] == pytest.approx(accuracy)
    assert metrics.test["test/acc_no_tta"] == pytest.approx(metrics.expected(0)[1])


def test_predictions_are_probabilities(metrics: Metrics) -> None:
    probabilities = torch.cat(metrics.predictions)
    torch.testing.assert_close(probabilities, metrics.expected(1)[2].softmax(1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(30))
    torch.testing.assert_close(
        metrics.model.predict_step(metrics.images, 0).detach(), probabilities
    )


def test_train_metrics_are_of_the_epoch(tmp_path: Path) -> None:
    model = small()
    per_step: list[float] = []
    original = model.losses

    def recording(logits: Tensor, labels: Tensor) -> Tensor:
        losses = original(logits, labels)
        per_step.extend(losses.tolist())
        return losses

    model.losses = recording
    runner = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    runner.fit(model, datamodule=Stripes())
    assert len(per_step) == 64
    assert runner.callback_metrics["train/loss"].item() == pytest.approx(sum(per_step) / 64)


def test_fit_after_validate(tmp_path: Path) -> None:
    model = small()
    trainer(tmp_path).validate(model, datamodule=Stripes(), verbose=False)
    trainer(tmp_path, max_steps=1).fit(model, datamodule=Stripes())


def test_it_learns(tmp_path: Path) -> None:
    runner = trainer(tmp_path, max_epochs=10)
    runner.fit(small(), datamodule=Stripes())
    assert runner.callback_metrics["val/acc"] > 0.7


# --- checkpoints ---


def test_a_checkpoint_is_all_that_evaluation_needs(tmp_path: Path) -> None:
    model, data = small(val_tta=1), Stripes()
    runner = trainer(tmp_path, ModelCheckpoint(tmp_path, "last"))
    runner.fit(model, datamodule=data)
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved["optimizer"] == FanionConfig.from_dict(OPTIMIZER).to_dict()
    loaded = Airbench.load_from_checkpoint(path)
    assert loaded.hparams == model.hparams and loaded.val_tta == 1
    assert loaded.fanion_config == model.fanion_config == FanionConfig.from_dict(OPTIMIZER)
    state, restored = model.state_dict(), loaded.state_dict()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[name], restored[name]) for name in state)
    (before,) = runner.validate(model, datamodule=data, verbose=False)
    (after,) = trainer(tmp_path).validate(loaded, datamodule=Stripes(), verbose=False)
    assert before == after
    # Training goes on from the checkpoint's filters.
    loaded.whiten.weight.data += 1
    expected = loaded.whiten.weight.clone()
    trainer(tmp_path, max_steps=1).fit(loaded, datamodule=Stripes())
    assert torch.equal(loaded.whiten.weight, expected)


def test_the_optimizer_may_be_a_config_a_mapping_or_left_out() -> None:
    config = FanionConfig.from_dict(OPTIMIZER)
    assert Airbench(config, **SMALL).fanion_config == config
    assert Airbench(copy.deepcopy(OPTIMIZER), **SMALL).fanion_config == config
    assert Airbench(**SMALL).fanion_config == FanionConfig()
    assert isinstance(Airbench(config, **SMALL).hparams["optimizer"], dict)


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model = small()
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, every_step).fit(model, datamodule=Stripes())
    for step in (1, 6):  # in the middle of epochs 0 and 1
        resumed = small(seed=1)
        path = str(tmp_path / f"step={step}.ckpt")
        trainer(tmp_path).fit(resumed, datamodule=Stripes(), ckpt_path=path)
        for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), name
        for (name, a), b in zip(model.named_buffers(), resumed.buffers(), strict=True):
            assert torch.equal(a, b), name

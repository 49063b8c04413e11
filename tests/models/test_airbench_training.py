"""The airbench network in a Trainer: losses, logs, predictions, checkpoints."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_fanions import FanionConfig
from models import Airbench
from models.airbench import augmented_logits
from tests.models.airbench_runs import OPTIMIZER, SMALL, Stripes, images, small, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def test_losses_are_label_smoothed_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    labels = torch.tensor([0, 1])
    model = small(num_classes=3, label_smoothing=0.2)
    log_p = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()
    target = torch.tensor([[0.8, 0, 0], [0, 0.8, 0]]) + 0.2 / 3
    torch.testing.assert_close(model.losses(logits, labels), -(target * log_p).sum(1))


def test_loss_is_the_sum_over_ranks_and_micro_batches() -> None:
    model = small()
    model.log = lambda *args, **kwargs: None
    model._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3)
    batch = images(5), torch.arange(5)
    model.eval()
    expected = model.losses(model(batch[0]), batch[1]).sum()
    # Distributed training averages over 2 ranks and Lightning divides by 3 batches.
    torch.testing.assert_close(model.training_step(batch, 0), 6 * expected)


class Metrics:
    """Metrics that a fit and a test log, and their expected values."""

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


def test_logged_metrics_are_of_the_network(metrics: Metrics) -> None:
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


def test_train_metrics_are_means_over_the_epoch(tmp_path: Path) -> None:
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


def test_fit_after_validate_takes_a_step(tmp_path: Path) -> None:
    model = small()
    trainer(tmp_path).validate(model, datamodule=Stripes(), verbose=False)
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(model, datamodule=Stripes())
    assert runner.global_step == 1


def test_training_raises_the_accuracy(tmp_path: Path) -> None:
    runner = trainer(tmp_path, max_epochs=10)
    runner.fit(small(), datamodule=Stripes())
    assert runner.callback_metrics["val/acc"] > 0.7


def test_checkpoint_restores_model_and_evaluation(tmp_path: Path) -> None:
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
    # A fit of the loaded model uses the checkpoint's filters.
    loaded.whiten.weight.data += 1
    expected = loaded.whiten.weight.clone()
    trainer(tmp_path, max_steps=1).fit(loaded, datamodule=Stripes())
    assert torch.equal(loaded.whiten.weight, expected)


def test_optimizer_is_a_config_a_mapping_or_the_default() -> None:
    config = FanionConfig.from_dict(OPTIMIZER)
    assert Airbench(config, **SMALL).fanion_config == config
    assert Airbench(copy.deepcopy(OPTIMIZER), **SMALL).fanion_config == config
    assert Airbench(**SMALL).fanion_config == FanionConfig()
    assert isinstance(Airbench(config, **SMALL).hparams["optimizer"], dict)


def test_resume_is_bit_equal(tmp_path: Path) -> None:
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


def test_compiled_network_trains_like_eager(tmp_path: Path, monkeypatch) -> None:
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw)
    )
    weights = []
    for compiled in (False, True):
        model = small(compile=compiled)
        trainer(tmp_path, max_epochs=1, limit_train_batches=3).fit(model, datamodule=Stripes())
        assert (model._compiled_call_impl is not None) == compiled
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*weights)

"""Logistic regression: loss, minimum, step, logs and evaluation."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from datamodules import DigitFeaturesDataModule
from lit_fanions import norms
from lit_fanions.cli.console import Refused
from lit_fanions.cli.curves import read_curves
from models import LogisticRegression

PLAIN = {"momentum": 0.0, "nesterov": False, "polar": "exact", "scale": "none"}


def model(lr: float = 0.2, **options) -> LogisticRegression:
    schedule = {"shape": "linear"}
    optimizer = {"matrix": {**PLAIN, "algorithm": "muon", "lr": lr}, "schedule": schedule}
    return LogisticRegression(optimizer, **{"features": 65, "l2": 1e-2, **options})


def trainer(steps: int, folder: Path | None = None) -> Trainer:
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        precision="64-true",
        logger=False if folder is None else TensorBoardLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )


@pytest.fixture(scope="module")
def data() -> DigitFeaturesDataModule:
    module = DigitFeaturesDataModule(1, seed=0)
    module.setup()
    return module


def minimum(data: DigitFeaturesDataModule, l2: float) -> tuple[torch.Tensor, float]:
    """Return W and loss of scikit-learn's solver."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = next(iter(data.train_dataloader()))
    solver = linear_model.LogisticRegression(
        C=1 / (l2 * len(labels)), fit_intercept=False, max_iter=1000, tol=1e-6
    ).fit(features.numpy(), labels.numpy())
    w = torch.from_numpy(solver.coef_)
    losses = -(features @ w.mT).log_softmax(-1)[torch.arange(len(labels)), labels]
    return w, (losses.mean() + l2 / 2 * w.square().sum()).item()


def test_loss_at_zero_and_at_the_minimum(data):
    w, loss = minimum(data, 1e-2)
    module, batch = model(), next(iter(data.train_dataloader()))
    assert module.losses(batch).item() == pytest.approx(torch.tensor(10.0).log().item())
    with torch.no_grad():
        module.weight.copy_(w)
    found = module.losses(batch)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert module.weight.grad.abs().max() < 1e-4


def test_training_reaches_the_minimum(data, tmp_path):
    _, loss = minimum(data, 1e-2)
    trainer(200, tmp_path).fit(model(), data)
    names = [f"{kind}/{norm}" for kind in ("gradient", "best") for norm in ("nuclear", "dual")]
    curves = read_curves(tmp_path, ["train/loss", *names])
    assert [step for step, _ in curves["train/loss"]][-3:] == [196, 198, 200]
    assert 0 < curves["train/loss"][-1][1] - loss < 1e-3
    for a, b in (names[:2], names[2:]):  # muon's own norm
        values = torch.tensor([[v for _, v in curves[name]] for name in (a, b)])
        torch.testing.assert_close(*values)
    with pytest.raises(Refused):  # a single problem logs means only
        read_curves(tmp_path, ["problem0/loss"])


def test_step_is_the_oracle_of_the_gradient(data):
    batch = next(iter(data.train_dataloader()))
    module = model()
    (gradient,) = torch.autograd.grad(module.losses(batch).sum(), module.weight)
    trainer(1).fit(module, data)
    expected = -0.2 * norms.Spectral().lmo(gradient)
    torch.testing.assert_close(module.weight.detach(), expected)


def test_evaluation_uses_the_held_out_examples(data):
    module, runner = model(), trainer(30)
    runner.fit(module, data)
    (found,) = runner.test(module, data, verbose=False)
    (batch,) = data.test_dataloader()
    logits = module(batch.features)
    assert found["test/acc"] == (logits.argmax(-1) == batch.labels).double().mean().item() > 0.8
    assert found["test/loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, batch.labels).item()
    )
    (probabilities,) = runner.predict(module, data)
    torch.testing.assert_close(probabilities, logits.softmax(-1))


def test_invalid_options_are_refused(data):
    with pytest.raises(ValueError, match="has 65 features and the model 64: set features to 65"):
        trainer(1).fit(model(features=64), data)
    with pytest.raises(ValueError, match="l2 must be a number of at least 0, got -1"):
        model(l2=-1)
    with pytest.raises(ValueError, match="classes must be a whole number of at least 1, got 0"):
        model(classes=0)

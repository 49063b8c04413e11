"""Whitening filters: their definition, and when Airbench computes them."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.airbench import whitening_filters
from tests.models.airbench_runs import SMALL, Stripes, images, small, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def correlated_images() -> Tensor:
    x = F.avg_pool2d(images(200, seed=3), 3, stride=1)  # neighbours are alike
    return torch.einsum("ij,njhw->nihw", torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 1, 1]]), x)


def test_whitened_patches_are_uncorrelated_with_unit_variance() -> None:
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


def test_fit_computes_filters_once(tmp_path: Path) -> None:
    model, data = small(), Stripes()
    trainer(tmp_path, max_steps=1).fit(model, datamodule=data)
    expected = whitening_filters(data.training_images(SMALL["whiten"]))
    torch.testing.assert_close(model.whiten.weight.data, expected)
    # A second fit, on other images, keeps the filters that the other layers were trained with.
    model.whiten.weight.data += 1
    trainer(tmp_path, max_steps=1).fit(model, datamodule=Stripes())
    torch.testing.assert_close(model.whiten.weight.data, expected + 1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_computes_no_filters(stage: str) -> None:
    model = small()
    before = model.whiten.weight.clone()
    model.setup(stage)
    assert torch.equal(model.whiten.weight, before)


def test_missing_training_images_are_refused_with_a_remedy(tmp_path: Path) -> None:
    data = Stripes()
    data.setup("fit")
    with pytest.raises(RuntimeError, match=r"given no DataModule.*CIFAR10DataModule.*whiten=0"):
        trainer(tmp_path).fit(small(), data.train_dataloader())
    model = small()
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace())
    with pytest.raises(RuntimeError, match="given SimpleNamespace"):
        model.setup("fit")


def test_grey_images_warn() -> None:
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

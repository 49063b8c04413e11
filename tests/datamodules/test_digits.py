"""scikit-learn's digits as a DataModule."""

import sys

import numpy as np
import pytest
import torch

from datamodules import DigitsDataModule
from datamodules.augmentation import ImageRecipe, draw_epoch
from datamodules.digits import load_digits, split_indices


@pytest.fixture(scope="module")
def data() -> DigitsDataModule:
    module = DigitsDataModule(batch_size=100)
    module.prepare_data()
    module.setup("fit")
    return module


def test_images_are_the_enlarged_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    images, labels = load_digits()
    assert images.shape == (1797, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(labels, torch.from_numpy(original.target))
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    position = (np.arange(32) + 0.5) / 4 - 0.5
    for i in range(3):
        grey = original.images[i] * 255 / 16
        rows = np.stack([np.interp(position, np.arange(8), row) for row in grey])
        both = np.stack([np.interp(position, np.arange(8), column) for column in rows.T]).T
        assert np.abs(images[i, 0].numpy() - both).max() <= 0.5001


def test_split_is_fixed_stratified_and_disjoint() -> None:
    _, labels = load_digits()
    split = split_indices(labels)
    assert (len(split["train"]), len(split["test"])) == (1437, 360)
    assert torch.equal(torch.cat(list(split.values())).sort().values, torch.arange(1797))
    for digit in range(10):
        in_test = (labels[split["test"]] == digit).sum() / (labels == digit).sum()
        assert abs(in_test - 0.2) < 0.01
    assert torch.equal(split_indices(labels)["test"], split["test"])


def test_mean_and_std_are_of_the_training_images(data: DigitsDataModule) -> None:
    images = data.training_images(10_000)
    assert images.shape == (1437, 3, 32, 32)
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_digits_are_shifted_but_never_mirrored() -> None:
    data = DigitsDataModule(batch_size=1437, translate=0, seed=0)
    data.setup("fit")
    loader = data.train_dataloader()
    original = data.training_images(1437)
    recipe = ImageRecipe(0, 1437, "none", translate=0, cutout=0)
    for epoch in range(2):
        ((pixels, _),) = list(loader)
        assert torch.equal(pixels, original[draw_epoch(1437, 32, epoch, recipe).order])


def test_loaders_cover_both_splits(data: DigitsDataModule) -> None:
    assert len(data.train_dataloader()) == 14
    pixels, labels = next(iter(data.train_dataloader()))
    assert pixels.shape == (100, 3, 32, 32) and labels.shape == (100,)
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 360


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn.*extra 'zoo'"):
        DigitsDataModule().setup("fit")

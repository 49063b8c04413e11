"""Polynomial features of digits, their splits, and batches of all examples."""

import pytest
import torch
from lightning.pytorch import seed_everything

from datamodules import DigitFeaturesDataModule
from datamodules.digit_features import polynomial
from datamodules.digits import original_digits, split_indices


def test_polynomial_equals_the_products():
    pixels = torch.tensor([[2.0, 3.0, 5.0], [1.0, 0.0, -1.0]])
    linear = [[1, 2, 3, 5], [1, 1, 0, -1]]
    products = [[4, 6, 10, 9, 15, 25], [1, 0, -1, 0, 0, 1]]
    assert polynomial(pixels, 1).tolist() == linear
    assert polynomial(pixels, 2).tolist() == [a + b for a, b in zip(linear, products, strict=True)]


@pytest.mark.parametrize("degree", [1, 2])
def test_batches_are_whole_splits(degree):
    data = DigitFeaturesDataModule(degree, seed=3, steps_per_epoch=4)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    images, labels = original_digits()
    split = split_indices(labels, 3)
    (held_out,) = data.test_dataloader()
    for batch, name in ((batches[0], "train"), (batches[3], "train"), (held_out, "test")):
        index = split[name]
        assert batch.features.dtype == torch.float64
        assert batch.features.shape == (len(index), data.features)
        assert torch.equal(batch.features[:, 1:65] * 16, images[index].flatten(1))
        assert torch.equal(batch.labels, labels[index])
    assert (batches[0].features[:, 0] == 1).all()


def test_seed_determines_the_split():
    seed_everything(1, verbose=False)
    given = [DigitFeaturesDataModule(1, seed) for seed in (1, None, 2)]
    for data in given:
        data.setup()
    first, of_run, other = (next(iter(data.train_dataloader())).labels for data in given)
    assert torch.equal(first, of_run)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 3}, "degree=3: choose 1 or 2"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1, got 0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DigitFeaturesDataModule(**options)

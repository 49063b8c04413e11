"""Random least-squares problems: their distribution, their seeds, batches."""

import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from scipy import stats

from datamodules import LeastSquaresDataModule
from datamodules.least_squares import random_problems, random_psd


def test_spectra_are_uniform_and_eigenvectors_are_haar():
    rng = np.random.default_rng(0)
    drawn = torch.stack([random_psd(6, rng) for _ in range(400)])
    assert torch.equal(drawn, drawn.mT) or (drawn - drawn.mT).abs().max() < 1e-15
    values, vectors = torch.linalg.eigh(drawn)
    assert stats.kstest(values.flatten(), "uniform").pvalue > 0.01
    # A coordinate of a uniform unit vector, squared, is Beta(1/2, (n - 1) / 2).
    squares = vectors[:, 0, 3].square()
    assert stats.kstest(squares, stats.beta(0.5, 2.5).cdf).pvalue > 0.01


def test_each_problem_has_its_own_seed():
    few, many = (random_problems(count, 4, 3, target_scale=0.5, seed=7) for count in (2, 5))
    for a, b in zip(few, many, strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b[:2])
    assert [t.shape for t in many] == [(5, 4, 4), (5, 3, 3), (5, 4, 3)]
    other = random_problems(2, 4, 3, target_scale=0.5, seed=8)
    assert not torch.equal(few.target, other.target)
    assert torch.equal(random_problems(2, 4, 3, seed=7).target, 2 * few.target)


@pytest.mark.parametrize(("target", "law"), [("gaussian", "norm"), ("uniform", "uniform")])
def test_targets_follow_their_distribution(target, law):
    data = LeastSquaresDataModule(50, 10, 10, target, 3.0, seed=0)
    entries = next(iter(data.train_dataloader())).target.flatten()
    assert stats.kstest(entries / 3, law).pvalue > 0.01


def test_every_batch_holds_all_problems():
    data = LeastSquaresDataModule(problems=2, rows=4, cols=3, seed=1, steps_per_epoch=5)
    expected = random_problems(2, 4, 3, seed=1)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch, other in itertools.product(batches, [expected]):
        assert all(map(torch.equal, batch, other))


def test_default_seed_is_that_of_seed_everything():
    seed_everything(3, verbose=False)
    data = LeastSquaresDataModule(problems=1, rows=2, cols=2)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.target, random_problems(1, 2, 2, seed=3).target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problems": 0}, "problems must be a whole number of at least 1, got 0"),
        ({"rows": -1}, "rows must be a whole number of at least 1, got -1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be a whole number of at least 1, got 0"),
        ({"target_scale": 0.0}, "target_scale must be a number above 0, got 0.0"),
        ({"target_scale": float("nan")}, "target_scale must be a number above 0, got nan"),
        ({"target": "cauchy"}, "target 'cauchy' is none of gaussian, uniform"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LeastSquaresDataModule(**options)

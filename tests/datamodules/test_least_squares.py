"""Random least-squares problems: their distribution, their seeds, what the loader hands out."""

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


def test_problems_have_seeds_of_their_own():
    few, many = (random_problems(count, 4, 3, target_scale=0.5, seed=7) for count in (2, 5))
    for a, b in zip(few, many, strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b[:2])
    assert [t.shape for t in many] == [(5, 4, 4), (5, 3, 3), (5, 4, 3)]
    other = random_problems(2, 4, 3, target_scale=0.5, seed=8)
    assert not torch.equal(few.target, other.target)
    assert torch.equal(random_problems(2, 4, 3, seed=7).target, 2 * few.target)


@pytest.mark.parametrize(("target", "law"), [("gaussian", "norm"), ("uniform", "uniform")])
def test_targets(target, law):
    data = LeastSquaresDataModule(50, 10, 10, target, 3.0, seed=0)
    entries = next(iter(data.train_dataloader())).target.flatten()
    assert stats.kstest(entries / 3, law).pvalue > 0.01


def test_every_batch_is_all_problems():
    data = LeastSquaresDataModule(problems=2, rows=4, cols=3, seed=1, steps_per_epoch=5)
    expected = random_problems(2, 4, 3, seed=1)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch, other in itertools.product(batches, [expected]):
        assert all(map(torch.equal, batch, other))


def test_seed_of_the_run():
    seed_everything(3, verbose=False)
    data = LeastSquaresDataModule(problems=1, rows=2, cols=2)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.target, random_problems(1, 2, 2, seed=3).target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problems": 0}, "problems=0: it must be at least 1"),
        ({"rows": -1}, "rows=-1: it must be at least 1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0: it must be at least 1"),
        ({"target_scale": 0.0}, "target_scale=0.0: it must be a positive number"),
        ({"target_scale": float("nan")}, "target_scale=nan: it must be a positive number"),
        ({"target": "cauchy"}, "target='cauchy': choose one of gaussian, uniform"),
        ({"seed": -1}, "seed=-1: it must not be negative"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        LeastSquaresDataModule(**options)

"""Norms of large Gaussian matrices against samples, and section 5.1's estimate of L."""

import math

import pytest
import torch

from experiments.paper.bounds import asymptotics, smoothness
from lit_fanions import bounds, norms
from tests.matrices import gaussian64


def test_constants_of_the_marchenko_pastur_law():
    for n in (3, 50, 700):
        spectrum = asymptotics.gaussian_spectrum(n, n)
        assert spectrum.sum().item() == pytest.approx(8 / (3 * math.pi) * n**1.5, rel=1e-6)
        assert (spectrum.diff() < 0).all() and spectrum[-1] > 0
    edge = asymptotics.gaussian_spectrum(4000, 1000)
    assert edge[0].item() == pytest.approx(4000**0.5 + 1000**0.5, rel=2e-2)
    assert edge[-1].item() == pytest.approx(4000**0.5 - 1000**0.5, rel=5e-2)
    assert edge.square().sum().item() == pytest.approx(4e6, rel=1e-4)
    torch.testing.assert_close(
        asymptotics.gaussian_spectrum(20, 30), asymptotics.gaussian_spectrum(30, 20)
    )


@pytest.mark.parametrize("shape", [(60, 60), (120, 40), (30, 90)])
@pytest.mark.parametrize(
    "norm",
    [
        norms.Frobenius(),
        norms.Spectral(),
        norms.Nuclear(),
        norms.KyFan(3),
        norms.KyFan(20),
        norms.KyFanDual(3),
        norms.KyFanDual(20),
        norms.MaxEntry(),
        norms.SumEntry(),
        norms.MaxRow(),
        norms.MaxColumn(),
        norms.Blend(norms.MaxRow(), 0.5),
        norms.Blend(norms.Spectral(), 0.5),
        norms.Blend(norms.Nuclear(), 0.5),
        norms.Blend(norms.Spectral(), 0.0, "sign", 0.5),
        norms.Blend(norms.MaxEntry(), 0.5, "sign", 2.0),
        norms.Blend(norms.Frobenius(), 0.5, "sign", 0.2),
    ],
    ids=repr,
)
def test_norms_of_gaussian_matrices(norm, shape):
    sample = norm.value(gaussian64(40, *shape))
    mean, deviation = sample.mean(), sample.std() / math.sqrt(len(sample))
    slack = 0.03 * mean if isinstance(norm, norms.MaxEntry) else 0.01 * mean
    expected = asymptotics.gaussian_norm(norm, *shape)
    assert (mean - expected).abs() <= 4 * deviation + slack
    assert asymptotics.gamma(norm, *shape) == pytest.approx(expected / math.sqrt(math.prod(shape)))


def test_the_papers_estimate_of_smoothness():
    a, b, _ = smoothness.draw_problems(1, 50, torch.Generator().manual_seed(0))
    nuclear, frobenius = norms.Nuclear(), norms.Frobenius()
    for norm, expected in (
        (frobenius, frobenius.value(a) * frobenius.value(b)),
        (norms.Spectral(), 4 / 50 * nuclear.value(a) * nuclear.value(b)),
        (nuclear, (8 / (3 * math.pi)) ** 2 * 50 * nuclear.dual(a) * nuclear.dual(b)),
    ):
        estimate = asymptotics.asymptotic_smoothness(norm, a, b)
        torch.testing.assert_close(estimate, expected, rtol=0.1, atol=0)
        assert estimate > 2 * bounds.smoothness(norm, a, b)


def test_norms_without_an_asymptotic_are_refused():
    norm = norms.Spectral()
    with pytest.raises(ValueError, match="no asymptotic"):
        asymptotics.gaussian_norm(norms.Blend(norm, 0.5, "sign"), 3, 3)
    with pytest.raises(ValueError, match="this blend is no norm"):
        asymptotics.gamma(norms.Blend(norm, 1.5), 3, 3)

"""Convex problems: norms of gradients, and when they are logged."""

import itertools

import pytest
import torch

from lit_fanions import Fanion, norms, oracle
from models.convex import NORMS, gradient_norms, is_logged

OWN = {
    ("nsgd", ()): norms.Frobenius(),
    ("muon", ()): norms.Spectral(),
    ("neon", ()): norms.Nuclear(),
    ("fanion", (("rank", 3),)): norms.KyFanDual(3),
    ("kyfan", (("rank", 3),)): norms.KyFan(3),
    ("signum", ()): norms.MaxEntry(),
    ("coordinate", ()): norms.SumEntry(),
    ("f_muon", (("alpha", 0.3),)): norms.Blend(norms.Spectral(), 0.3),
    ("s_neon", (("sign_scale", 0.1),)): norms.Blend(norms.Nuclear(), 0.5, "sign", 0.1),
}


@pytest.mark.parametrize("own", OWN, ids=lambda own: own[0])
def test_gradient_norms_equal_exact_norms(own):
    gradient = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    (algorithm, options), norm = own, OWN[own]
    parameter = torch.nn.Parameter(gradient)
    optimizer = Fanion([parameter], algorithm=algorithm, layout="batch", **dict(options))
    (group,) = optimizer.param_groups
    exact = norms.Spectral(), norms.Frobenius(), norms.Nuclear()
    expected = [*(n.value(gradient) for n in exact), norm.dual(gradient)]
    torch.testing.assert_close(gradient_norms(gradient, group), torch.stack(expected))
    mine = oracle(group, 5, 7).norm()
    torch.testing.assert_close(mine.dual(gradient), norm.dual(gradient))
    torch.testing.assert_close(mine.lmo(gradient), norm.lmo(gradient))
    assert len(NORMS) == len(expected)


def test_logged_steps_are_even_on_both_axes():
    logged = [step for step in range(10_001) if is_logged(step, 1000, 10)]
    assert logged[:8] == [0, 1, 2, 3, 4, 6, 7, 8]  # one less than ten in the first decade
    assert {*range(0, 10_001, 1000)} <= {*logged}
    for decade in (100, 1000):
        inside = [step for step in logged if decade <= step < 10 * decade and step % 1000]
        assert len(inside) in (9, 10)
        ratios = [b / a for a, b in itertools.pairwise(inside)]
        assert max(ratios) < 1.6

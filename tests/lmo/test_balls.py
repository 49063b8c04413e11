"""Oracles of the balls and of their blends, against lit_fanions.norms."""

import pytest
import torch

from lit_fanions import lmo, norms
from tests.lmo.conftest import DeviceBranches
from tests.lmo.matrices import (
    MATRICES,
    SOLVERS,
    largest_value,
    least_quality,
    orthonormal_vectors,
    quality,
)
from tests.matrices import gaussian, with_spectrum


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_rank_k_directions_are_oracles(name, solver):
    m = MATRICES[name]
    for k in (1, 5, 17):
        d = lmo.direction(m, rank=k, solver=solver, polar="exact")
        assert d.shape == m.shape
        assert d.dtype == m.dtype
        assert quality(m, d, norms.KyFanDual(k)) >= least_quality(solver, m.dtype)
        assert norms.KyFanDual(k).value(d).max() <= largest_value(m.dtype)
        if name.startswith("zero"):
            assert not d.any()


@pytest.mark.parametrize("products", [torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_rank_k_directions_on_the_branches_for_gpus_are_near_oracles(name, solver, products):
    # A GPU has no eigendecomposition of the block that would not wait for the device. These
    # matrices are too small for a search in bfloat16: test_singular_triplets.py.
    m = MATRICES[name]
    for k in (1, 5, 17):
        with DeviceBranches():
            d = lmo.direction(m, rank=k, solver=solver, polar="exact")
            u, s, vh = lmo.top_singular(m, k, solver=solver)
        assert orthonormal_vectors(u, vh)
        assert (s[:, 1:] <= s[:, :-1]).all()
        least = {"subspace": 0.96, "randomized": 0.96, "power": 0.9}.get(solver, 0.99)
        assert quality(m, d, norms.KyFanDual(k)) >= least - torch.finfo(m.dtype).eps
        assert norms.KyFanDual(k).value(d).max() <= largest_value(m.dtype)
        assert d.any() != name.startswith("zero")


# The dtype of products changes the polar factor only, the solver the leading vectors only.
KYFAN = [(name, solver, torch.float32) for name in MATRICES for solver in SOLVERS]
KYFAN += [(name, "auto", torch.bfloat16) for name in MATRICES]


@pytest.mark.parametrize(("name", "solver", "products"), KYFAN, indirect=["products"], ids=str)
def test_kyfan_directions_are_oracles(name, solver, products):
    m = MATRICES[name]
    for k in (1, 3, 100):
        d = lmo.direction(m, ball="kyfan", rank=k, solver=solver)
        assert d.shape == m.shape
        assert d.dtype == m.dtype
        assert quality(m, d, norms.KyFan(k)) >= 0.97 - torch.finfo(m.dtype).eps
        assert norms.KyFan(k).value(d).max() <= 1.02


BLENDS = ["frobenius", "sign", "row", "nuclear"]


@pytest.mark.parametrize(
    ("alpha", "rank"), [(-0.1, 1), (0.0, 4), (0.3, None), (0.3, 1), (0.3, 4), (1.0, 1), (1.1, None)]
)
@pytest.mark.parametrize("blend", BLENDS)
def test_blends_are_the_weighted_sums_of_the_oracles(alpha, rank, blend):
    m = gaussian(2, 40, 50)
    inside = norms.Spectral() if rank is None else norms.KyFanDual(rank)
    d = lmo.direction(
        m, rank=rank, alpha=alpha, blend=blend, sign_scale=0.3, polar="exact", solver="exact"
    )
    partner = {"row": norms.MaxRow(), "nuclear": norms.Nuclear()}.get(blend, blend)
    scale = 0.3 if blend == "sign" else 1.0
    exact = norms.Blend(inside, alpha, partner, sign_scale=scale).lmo(m)
    torch.testing.assert_close(d.double(), exact, rtol=0, atol=1e-5)


# With alpha 1 the partner has weight 0.
@pytest.mark.parametrize(("alpha", "blend"), [*((0.3, blend) for blend in BLENDS), (1.0, "sign")])
@pytest.mark.parametrize(
    "ball, rank, norm",
    [
        ("kyfan", 3, norms.KyFan(3)),
        ("kyfan", None, norms.Nuclear()),
        ("coordinate", None, norms.SumEntry()),
        ("row", None, norms.MaxRow()),
        ("column", None, norms.MaxColumn()),
    ],
)
def test_blends_of_other_balls_are_the_weighted_sums(ball, rank, norm, blend, alpha):
    m = gaussian(2, 40, 50)
    options = {"polar": "exact", "solver": "exact"}
    d = lmo.direction(m, ball=ball, rank=rank, alpha=alpha, blend=blend, **options)
    partner = {"row": norms.MaxRow(), "nuclear": norms.Nuclear()}.get(blend, blend)
    exact = norms.Blend(norm, alpha, partner).lmo(m)
    torch.testing.assert_close(d.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_kyfan_takes_the_longer_of_its_two_vertices(k):
    concentrated = with_spectrum(torch.tensor([10.0] + [0.1] * 19), 20, 30).float()
    spread = with_spectrum(torch.linspace(1, 0.9, 20), 20, 30).float()
    for m in (concentrated, spread):
        d = lmo.direction(m, ball="kyfan", rank=k)
        torch.testing.assert_close(d.double(), norms.KyFan(k).lmo(m), rtol=0, atol=4e-2)
        rank = torch.linalg.matrix_rank(d, atol=0.05)
        assert rank == (1 if m is concentrated and k > 1 else 20)


@pytest.mark.parametrize("name", MATRICES)
def test_the_coordinate_direction_is_the_sign_of_the_largest_entry(name):
    m = MATRICES[name]
    d = lmo.direction(m, ball="coordinate")
    assert d.dtype == m.dtype
    assert quality(m, d, norms.SumEntry()) == pytest.approx(1)
    assert (norms.SumEntry().value(d) == (m.amax((-2, -1)) != 0).double()).all()


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("p", [1.2, 3, 5, 40])
def test_schatten_directions_are_oracles(name, p):
    m = MATRICES[name]
    norm = norms.Schatten(p)
    exact = lmo.direction(m, ball="schatten", p=p, polar="exact")
    fast = lmo.direction(m, ball="schatten", p=p)
    with DeviceBranches():  # by products for p = 3 and 5
        products = lmo.direction(m, ball="schatten", p=p)
    for d, error in ((exact, 1e-5), (fast, 1e-5), (products, 5e-3)):
        assert d.shape == m.shape and d.dtype == m.dtype
        assert quality(m, d, norm) >= 1 - error - torch.finfo(m.dtype).eps
        assert norm.value(d).max() <= largest_value(m.dtype) + error
        assert d.any() != name.startswith("zero")


@pytest.mark.parametrize(
    ("p", "known"),
    [(1, {"rank": 1}), (2, {"ball": "frobenius"}), (float("inf"), {"ball": "spectral"})],
)
def test_schatten_directions_end_in_known_ones(p, known):
    m = gaussian(2, 70, 90)
    for blend in ("frobenius", "sign"):
        options = {"alpha": 0.7, "blend": blend, "solver": "exact"}
        d = lmo.direction(m, ball="schatten", p=p, **options)
        assert torch.equal(d, lmo.direction(m, **{"ball": "fanion"} | known, **options))
    # From both sides the directions go there.
    near = [lmo.direction(m, ball="schatten", p=q, polar="exact") for q in _around(p)]
    at = lmo.direction(m, ball="schatten", p=p, polar="exact", solver="exact")
    for d in near:
        torch.testing.assert_close(d, at, rtol=0, atol=2e-3)


def _around(p: float) -> list[float]:
    return {1: [1 + 1e-4], 2: [1.999, 2.001]}.get(p, [1e6])


def test_spectral_units_have_the_spectral_norm_1():
    for name in ("gaussian", "tall", "1e-20", "float16"):
        m = MATRICES[name]
        d = lmo.direction(m, ball="spectral_unit", solver="exact").double()
        exact = m.double() / norms.Spectral().value(m)[:, None, None]
        torch.testing.assert_close(d, exact, rtol=2 * torch.finfo(m.dtype).eps, atol=1e-5)
        blended = lmo.direction(m, alpha=1.2, blend="spectral_unit", polar="exact", solver="exact")
        wanted = 1.2 * norms.Spectral().lmo(m) - 0.2 * exact
        torch.testing.assert_close(blended.double(), wanted, rtol=0, atol=2e-3)

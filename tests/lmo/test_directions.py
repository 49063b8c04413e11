"""The fast oracles against the exact ones of lit_fanions.norms."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fanions import lmo, norms
from lit_fanions.lmo.lanczos import lanczos
from lit_fanions.lmo.polar import coefficients

SOLVERS = [s for s in get_args(lmo.Solver) if s != "cupy"]
CONVERGED = ["quintic", "polar_express", "cans", "convergent", "exact", "auto"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(s: torch.Tensor, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(gaussian(rows, cols, seed=seed), full_matrices=False)
    return (u * s) @ vh


MATRICES = {
    "gaussian": gaussian(2, 40, 60),
    "tall": gaussian(2, 70, 33),
    "power law": with_spectrum(torch.arange(1, 49).float() ** -0.7, 48, 64)[None],
    "condition 1e3": with_spectrum(torch.logspace(0, -3, 48), 64, 48)[None],
    "clustered": with_spectrum(torch.tensor([1.0] * 6 + [0.5] * 42), 48, 64)[None],
    "identity": torch.eye(40)[None],
    "low rank": (gaussian(50, 3) @ gaussian(3, 60))[None],
    "1e-20": gaussian(1, 40, 60) * 1e-20,
    "1e+20": gaussian(1, 40, 60) * 1e20,
    "one row": gaussian(1, 1, 60),
    "one column": gaussian(1, 60, 1),
    "float64": gaussian(1, 40, 60).double(),
    "float16": gaussian(1, 40, 60).half(),
    "bfloat16": gaussian(1, 40, 60).bfloat16(),
}


def quality(m: torch.Tensor, d: torch.Tensor, dual: norms.Norm) -> float:
    """The worst <m, d> over the batch, as a part of the most there is."""
    return ((m.double() * d.double()).sum((-2, -1)) / dual.value(m)).min().item()


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_rank_k_directions_are_oracles(name, k, solver):
    m = MATRICES[name]
    d = lmo.direction(m, rank=k, solver=solver)
    assert d.shape == m.shape
    assert d.dtype == m.dtype
    rounding = torch.finfo(m.dtype).eps
    floor = 0.95 if solver == "power" else 0.995
    assert quality(m, d, norms.KyFan(k)) >= floor - rounding
    assert norms.KyFanDual(k).value(d).max() <= 1.01  # in the ball


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", CONVERGED)
def test_polar_factors_are_oracles(name, method):
    m = MATRICES[name]
    d = lmo.polar(m, method=method)
    assert d.shape == m.shape
    assert d.dtype == m.dtype
    # CANS stops at an error of 12 % either way, which a single singular value may meet.
    floor = {"exact": 0.999, "cans": 0.87}.get(method, 0.97)
    radius = 1.005 if method == "exact" else 1.25
    assert quality(m, d, norms.Nuclear()) >= floor - torch.finfo(m.dtype).eps
    assert norms.Spectral().value(d).max() <= radius + torch.finfo(m.dtype).eps


def test_jordan_overshoots_and_undershoots_but_points_along():
    m = MATRICES["gaussian"]
    d, exact = lmo.polar(m, method="jordan").double(), norms.Spectral().lmo(m)
    cosine = (d * exact).sum((-2, -1)) / d.norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    assert cosine.min() > 0.95
    assert torch.linalg.svdvals(d).max() > 1.05  # else it would not be Jordan's


def test_more_steps_of_polar_express_come_closer():
    m = with_spectrum(torch.logspace(0, -5, 32), 32, 64).double()
    exact = norms.Spectral().lmo(m)
    errors = [(lmo.polar(m, steps=n) - exact).norm().item() for n in (6, 8, 12, 22)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("method", ["jordan", "quintic", "polar_express", "cans", "convergent"])
def test_past_its_table_a_preset_repeats_its_last_row(method):
    own = coefficients(method)
    assert coefficients(method, len(own)) == own
    if method == "quintic":
        for steps in (4, 6):
            with pytest.raises(ValueError, match="exactly 5 steps"):
                coefficients(method, steps)
    else:
        longer = coefficients(method, 20)
        assert longer[: len(own)] == own
        assert set(longer[12:]) == {longer[-1]}
        # ... and never turns round: a cycled table would give gradient ascent.
        m = gaussian(20, 30)
        for steps in range(1, 20):
            assert quality(m, lmo.polar(m, method=method, steps=steps), norms.Nuclear()) > 0


@pytest.mark.parametrize("k", [1, 4, 40])
def test_triplets_are_those_of_the_svd(k):
    m = with_spectrum(torch.arange(1, 41).float() ** -1.0, 50, 40).double()
    s = torch.linalg.svdvals(m)[:k]
    for solver in ("lanczos", "exact", "auto"):
        u, found, vh = lmo.top_singular(m, k, solver=solver, tol=1e-8)
        assert (u.shape, found.shape, vh.shape) == ((50, k), (k,), (k, 40))
        torch.testing.assert_close(found, s, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(u.mT @ m @ vh.mT, torch.diag(s), rtol=0, atol=1e-7)
        torch.testing.assert_close(u.mT @ u, torch.eye(k, dtype=m.dtype), rtol=0, atol=1e-9)
        torch.testing.assert_close(vh @ vh.mT, torch.eye(k, dtype=m.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_singular_values_have_the_scale_of_the_matrix(scale):
    m = gaussian(30, 40) * scale
    found = lmo.top_singular(m, 3, tol=1e-5).S
    exact = torch.linalg.svdvals(m.double())[:3].float()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)


def test_lanczos_residual_meets_the_tolerance():
    m = gaussian(1, 120, 90).double()
    for tol in (1e-2, 1e-6):
        u, s, vh = lanczos(m, gaussian(1, 90).double(), 4, tol=tol, basis=12, cycles=200)
        residual = torch.linalg.vector_norm(m.mT @ u - vh.mT * s[:, None], dim=1)
        assert (residual <= tol * s * (1 + 1e-6)).all()


def test_lanczos_finds_every_copy_of_a_repeated_singular_value():
    s = lmo.top_singular(MATRICES["clustered"], 6, solver="lanczos").S
    torch.testing.assert_close(s, torch.ones(1, 6), rtol=1e-3, atol=0)


def test_a_warm_start_makes_two_products_enough():
    m = gaussian(100, 80)
    exact = lmo.top_singular(m, 8, solver="exact")
    basis = torch.linalg.qr(exact.Vh.mT + 0.02 * gaussian(80, 8, seed=1)).Q
    warm = lmo.direction(m, rank=8, solver="subspace", warm_start=basis)
    assert quality(m, warm, norms.KyFan(8)) > 0.999


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"polar": "exact"},
        {"rank": 1},
        {"rank": 5, "solver": "lanczos"},
        {"rank": 5, "solver": "subspace", "alpha": 0.5},
        {"ball": "kyfan", "rank": 3},
        {"ball": "coordinate"},
        {"alpha": 0.0},
        {"alpha": 0.0, "blend": "sign"},
        {"alpha": 0.5, "blend": "sign", "sign_scale": 0.1},
    ],
    ids=str,
)
class TestDirection:
    def test_batched_is_looped(self, options):
        m = gaussian(2, 3, 40, 50)
        looped = torch.stack([torch.stack([lmo.direction(x, **options) for x in y]) for y in m])
        torch.testing.assert_close(lmo.direction(m, **options), looped, rtol=0, atol=2e-2)

    def test_leaves_its_input_alone(self, options):
        m = gaussian(3, 40, 50)
        before = m.clone()
        lmo.direction(m, **options).zero_()
        assert torch.equal(m, before)

    def test_same_call_same_answer_whatever_the_global_seed(self, options):
        m = gaussian(40, 50)
        torch.manual_seed(1)
        first = lmo.direction(m, **options)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(lmo.direction(m, **options), first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_zero_and_broken_matrices(self, options):
        m = gaussian(4, 40, 50)
        m[1] = 0
        m[2, 3, 4] = math.nan
        m[3, 3, 4] = math.inf
        d = lmo.direction(m, **options)
        assert d[0].isfinite().all()
        assert d[0].any()
        assert not d[1].any()
        if options.get("ball") != "coordinate" and options.get("blend") != "sign":
            assert d[2:].isnan().all()

    def test_is_scale_invariant(self, options):
        m = gaussian(40, 50)
        for scale in (1e-20, 1e20):
            torch.testing.assert_close(
                lmo.direction(m * scale, **options), lmo.direction(m, **options), rtol=0, atol=2e-2
            )


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_kyfan_takes_the_longer_of_its_two_vertices(k):
    concentrated = with_spectrum(torch.tensor([10.0] + [0.1] * 19), 20, 30)
    spread = with_spectrum(torch.linspace(1, 0.9, 20), 20, 30)
    for m in (concentrated, spread):
        d = lmo.direction(m, ball="kyfan", rank=k)
        assert quality(m, d, _DualOf(norms.KyFan(k))) > 0.97
        torch.testing.assert_close(d.double(), norms.KyFan(k).lmo(m), rtol=0, atol=4e-2)


class _DualOf:
    def __init__(self, norm: norms.Norm) -> None:
        self.value = norm.dual


@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.3, 1.0, 1.1])
@pytest.mark.parametrize("rank", [1, 4, None])
@pytest.mark.parametrize("blend", get_args(lmo.BlendName))
def test_blends_are_the_weighted_sums_of_the_oracles(alpha, rank, blend):
    m = gaussian(2, 40, 50)
    inside = norms.Spectral() if rank is None else norms.KyFanDual(rank)
    d = lmo.direction(
        m, rank=rank, alpha=alpha, blend=blend, sign_scale=0.3, polar="exact", solver="exact"
    )
    scale = 0.3 if blend == "sign" else 1.0
    exact = norms.Blend(inside, alpha, blend, sign_scale=scale).lmo(m)
    torch.testing.assert_close(d.double(), exact, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 30),
    st.sampled_from(SOLVERS),
    st.integers(-25, 25),
)
def test_any_shape_rank_and_scale(seed, rows, cols, k, solver, exponent):
    m = gaussian(rows, cols, seed=seed) * 10.0**exponent
    d = lmo.direction(m, rank=k, solver=solver)
    assert quality(m, d, norms.KyFan(k)) > 0.95
    assert norms.KyFanDual(min(k, rows, cols)).value(d) < 1.05


def test_bad_arguments():
    m = gaussian(4, 5)
    for options, message in (
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.5}, "at least 1"),
        ({"blend": "nuclear"}, "frobenius, sign"),
        ({"ball": "box"}, "fanion, kyfan, coordinate"),
        ({"polar": "newton"}, "jordan"),
        ({"polar": "quintic", "polar_steps": 6}, "exactly 5"),
        ({"polar": "exact", "polar_steps": 6}, "takes no steps"),
        ({"polar_steps": 0}, "at least 1"),
        ({"rank": 1, "solver": "arpack"}, "lanczos"),
    ):
        with pytest.raises(ValueError, match=message):
            lmo.direction(m, **options)
    with pytest.raises(ValueError, match="float matrices"):
        lmo.direction(torch.ones(3))
    with pytest.raises(ValueError, match="float matrices"):
        lmo.direction(torch.ones(3, 3, dtype=torch.int64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the message of a machine without CUDA")
def test_cupy_without_cuda_says_what_to_do():
    with pytest.raises(RuntimeError, match='choose "lanczos"'):
        lmo.direction(gaussian(20, 30), rank=2, solver="cupy")

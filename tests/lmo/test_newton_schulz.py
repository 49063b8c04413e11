"""The polar factors U V^T of lmo.polar, and what unit_polar blends them with."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_fanions import lmo, norms
from lit_fanions.lmo import singular_triplets
from lit_fanions.lmo.newton_schulz import unit_polar
from lit_fanions.lmo.presets import check_polar, coefficients
from tests.lmo.conftest import DeviceBranches, polar_module
from tests.lmo.matrices import MATRICES, broken, quality
from tests.matrices import gaussian, orthonormal, with_spectrum

METHODS = get_args(lmo.PolarMethod)
NEWTON_SCHULZ = [method for method in METHODS if method not in ("exact", "auto")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# The smallest and the largest singular value that a method may make of one of at least 1e-3:
# Jordan's is never to settle at 1, the fitted ones stop at an error that they spread evenly.
REACH = {"jordan": (0.67, 1.21), "quintic": (0.97, 1.15), "cans": (0.83, 1.13)}
REACH["fast"] = (0.43, 1.57)  # of one of at least 3e-3 of its bound


def reach(method: str, *dtypes: torch.dtype) -> tuple[float, float]:
    """``REACH`` with room for rounding in any of the dtypes."""
    low, high = REACH.get(method, (0.99, 1.005) if method != "exact" else (1.0, 1.0))
    rounding = 2 * max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))
    return low - rounding, high + rounding


# Small matrices and those in float64 are never multiplied in bfloat16.
FLOAT32 = {"small", "one row", "one column", "one entry", "float64", "rank 3, float64"}
# exact and cans never use bfloat16. auto is polar_express: test_auto_is_six_steps_of_polar_express.
FACTORS = [
    (name, method, dtype)
    for method in METHODS
    if method != "auto"
    for name in MATRICES
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or not (method in ("exact", "cans") or name in FLOAT32)
]


@pytest.mark.parametrize(("name", "method", "products"), FACTORS, indirect=["products"], ids=str)
def test_polar_factors_are_oracles(name, method, products):
    m = MATRICES[name]
    d = lmo.polar(m, method=method)
    assert d.shape == m.shape
    assert d.dtype == m.dtype
    low, high = reach(method, products, m.dtype)
    assert quality(m, d, norms.Spectral()) >= low
    assert norms.Spectral().value(d).max() <= high
    if name.startswith("zero"):
        assert not d.any()


@pytest.mark.parametrize("name", MATRICES)
def test_branches_for_gpus_give_the_same_factor(name, products):
    m = MATRICES[name]
    with DeviceBranches():
        d = lmo.polar(m)
    torch.testing.assert_close(d, lmo.polar(m), rtol=0, atol=0.01)


# Of full rank, so that rounding decides nothing.
@pytest.mark.parametrize("name", [name for name in MATRICES if "rank" not in name])
def test_the_exact_method_is_the_exact_oracle(name):
    m = MATRICES[name]
    exact = norms.Spectral().lmo(m).to(m.dtype)
    torch.testing.assert_close(lmo.polar(m, method="exact"), exact, rtol=0, atol=1e-6)


def test_auto_is_six_steps_of_polar_express():
    m = gaussian(2, 80, 70)
    chosen = lmo.polar(m, method="polar_express", steps=6)
    assert torch.equal(lmo.polar(m, method="auto"), chosen)
    assert torch.equal(lmo.direction(m), chosen)


@pytest.mark.parametrize("method", NEWTON_SCHULZ)
def test_factors_of_small_matrices_are_oracles(method, products):
    low, high = reach(method, products)
    for seed in range(300):
        rows, cols = 1 + seed % 5, 2 + seed % 7
        m = gaussian(rows, cols, seed=seed)
        d = lmo.polar(m, method=method)
        assert quality(m, d, norms.Spectral()) >= low
        assert norms.Spectral().value(d) <= high


def test_jordan_overshoots_and_undershoots_but_points_along(products):
    m = MATRICES["gaussian"]
    d, exact = lmo.polar(m, method="jordan").double(), norms.Spectral().lmo(m)
    cosine = (d * exact).sum((-2, -1)) / d.norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    assert cosine.min() > 0.95
    s = torch.linalg.svdvals(d)
    assert s.max() > 1.1
    assert s.min() < 0.8


def test_more_steps_of_polar_express_come_closer():
    m = with_spectrum(torch.logspace(0, -5, 32), 32, 64)
    exact = norms.Spectral().lmo(m)
    errors = [(lmo.polar(m, steps=n) - exact).norm().item() for n in (6, 8, 12, 22)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("shape", [(192, 192), (96, 384), (384, 96)])
def test_the_closer_bound_of_fast_lifts_small_singular_values(shape, products):
    short = min(shape)
    m = with_spectrum(torch.cat([torch.ones(short // 2), torch.full((short // 2,), 1e-3)]), *shape)
    fast, four = (
        torch.linalg.svdvals(lmo.polar(m, method=method, steps=4))
        for method in ("fast", "polar_express")
    )
    assert fast[-1] > 2 * four[-1]


def test_fast_never_turns_a_leading_direction_round(products):
    # Its first polynomial is small where the largest singular values are, and bfloat16 is coarse.
    u, v = orthonormal(96, 3), orthonormal(128, 3, 1)
    for second in torch.linspace(0.3, 1, 15):
        s = torch.tensor([1, second, 0.6]).double()
        d = lmo.polar((u * s) @ v.mT, method="fast")
        assert (u.mT @ d @ v).diagonal().min() > 0.4


@pytest.mark.parametrize("method", NEWTON_SCHULZ)
def test_presets_repeat_their_last_row(method):
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


@pytest.mark.parametrize("shape", [(70, 80), (30, 10), (2, 70, 200)])
@pytest.mark.parametrize("method", [method for method in NEWTON_SCHULZ if method != "quintic"])
def test_every_number_of_steps_goes_uphill(method, shape, products):
    m = gaussian(*shape)
    found = [
        quality(m, lmo.polar(m, method=method, steps=n), norms.Spectral()) for n in range(20)[1:]
    ]
    # A cycled table would turn round, into gradient ascent.
    assert min(found) > 0.2
    assert min(found[5:]) > 0.65


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_matrix_spoils_no_other(method, products):
    d = lmo.polar(broken(gaussian(70, 80)), method=method)
    assert d[1:3].isnan().all()
    assert torch.equal(d[0], d[3])
    assert quality(gaussian(70, 80), d[0], norms.Spectral()) > 0.65


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 5e37])
def test_any_scale_gives_the_same(scale, products):
    m = gaussian(2, 70, 80)
    torch.testing.assert_close(lmo.polar(m * scale), lmo.polar(m), rtol=0, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_neither_the_input_nor_the_random_state_is_touched(method, products):
    for m in (gaussian(2, 70, 80), gaussian(70, 80).to(products), gaussian(90, 30).double()):
        before, state = m.clone(), torch.get_rng_state()
        first = lmo.polar(m, method=method)
        torch.manual_seed(1)
        assert torch.equal(lmo.polar(m, method=method).zero_(), first * 0)
        torch.set_rng_state(state)
        assert torch.equal(m, before)


@pytest.mark.parametrize("method", NEWTON_SCHULZ)
def test_rounding_to_bfloat16_moves_no_singular_value_one_way(method):
    # Coefficients that bfloat16 cannot represent moved the mean by up to 2.9 %.
    x, _ = lmo.unit_frobenius(gaussian(100, 30, seed=3))
    steps = 6 if method == "fast" else None  # after its own four it has not converged
    wanted = torch.linalg.svdvals(unit_polar(x.double(), method, steps)).mean()
    found = torch.linalg.svdvals(unit_polar(x.bfloat16(), method, steps).double()).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=6e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_for_large_matrices_on_hardware_with_it(method, products):
    expected = torch.float32 if method in ("exact", "cans") else products
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for shape in ((65, 65), (3, 65, 100), (100, 65)):
            assert lmo.polar_dtype(torch.empty(shape, dtype=dtype), method) == expected
        for shape in ((64, 64), (3, 64, 100), (100, 64), (1, 1000)):
            assert lmo.polar_dtype(torch.empty(shape, dtype=dtype), method) == torch.float32
    assert lmo.polar_dtype(torch.empty(99, 99).double(), method) == torch.float64


class TestGramForm:
    """Newton-Schulz on the Gram matrix, for matrices of which one side is much the longer."""

    @pytest.fixture
    def compare(self, monkeypatch):
        def compute(m, aspect, **options):
            monkeypatch.setattr(polar_module, "GRAM_ASPECT", aspect)
            return lmo.polar(m, **options)

        return lambda m, **options: (compute(m, 1.0, **options), compute(m, math.inf, **options))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "shape", [(12, 60), (60, 12), (3, 12, 60), (3, 60, 12), (1, 7), (9, 9)]
    )
    @pytest.mark.parametrize("method", NEWTON_SCHULZ)
    def test_equals_the_plain_one(self, method, shape, dtype, compare, monkeypatch):
        monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: False)
        by_gram, plain = compare(gaussian(*shape).to(dtype), method=method)
        rounding = 1e3 * torch.finfo(dtype).eps
        torch.testing.assert_close(by_gram, plain, rtol=0, atol=rounding)
        assert not torch.equal(by_gram, plain) or min(shape[-2:]) == 1  # or both were the same

    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12, 25])
    def test_equals_the_plain_one_after_any_number_of_steps(self, steps, compare):
        m = with_spectrum(torch.logspace(0, -3, 10), 10, 50)
        by_gram, plain = compare(m, method="polar_express", steps=steps)
        torch.testing.assert_close(by_gram, plain, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("method", NEWTON_SCHULZ)
    def test_stays_bounded(self, method, monkeypatch):
        monkeypatch.setattr(polar_module, "_has_bf16", lambda device_type: False)
        _, high = reach(method)
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            short, aspect = (int(torch.randint(1, 13, (), generator=generator)) for _ in range(2))
            rank = int(torch.randint(1, short + 1, (), generator=generator))
            s = torch.logspace(0, -6 * float(torch.rand((), generator=generator)), rank)
            m = with_spectrum(s, short, short * (aspect + 2), seed).float()
            for thin in (m, m.mT):
                d = lmo.polar(thin, method=method)
                assert norms.Spectral().value(d) <= high

    @pytest.mark.parametrize(
        "shape, thin",
        [((66, 165), True), ((165, 66), True), ((66, 164), False), ((164, 66), False)],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_taken_from_the_aspect_that_rules_name(self, shape, thin, dtype, compare, products):
        condition, choice = singular_triplets.rules()[-1]
        assert choice == "its Gram form"
        assert "float32 or float64" in condition
        assert f"at least {polar_module.GRAM_ASPECT:g} times" in condition
        assert polar_module.GRAM_ASPECT == 2.5
        m = gaussian(*shape).to(dtype)
        chosen = lmo.polar(m)
        by_gram, plain = compare(m)
        if dtype != torch.float64 and products == torch.bfloat16:
            assert torch.equal(by_gram, plain)  # in bfloat16 it diverges
        else:
            assert torch.equal(chosen, by_gram) == thin
            assert torch.equal(chosen, plain) != thin


class TestBlend:
    @pytest.mark.parametrize("alpha", [-0.1, 0.5])
    @pytest.mark.parametrize(
        "shape, dtype",
        [
            ((20, 30), torch.bfloat16),
            ((30, 20), torch.float32),
            ((3, 10, 40), torch.float64),
            ((2, 2, 40, 10), torch.float32),
            ((1, 5), torch.float32),
        ],
    )
    @pytest.mark.parametrize("method", ["polar_express", "exact"])
    def test_is_the_weighted_sum(self, method, shape, dtype, alpha):
        def partner(x):
            return x if alpha == 0.5 else x.sign_().mul_(0.3)

        x, _ = lmo.unit_frobenius(gaussian(*shape).double())
        x = x.to(dtype)
        part = partner(x.clone())
        factor = unit_polar(x.double() if method == "exact" else x, method)
        wanted = alpha * factor.double() + (1 - alpha) * part.double()
        found = unit_polar(x.clone(), method, alpha=alpha, partner=partner)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        rounding = (8 if dtype == torch.bfloat16 else 100) * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=rounding)

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_of_few_steps(self, steps):
        # The polynomial of the first step takes the matrices themselves.
        x, _ = lmo.unit_frobenius(gaussian(10, 15).double())
        wanted = 0.5 * unit_polar(x, "jordan", steps) + 0.5 * x
        found = unit_polar(x.clone(), "jordan", steps, alpha=0.5, partner=lambda x: x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("blend", ["frobenius", "sign"])
    @pytest.mark.parametrize("shape", [(70, 80), (10, 60), (2, 3, 70, 80)])
    def test_of_a_direction_leaves_its_input_alone(self, shape, blend, products):
        for m in (gaussian(*shape), lmo.unit_frobenius(gaussian(*shape), dtype=products)[0]):
            before = m.clone()
            lmo.direction(m, alpha=0.5, blend=blend).zero_()
            assert torch.equal(m, before)


@st.composite
def matrices(draw) -> torch.Tensor:
    """Matrices of any shape, rank, scale and dtype, of a condition number up to 1e3."""
    rows, cols = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    rank, power = draw(st.integers(1, min(rows, cols))), draw(st.floats(0, 3))
    m = with_spectrum(torch.logspace(0, -power, rank), rows, cols, draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.integers(-25, 25)) if dtype != torch.float16 else draw(st.integers(-1, 3))
    return (m * 10.0**scale).to(dtype)


anything = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(matrices(), st.sampled_from(METHODS))
def test_any_matrix_gets_an_oracle(products, m, method):
    d = lmo.polar(m, method=method)
    assert (d.shape, d.dtype) == (m.shape, m.dtype)
    low, high = reach(method, products, m.dtype)
    assert norms.Spectral().value(d) <= high
    assert quality(m, d, norms.Spectral()) >= low
    assert not lmo.polar(m * 0, method=method).any()


@anything
@given(matrices(), st.sampled_from(METHODS), st.integers(-25, 25))
def test_scale_changes_nothing(products, m, method, exponent):
    # By powers of two no digit is lost, but for the largest entry that is divided by.
    m = m.float() / m.float().abs().max()
    scaled = lmo.polar(m * 2.0**exponent, method=method)
    torch.testing.assert_close(scaled, lmo.polar(m, method=method), rtol=0, atol=0.05)


@anything
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 3), st.integers(0, 2**31))
def test_the_exact_method_turns_with_its_input(rows, cols, power, seed):
    m = with_spectrum(torch.logspace(0, -power, min(rows, cols)), rows, cols)
    q, r = orthonormal(rows, rows, seed), orthonormal(cols, cols, seed + 1)
    turned = lmo.polar(q @ m @ r, method="exact")
    torch.testing.assert_close(turned, q @ lmo.polar(m, method="exact") @ r, rtol=0, atol=1e-10)


@anything
@given(
    st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), st.sampled_from(METHODS),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_a_batch_is_a_loop(products, count, rows, cols, method, dtype):
    # Singular values near 0 would make much of little rounding.
    s = torch.linspace(1, 0.3, min(rows, cols))
    m = torch.stack([with_spectrum(s, rows, cols, seed) for seed in range(2 * count)])
    m = m.unflatten(0, (2, count)).to(dtype)
    looped = torch.stack([torch.stack([lmo.polar(x, method=method) for x in y]) for y in m])
    rounding = 1e-4 + 8 * max(torch.finfo(dtype).eps, torch.finfo(products).eps)
    torch.testing.assert_close(lmo.polar(m, method=method), looped, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    "method, steps, message",
    [
        ("newton", None, "none of jordan, quintic, polar_express"),
        ("exact", 6, "takes no steps"),
        ("quintic", 6, "exactly 5 steps, got 6"),
        ("auto", 0, "at least 1, got 0"),
        ("jordan", 2.0, "at least 1, got 2.0"),
        ("jordan", True, "at least 1, got True"),
    ],
)
def test_impossible_methods_and_steps_are_refused(method, steps, message):
    for check in (
        lambda: lmo.polar(gaussian(3, 4), method=method, steps=steps),
        lambda: check_polar(method, steps),
    ):
        with pytest.raises(ValueError, match=message):
            check()

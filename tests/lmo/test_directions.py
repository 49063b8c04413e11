"""Directions of every option: batches, scale, zero and non-finite matrices, refusals."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fanions import lmo, norms
from tests.lmo.matrices import SOLVERS, attained, broken, largest_value, quality
from tests.matrices import gaussian, orthonormal, power_law, with_spectrum

OPTIONS = [
    {},
    {"polar": "exact"},
    {"polar": "quintic", "alpha": 0.7},
    {"rank": 1},
    *[{"rank": 5, "solver": solver} for solver in SOLVERS],
    {"rank": 5, "solver": "lanczos", "tol": 1e-3, "alpha": 0.5, "blend": "sign"},
    {"rank": 5, "solver": "subspace", "alpha": 0.5},
    {"ball": "kyfan", "rank": 3},
    {"ball": "kyfan", "rank": 3, "solver": "lanczos", "alpha": 0.5},
    {"ball": "coordinate"},
    {"ball": "coordinate", "alpha": 0.5},
    {"alpha": 0.0},
    {"alpha": 0.0, "blend": "sign"},
    {"alpha": 0.5, "blend": "sign", "sign_scale": 0.1},
]


def uses_fast_products(options: dict) -> bool:
    """Return whether the dtype of products decides anything: that of Newton-Schulz steps."""
    low_rank = "rank" in options and options.get("ball") != "kyfan"
    other = options.get("ball") == "coordinate" or options.get("alpha") == 0
    return not (low_rank or other or options.get("polar") == "exact")


CASES = [(options, torch.float32) for options in OPTIONS]
CASES += [(options, torch.bfloat16) for options in OPTIONS if uses_fast_products(options)]


@pytest.mark.parametrize(("options", "products"), CASES, indirect=["products"], ids=str)
class TestDirection:
    def test_batched_is_looped(self, options, products):
        s = power_law(70, 0.7)
        m = torch.stack([with_spectrum(s, 70, 80, seed).float() for seed in range(6)])
        m = m.unflatten(0, (2, 3))
        d = lmo.direction(m, **options)
        for one, alone in zip(d.flatten(0, 1), m.flatten(0, 1), strict=True):
            looped = lmo.direction(alone, **options)
            # Random starts are drawn for the batch as a whole.
            assert (one - looped).norm() <= 0.15 * looped.norm()
            inner = ((x * alone).sum().item() for x in (one, looped))
            assert next(inner) == pytest.approx(next(inner), rel=0.02)

    def test_leaves_its_input_alone(self, options, products):
        for m in (
            gaussian(3, 70, 80),
            gaussian(70, 80),
            gaussian(80, 70).mT,
            gaussian(70, 80).to(products),
        ):
            before = m.clone()
            lmo.direction(m, **options).zero_()
            assert torch.equal(m, before)

    def test_same_call_same_answer_whatever_the_global_seed(self, options, products):
        m = gaussian(70, 80)
        torch.manual_seed(1)
        first = lmo.direction(m, **options)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(lmo.direction(m, **options), first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_zero_and_broken_matrices(self, options, products):
        m = torch.cat([broken(gaussian(70, 80)), torch.zeros(1, 70, 80)])
        d = lmo.direction(m, **options)
        assert d[[0, 3]].isfinite().all()
        assert d[0].any()
        assert d[1:3].isnan().all()
        assert not d[4].any()

    def test_is_scale_invariant(self, options, products):
        m = with_spectrum(power_law(70, 0.7), 70, 80).float()
        d = lmo.direction(m, **options)
        for scale in (1e-20, 0.3, 1e20):
            scaled = lmo.direction(m * scale, **options)
            torch.testing.assert_close(scaled, d, rtol=0, atol=2e-2)

    def test_oracle_may_use_the_memory_of_the_matrices(self, options, products):
        m = gaussian(3, 70, 80)
        known = {f.name for f in dataclasses.fields(lmo.Settings)}
        settings = lmo.Settings(**{k: v for k, v in options.items() if k in known})
        oracle = lmo.Oracle(
            lmo.BALLS[options.get("ball", "fanion")],
            lmo.Case(options.get("rank") or 70, 70, 80, settings),
            options.get("alpha", 1.0),
            lmo.BALLS[options.get("blend", "frobenius")],
        )
        wanted = lmo.direction(m, **options)
        for overwrite in (False, True):
            d = oracle.solve(m.clone(), overwrite=overwrite).direction
            torch.testing.assert_close(d.to(m.dtype), wanted, rtol=0, atol=1e-6)
            if not oracle.takes_unit:
                continue
            x, _ = lmo.unit_frobenius(m, dtype=lmo.polar_dtype(m, settings.polar))
            before = x.clone()
            d = oracle.solve(x, unit=True, overwrite=overwrite).direction
            torch.testing.assert_close(d.to(m.dtype), wanted, rtol=0, atol=1e-6)
            assert overwrite or oracle.alpha != 1 or torch.equal(x, before)


# Exact methods turn with their input, the iterative ones have their own bases.
@pytest.mark.parametrize(
    "options",
    [{"rank": 1}, {"rank": 4}, {}, {"ball": "kyfan", "rank": 3}, {"rank": 4, "alpha": 0.5}],
    ids=str,
)
@settings(max_examples=10, deadline=None)
@given(st.integers(5, 30), st.integers(5, 30), st.integers(0, 2**31))
def test_exact_directions_turn_with_their_input(options, rows, cols, seed):
    m = with_spectrum(power_law(min(rows, cols), 0.7), rows, cols)
    q, r = orthonormal(rows, rows, seed), orthonormal(cols, cols, seed + 1)
    options = {"polar": "exact", "solver": "exact", **options}
    turned = lmo.direction(q @ m @ r, **options)
    torch.testing.assert_close(turned, q @ lmo.direction(m, **options) @ r, rtol=0, atol=1e-9)


@st.composite
def problems(draw) -> tuple[torch.Tensor, int]:
    """Matrices of any shape, rank, scale and dtype, of a condition number up to 1e3; and a k."""
    rows, cols = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    rank, power = draw(st.integers(1, min(rows, cols))), draw(st.floats(0, 3))
    m = with_spectrum(torch.logspace(0, -power, rank), rows, cols, draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    scale = draw(st.integers(-25, 25)) if dtype != torch.float16 else draw(st.integers(-1, 3))
    return (m * 10.0**scale).to(dtype), draw(st.integers(1, 62))


anything = settings(max_examples=100, deadline=None)


@anything
@given(problems(), st.sampled_from(SOLVERS))
def test_any_matrix_gets_an_oracle(problem, solver):
    m, k = problem
    d = lmo.direction(m, rank=k, solver=solver, polar="exact")
    assert (d.shape, d.dtype) == (m.shape, m.dtype)
    assert quality(m, d, norms.KyFanDual(k)) >= 0.97 - torch.finfo(m.dtype).eps
    assert norms.KyFanDual(k).value(d) <= largest_value(m.dtype)
    assert not lmo.direction(m * 0, rank=k, solver=solver).any()


@anything
@given(problems(), st.sampled_from(SOLVERS), st.integers(-25, 25))
def test_scale_changes_no_direction(problem, solver, exponent):
    m, k = problem
    m = m.float() / m.float().abs().max()
    options = {"rank": k, "solver": solver, "polar": "exact"}
    d, scaled = lmo.direction(m, **options), lmo.direction(m * 2.0**exponent, **options)
    dual = norms.KyFan(k).value(m)
    assert attained(m, scaled, dual) == pytest.approx(attained(m, d, dual), abs=0.02)
    assert norms.KyFanDual(k).value(scaled) <= largest_value()


@anything
@given(problems(), st.integers(1, 62), st.sampled_from(["lanczos", "subspace"]))
def test_a_batch_attains_what_a_loop_does(problem, k, solver):
    m, _ = problem
    m = m.float() / m.float().abs().max()
    batch = torch.stack([m, m.flip(0), m * 0, 1e10 * m])
    d = lmo.direction(batch, rank=k, solver=solver)
    dual = norms.KyFanDual(k).dual(batch)
    looped = torch.stack([lmo.direction(x, rank=k, solver=solver) for x in batch])
    assert attained(batch, d, dual) == pytest.approx(attained(batch, looped, dual), abs=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 2.5}, "at least 1, got 2.5"),
        ({"rank": True}, "at least 1, got True"),
        ({"blend": "box"}, "frobenius, spectral"),
        ({"ball": "box"}, "frobenius, spectral"),
        ({"polar": "newton"}, "jordan"),
        ({"polar": "quintic", "polar_steps": 6}, "exactly 5"),
        ({"polar": "exact", "polar_steps": 6}, "takes no steps"),
        ({"polar_steps": 0}, "at least 1"),
        ({"rank": 1, "solver": "arpack"}, "none of auto, lanczos"),
        ({"rank": 1, "solver": "subspace", "solver_steps": 0}, "at least 1, got 0"),
        ({"rank": 1, "solver": "subspace", "solver_steps": 2.0}, "at least 1, got 2.0"),
        ({"rank": 1, "solver": "exact", "solver_steps": 2}, "takes no solver_steps, got 2"),
        ({"rank": 1, "solver": "auto", "solver_steps": 2}, "takes no solver_steps, got 2"),
        ({"rank": 1, "oversampling": -1}, "at least 0, got -1"),
        ({"rank": 1, "oversampling": 1.5}, "at least 0, got 1.5"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lmo.direction(gaussian(4, 5), **options)


@pytest.mark.parametrize(
    ("m", "message"),
    [
        (torch.ones(3), r"expected floating-point matrices .*, got torch.float32 \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), r"got torch.int64 \(3, 3\)"),
        (torch.eye(3).to_sparse(), r"got torch.float32 torch.sparse_coo \(3, 3\)"),
        ([[1.0, 2.0]], "expected a tensor .*, got list"),
    ],
    ids=str,
)
def test_what_is_no_matrix_of_floating_point_numbers_is_refused(m, message):
    for call in (lmo.direction, lmo.polar, lambda m: lmo.top_singular(m, 1)):
        with pytest.raises((TypeError, ValueError), match=message):
            call(m)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("shape", [(0, 6, 7), (2, 0, 6, 7)])
def test_an_empty_batch_has_an_empty_answer(shape, options):
    assert lmo.direction(torch.zeros(shape), **options).shape == shape

"""The norms against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fanions import minkowski, norms
from tests.matrices import gaussian64

PLAIN = [
    norms.Frobenius(),
    norms.Spectral(),
    norms.Nuclear(),
    norms.KyFan(2),
    norms.KyFanDual(2),
    norms.MaxEntry(),
    norms.SumEntry(),
    norms.MaxRow(),
    norms.MaxColumn(),
]
# Both sides of a half, in turn: no branch depends on alpha between 0 and 1.
BLENDS = [norms.Blend(norm, (0.3, 0.8)[i % 2]) for i, norm in enumerate(PLAIN)]
SIGN_BLENDS = [
    norms.Blend(norm, 0.4, "sign", 0.5) for norm in PLAIN if not isinstance(norm, norms.KyFan)
]
BLENDS += [  # solved by a search in one dimension, in either order
    norms.Blend(norms.Frobenius(), 0.3, norms.MaxRow()),
    norms.Blend(norms.MaxRow(), 0.6, norms.MaxRow()),
    norms.Blend(norms.Nuclear(), 0.3, norms.Spectral()),
    norms.Blend(norms.Spectral(), 0.3, norms.Nuclear()),
]
SIGN_BLENDS += [  # solved by iteration
    norms.Blend(norms.Spectral(), 0.4, norms.MaxRow()),
    norms.Blend(norms.MaxRow(), 0.4, norms.MaxColumn()),
]
PLAIN += [norms.KyFan(9), norms.KyFanDual(9)]  # more than there are
PLAIN += [norms.Schatten(1.5), norms.Schatten(3)]  # whose blends take seconds


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((-2, -1))


@pytest.mark.parametrize("shape", [(5, 4), (3, 7), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("norm", [*PLAIN, *BLENDS, *SIGN_BLENDS], ids=repr)
def test_the_oracle_attains_the_dual_norm(norm, shape):
    m = gaussian64(2, *shape)
    torch.testing.assert_close(inner(m, norm.lmo(m)), norm.dual(m), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (3, 7), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("norm", [*PLAIN, *BLENDS], ids=repr)
def test_the_oracle_lies_on_the_ball(norm, shape):
    value = norm.value(norm.lmo(gaussian64(2, *shape)))
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [*PLAIN, *BLENDS], ids=repr)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
def test_norm_axioms_and_hoelder(norm, seed, rows, cols):
    x, y = gaussian64(2, rows, cols, seed=seed)
    assert norm.value(x) > 0
    torch.testing.assert_close(norm.value(-3 * x), 3 * norm.value(x), rtol=1e-9, atol=0)
    assert norm.value(x + y) <= (norm.value(x) + norm.value(y)) * (1 + 1e-9)
    assert inner(x, y).abs() <= norm.value(x) * norm.dual(y) * (1 + 1e-9)


@pytest.mark.parametrize("norm", [*PLAIN, *BLENDS, *SIGN_BLENDS], ids=repr)
def test_the_gradient_is_the_oracle_of_the_dual_ball(norm):
    # Where a norm is differentiable its gradient d has <d, x> = |x| and dual norm 1: the bidual.
    x = gaussian64(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(norm.value(x), x)
    torch.testing.assert_close(inner(gradient, x.detach()), norm.value(x).detach())
    torch.testing.assert_close(norm.dual(gradient), torch.ones((), dtype=torch.float64))


# Sign blends, whose values are found by many rounds: fewer and smaller matrices.


@pytest.mark.parametrize("shape", [(4, 3), (1, 5)])
@pytest.mark.parametrize("norm", SIGN_BLENDS, ids=repr)
def test_the_oracle_of_a_sign_blend_lies_on_the_ball(norm, shape):
    value = norm.value(norm.lmo(gaussian64(2, *shape)))
    torch.testing.assert_close(value, torch.ones_like(value), rtol=norms.TOLERANCE, atol=0)


@pytest.mark.parametrize("norm", SIGN_BLENDS, ids=repr)
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_norm_axioms_and_hoelder_of_sign_blends(norm, seed, rows, cols):
    x, y = gaussian64(2, rows, cols, seed=seed)
    x_plus_y, minus_3_x, x_value, y_value = norm.value(torch.stack([x + y, -3 * x, x, y]))
    assert x_value > 0
    torch.testing.assert_close(minus_3_x, 3 * x_value, rtol=norms.TOLERANCE, atol=0)
    assert x_plus_y <= (x_value + y_value) * (1 + norms.TOLERANCE)
    assert inner(x, y).abs() <= x_value * norm.dual(y) * (1 + norms.TOLERANCE)


@pytest.mark.parametrize(
    ("norm", "length"),
    [(norms.SumEntry(), 1), (norms.Frobenius(), 2), (norms.Spectral(), 2), (norms.KyFan(3), 2)],
    ids=repr,
)
def test_sign_blend_of_a_vector_by_a_search_in_one_dimension(norm, length):
    # What the entries have above weight * t must have length alpha * t.
    alpha, scale, x = 0.6, 0.7, gaussian64(1, 7)
    t = norms.Blend(norm, alpha, "sign", scale).value(x)
    for factor, inside in ((1 + 2e-6, True), (1 - 2e-6, False)):
        above = (x.abs() - factor * t * (1 - alpha) * scale).clamp(min=0)
        size = torch.linalg.vector_norm(above, ord=length)
        assert bool(size <= alpha * factor * t) == inside


@pytest.mark.parametrize("p", [1.5, 3])
def test_the_oracle_of_schatten_blends_lies_on_the_ball(p):
    norm = norms.Blend(norms.Schatten(p), 0.4)
    value = norm.value(norm.lmo(gaussian64(2, 4, 3)))
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("p", "norm"),
    [(1, norms.Nuclear()), (2.0, norms.Frobenius()), (float("inf"), norms.Spectral())],
)
def test_schatten_norms_end_in_known_ones(p, norm):
    x, schatten = gaussian64(2, 5, 4), norms.Schatten(p)
    for ours, theirs in ((schatten.value, norm.value), (schatten.dual, norm.dual)):
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(schatten.lmo(x), norm.lmo(x))
    for wrong in (0.99, float("nan"), -1, True):
        with pytest.raises(ValueError, match="p must be"):
            norms.Schatten(wrong)


@pytest.mark.parametrize("norm", [norms.Spectral(), norms.Nuclear()], ids=repr)
def test_limits_of_alpha_in_sign_blends(norm):
    x = gaussian64(3, 4)
    for alpha, limit in ((0.999, norm.value(x)), (0.001, norms.MaxEntry().value(x) / 0.3)):
        near = norms.Blend(norm, alpha, "sign", 0.3)
        exact = norms.Blend(norm, round(alpha), "sign", 0.3)
        torch.testing.assert_close(exact.value(x), limit)
        torch.testing.assert_close(near.value(x), limit, rtol=5e-3, atol=0)
        torch.testing.assert_close(exact.split(x), x * round(alpha))


def test_sign_blend_that_cannot_be_found_in_time(monkeypatch):
    monkeypatch.setattr(minkowski, "ROUNDS", 3)
    with pytest.raises(RuntimeError, match="after 3 rounds, not within 1e-06"):
        norms.Blend(norms.Spectral(), 0.5, "sign").value(gaussian64(6, 5))


def test_blends_of_large_matrices_need_little_memory():
    # All pairs of entries would be 80 GB.
    x = gaussian64(300, 333)
    for norm in (norms.Blend(norms.SumEntry(), 0.5), norms.Blend(norms.MaxEntry(), 0.5)):
        assert norm.value(norm.lmo(x)).item() == pytest.approx(1)


def test_values_by_hand():
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    expected = {
        norms.Frobenius(): (math.sqrt(14), math.sqrt(14)),
        norms.Spectral(): (3, 6),
        norms.Nuclear(): (6, 3),
        norms.KyFan(2): (5, 3),
        norms.KyFanDual(2): (3, 5),
        norms.MaxEntry(): (3, 6),
        norms.SumEntry(): (6, 3),
        norms.Blend(norms.Spectral(), 0.25): (None, 0.25 * 6 + 0.75 * math.sqrt(14)),
        norms.Blend(norms.Nuclear(), 0.5, "sign", 2.0): (None, 0.5 * 3 + 0.5 * 2 * 6),
    }
    for norm, (value, dual) in expected.items():
        assert value is None or norm(x).item() == pytest.approx(value)
        assert norm.dual(x).item() == pytest.approx(dual)


def test_oracles_by_hand():
    m = torch.tensor([[0.0, -5.0], [2.0, 0.0]])
    first, second = torch.tensor([[0.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    for norm, d in (
        (norms.Spectral(), first + second),
        (norms.Nuclear(), first),
        (norms.KyFanDual(1), first),
        (norms.KyFan(2), first),  # 5 > 7 / 2
        (norms.KyFan(1), first + second),  # 5 < 7
        (norms.MaxEntry(), first + second),
        (norms.SumEntry(), first),
        (norms.Frobenius(), m / math.sqrt(29)),
    ):
        torch.testing.assert_close(norm.lmo(m), d.double(), msg=repr(norm))


@pytest.mark.parametrize("norm", [*BLENDS, *SIGN_BLENDS], ids=repr)
def test_lemma_9_both_ways(norm):
    # Equations 22 and 23: x = t * (alpha * a + (1 - alpha) * b) with a and b in the two balls and
    # no smaller t; and whatever is such a sum with t = 1 is in the ball.
    other, weight = norm.other, (1 - norm.alpha) * norm.sign_scale
    slack = norms.TOLERANCE if norm in SIGN_BLENDS else 1e-9
    x = gaussian64(2, 4, 3) * 1e-8
    z, value = norm.split(x), norm.value(x)
    sizes = torch.stack([norm.norm.value(z) / norm.alpha, other.value(x - z) / weight])
    torch.testing.assert_close(sizes.amax(0), value, rtol=slack, atol=0)
    a, b = gaussian64(2, 4, 3, seed=1), gaussian64(2, 4, 3, seed=2)
    a, b = (c / n.value(c)[:, None, None] for c, n in ((a, norm.norm), (b, other)))
    assert (norm.value(norm.alpha * a + weight * b) <= 1 + slack).all()


@pytest.mark.parametrize(
    "inside", [norms.Spectral(), norms.Nuclear(), norms.KyFanDual(2)], ids=repr
)
def test_limits_of_alpha_and_k(inside):
    x = gaussian64(5, 6)
    for alpha, limit in ((1.0, inside), (0.0, norms.Frobenius())):
        blend = norms.Blend(inside, alpha)
        torch.testing.assert_close(blend.value(x), limit.value(x))
        torch.testing.assert_close(blend.lmo(x), limit.lmo(x))
        near = norms.Blend(inside, abs(alpha - 1e-9))
        torch.testing.assert_close(near.value(x), limit.value(x), rtol=1e-6, atol=0)
    for k, limit in ((1, norms.Nuclear()), (5, norms.Spectral())):
        torch.testing.assert_close(norms.KyFanDual(k).value(x), limit.value(x))
    for k, limit in ((1, norms.Spectral()), (5, norms.Nuclear())):
        torch.testing.assert_close(norms.KyFan(k).value(x), limit.value(x))


@pytest.mark.parametrize("norm", [*PLAIN, *BLENDS, *SIGN_BLENDS], ids=repr)
def test_zero_has_no_direction_and_no_norm(norm):
    zero = torch.zeros(2, 3, 4)
    for compute in (norm.lmo, norm.dual, norm.value):
        assert not compute(zero).any()
    half_zero = torch.stack([zero[0], torch.ones(3, 4)])
    torch.testing.assert_close(norm.value(half_zero)[1], norm.value(half_zero[1]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("norm", [*PLAIN, *BLENDS, *SIGN_BLENDS], ids=repr)
def test_the_oracle_is_scale_invariant(norm, scale):
    m = gaussian64(5, 4)
    torch.testing.assert_close(norm.lmo(m * scale), norm.lmo(m))


def test_rank_deficient_matrices_have_no_direction_in_their_kernel():
    m = gaussian64(6, 2) @ gaussian64(2, 5)
    assert torch.linalg.matrix_rank(norms.Spectral().lmo(m)) == 2
    assert norms.Spectral().lmo(m).square().sum().item() == pytest.approx(2)


def test_impossible_arguments_are_refused():
    for k in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="k must be a whole number"):
            norms.KyFan(k)
    with pytest.raises(ValueError, match="frobenius"):
        norms.Blend(norms.Spectral(), 0.5, "manhattan")
    with pytest.raises(ValueError, match="no blends"):
        norms.Blend(norms.Blend(norms.Spectral(), 0.5), 0.5)
    with pytest.raises(ValueError, match="is no norm"):
        norms.Blend(norms.Spectral(), 1.1).value(gaussian64(2, 2))
    for alpha in (float("nan"), "x", None, True, 1j):
        with pytest.raises(ValueError, match="alpha must be a number"):
            norms.Blend(norms.Spectral(), alpha)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), r"expected real matrices .*, got torch.float32 \(3,\)"),
        (torch.ones(0, 3), r"at least one entry, got torch.float32 \(0, 3\)"),
        (torch.ones(3, 3, dtype=torch.complex64), r"got torch.complex64 \(3, 3\)"),
        (torch.eye(3).to_sparse(), r"got torch.float32 torch.sparse_coo \(3, 3\)"),
        ([[1.0, 2.0]], "expected a tensor .*, got list"),
        (None, "expected a tensor .*, got NoneType"),
    ],
    ids=str,
)
def test_what_is_no_matrix_is_refused(x, message):
    for norm in (norms.Frobenius(), norms.KyFan(2), norms.Blend(norms.Spectral(), 0.5)):
        for quantity in (norm.value, norm.dual, norm.lmo):
            with pytest.raises((TypeError, ValueError), match=message):
                quantity(x)

"""Verdicts on the claims about norms, duals and their oracles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experiments.paper import verdicts
from experiments.paper.norms import methods
from experiments.paper.norms.methods import METHODS, TABLE_1, K, inner, random_matrices
from experiments.paper.norms.steps import Checks, Shape, worst_errors
from experiments.paper.outcome import Claim, judge
from lit_fanions import norms

EXACT = 1e-10  # above the errors of float64 arithmetic
ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)
_ALPHAS_TEXT = ", ".join(f"{alpha:g}" for alpha in ALPHAS)
_MATRICES = "random 6 × 5 matrices"


def judge_all(checks: Checks, shapes: Sequence[Shape], seeds: int) -> list[Claim]:
    """Return all verdicts of the command.

    Args:
        checks: Errors of the steps by method and shape.
        shapes: The shapes.
        seeds: Number of gradients of each shape.
    """
    data = "random gradients, " + ", ".join(f"{m} × {n}" for m, n in shapes)
    n = len(shapes) * seeds
    lemmas = {m.name: checks[m.name] for m in METHODS if m.lemma.startswith("Lemma")}
    return [
        judge_steps("lemmas", lemmas, data, n),
        judge_ky_fan_dual(n),
        judge_ends(n),
        judge_steps(
            "table-1",
            {m.name: checks[m.name] for m in TABLE_1},
            data,
            n,
            "Coordinate descent takes the largest |g_i|, with its sign; the printed largest g_i is "
            f"another entry for {_share_of_other_entries(1000):.0%} of 1000 random vectors.",
        ),
        judge_lemma_9(n),
        judge_minima(n),
    ]


def judge_steps(id: str, checks: Checks, data: str, n: int, remark: str = "") -> Claim:
    """Return the verdict on a claim that the steps of some methods are steepest descents."""
    worst = {name: max(e.item() for e in worst_errors(own)[:3]) for name, own in checks.items()}
    return judge(
        id,
        verdicts.from_bool(max(worst.values()) <= EXACT),
        "largest error of the step, of <m, d> / dual norm and of |d|: "
        + ", ".join(f"{name} {error:.0e}" for name, error in worst.items()),
        data,
        n,
        remark,
        exact=EXACT,
    )


def _share_of_other_entries(count: int) -> float:
    """Return how often the largest entry is not the one of largest absolute value."""
    g = random_matrices(count, 10, seed=0)
    return (g.argmax(-1) != g.abs().argmax(-1)).double().mean().item()


def judge_ky_fan_dual(n: int) -> Claim:
    """Return the verdict on the dual of the Ky Fan norm, for n matrices.

    The formula is bounded from below by one point of the Ky Fan ball, from above by many.
    """
    attained, exceeded = 0.0, 0.0
    for k in (1, 2, 3, 4, 5):
        x, others = random_matrices(n, 6, 5, seed=0), random_matrices(n, 200, 6, 5, seed=1)
        others = torch.cat([others, others.sign(), norms.Spectral().lmo(others)], 1)
        dual = torch.maximum(norms.Nuclear().value(x) / k, norms.Spectral().value(x))
        ball = norms.KyFan(k)
        point = ball.lmo(x)
        reached = inner(x, point) / ball.value(point)
        attained = max(attained, (reached / dual - 1).abs().max().item())
        ratio = inner(x.unsqueeze(1), others) / ball.value(others) / dual.unsqueeze(1)
        exceeded = max(exceeded, ratio.max().item())
    return judge(
        "ky-fan-dual",
        verdicts.from_bool(attained <= EXACT and exceeded <= 1 + EXACT),
        f"attained in the Ky Fan ball within {attained:.0e}; other points reach at most "
        f"{exceeded:.3f} of it",
        f"{_MATRICES}, k = 1 to 5, 600 other points each",
        n,
        exact=EXACT,
    )


def judge_ends(n: int) -> Claim:
    """Return the verdict on the k-Fanions of smallest and largest rank, for n matrices."""
    x = random_matrices(n, 6, 5, seed=2)
    ends = ((norms.KyFanDual(5), methods.SPECTRAL), (norms.KyFanDual(1), methods.NUCLEAR))
    errors = [
        max(
            (fanion.lmo(x) - other.lmo(x)).abs().max().item(),
            (fanion.value(x) / other.value(x) - 1).abs().max().item(),
        )
        for fanion, other in ends
    ]
    return judge(
        "fanion-ends",
        verdicts.from_bool(max(errors) <= EXACT),
        f"largest difference of updates and norms: {errors[0]:.0e}, {errors[1]:.0e}",
        _MATRICES,
        n,
        exact=EXACT,
    )


def judge_lemma_9(n: int) -> Claim:
    """Return the verdict on Lemma 9, for n matrices.

    Points of the Minkowski sum must lie in the ball, and points on the surface of the ball must be
    sums of points of the two scaled balls.
    """
    beyond, apart = 0.0, 0.0
    frobenius = norms.Frobenius()
    for norm in (methods.SPECTRAL, methods.NUCLEAR, methods.FANION):
        for alpha in ALPHAS:
            blend = norms.Blend(norm, alpha)
            a, b = random_matrices(2, n, 6, 5, seed=3)
            a, b = a / norm.value(a)[:, None, None], b / frobenius.value(b)[:, None, None]
            beyond = max(beyond, blend.value(alpha * a + (1 - alpha) * b).max().item())
            a = random_matrices(n, 6, 5, seed=4)
            a = a / blend.value(a)[:, None, None]
            z = blend.split(a)
            excess = (norm.value(z) - alpha, frobenius.value(a - z) - (1 - alpha))
            apart = max(apart, *(size.max().item() for size in excess))
    return judge(
        "lemma-9",
        verdicts.from_bool(beyond <= 1 + EXACT and apart <= EXACT),
        f"largest norm of a sum of points of the two balls: {beyond:.10f}; points of norm 1 are "
        f"such sums, with parts whose norms exceed alpha and 1 - alpha by at most {apart:.0e}",
        f"F-Muon, F-Neon and F-{K}-Fanion, alpha = {_ALPHAS_TEXT}, {_MATRICES}",
        n,
        exact=EXACT,
    )


def judge_minima(n: int) -> Claim:
    """Return the verdict on equations (22) and (23), for n matrices.

    The dual norm is at least <y, d> for a point d of norm 1 in F* (F2), and at most what the Z and
    t of the equations give.
    """
    gap, ends = 0.0, 0.0
    frobenius = norms.Frobenius()
    for norm in (methods.SPECTRAL, methods.NUCLEAR):
        y = random_matrices(n, 6, 5, seed=5).requires_grad_()
        for alpha in ALPHAS:
            blend = norms.Blend(norm, alpha)
            value = blend.value(y)
            (d,) = torch.autograd.grad(value.sum(), y)
            x, z, t = y.detach(), blend.split(y.detach()), value.detach()
            if 0 < alpha < 1:
                below = inner(x, d) / blend.dual(d)
                sizes = (norm.value(z) / alpha, frobenius.value(x - z) / (1 - alpha))
                gap = max(gap, (torch.maximum(*sizes) / below - 1).max().item())
            else:
                limit = norm if alpha == 1 else frobenius
                ends = max(ends, (t / limit.value(x) - 1).abs().max().item())
    return judge(
        "blend-duals",
        verdicts.from_bool(gap <= EXACT and ends <= EXACT),
        f"the minimum exceeds the lower bound of the dual norm by at most {gap:.0e}; at alpha = 1 "
        f"and 0 it differs from the spectral or nuclear and the Frobenius norm by at most "
        f"{ends:.0e}",
        f"alpha = {_ALPHAS_TEXT}, {_MATRICES}",
        n,
        exact=EXACT,
    )

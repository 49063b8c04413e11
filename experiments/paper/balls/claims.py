"""Verdicts on the claims about balls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.paper import verdicts
from experiments.paper.balls import geometry
from experiments.paper.balls.geometry import ALPHAS, EXACT, Outlines, diagonal_norm, diagonal_oracle
from experiments.paper.outcome import Claim, judge
from lit_fanions import norms


def judge_blend_balls(planes: Outlines, circle: Tensor) -> Claim:
    """Return the verdict on the balls of Figure 4 as Minkowski sums.

    How far a Minkowski sum reaches in a direction is the sum of how far its parts reach.

    Args:
        planes: Outline of the ball by dual norm and alpha.
        circle: Directions, (count, 2).
    """

    def error(swapped: bool) -> float:
        worst = 0.0
        for (dual, alpha), curve in planes.items():
            reach = (circle @ curve.mT).amax(-1)
            spectral = (dual == "F*") != swapped  # which ball has the weight alpha
            norm = norms.Spectral() if spectral else norms.Nuclear()
            expected = alpha * norm.dual(torch.diag_embed(circle)) + (1 - alpha)
            worst = max(worst, (reach - expected).abs().max().item())
        return worst

    # A polygon with a corner in each direction misses about as much of a round ball.
    fine = 2 * math.pi / len(circle)
    printed, lemma = error(swapped=True), error(swapped=False)
    return judge(
        "blend-balls",
        verdicts.from_bool(printed <= fine),
        f"the drawn balls reach as far as this sum within {printed:.2g}; as the sum with the "
        f"spectral ball for F* and the nuclear ball for F2 within {lemma:.2g}",
        f"two singular values, {len(circle)} directions, alpha = "
        f"{', '.join(f'{alpha:g}' for alpha in ALPHAS)}",
        len(circle),
        "Lemma 9 takes the balls of the dual norms: spectral for F* (F-Muon), nuclear for F2 "
        "(F-Neon).",
        fine=fine,
    )


def judge_ky_fan_balls(points: Tensor) -> Claim:
    """Return the verdict on the Ky Fan balls as intersections of other balls.

    Args:
        points: Points in space, some inside and some outside each ball, (count, 3).
    """
    x = points.abs()
    pairs = torch.stack([x[:, :2].sum(-1), x[:, 1:].sum(-1), x[:, ::2].sum(-1)], -1)
    first = _share_equal(diagonal_norm(norms.KyFan(2), points) <= 1, (pairs <= 1).all(-1))
    inside, cube = diagonal_norm(norms.KyFanDual(2), points) <= 1, x.amax(-1) <= 1
    printed, right = (_share_equal(inside, cube & (x.sum(-1) <= radius)) for radius in (0.5, 2.0))
    return judge(
        "ky-fan-balls",
        verdicts.from_bool(first == printed == 1),
        f"random points on the right side: of the three l1-balls (of two coordinates each) "
        f"{first:.1%}; of l_inf and l1 of radius 1/2 {printed:.1%}, of radius 2 {right:.1%}",
        "three singular values, normally distributed points",
        len(points),
        "The text's formula, max(|x|, |y|, |z|, (|x| + |y| + |z|) / "
        "2), has the l1-ball of radius 2.",
    )


def _share_equal(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def judge_outside(circle: Tensor) -> Claim:
    """Return the verdict on steps with alpha outside [0, 1].

    Args:
        circle: Directions, (count, 2).
    """

    def share_surpassed(alpha: float) -> float:
        """Return in which share of directions another step reaches further than their own."""
        steps = diagonal_oracle(norms.Blend(norms.Spectral(), alpha), circle)
        reach = circle @ steps.mT
        return (reach.amax(-1) > reach.diagonal() + EXACT).double().mean().item()

    inside = max(share_surpassed(alpha) for alpha in ALPHAS)
    outside = {alpha: share_surpassed(alpha) for alpha in geometry.OUTSIDE}
    return judge(
        "outside-ball",
        verdicts.from_bool(inside == 0 and min(outside.values()) > 0),
        "directions with another step that reaches further than their own: "
        + ", ".join(f"alpha = {alpha:g}: {share:.0%}" for alpha, share in outside.items())
        + f"; alpha in [0, 1]: {inside:.0%}",
        "two singular values",
        len(circle),
    )

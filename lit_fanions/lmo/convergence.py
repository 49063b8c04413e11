"""When a search for leading singular triplets may stop, and how far it is from the exact answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Singular values that agree to this part, or to twice the tolerance, count as copies of one.
CLUSTER = 1e-4
# Products of float32 or float64 leave residuals of so many units of rounding of the largest
# singular value: the search does not wait for smaller ones.
ROUNDING = 16
# How often the residuals may be checked without having halved, before the search gives up.
_STALLS = 5


class Goal(NamedTuple):
    """When a search may stop: both figures are relative, see ``singular_triplets.top_singular``.

    Attributes:
        residual: Largest residual |m^T u - s v| / s.
        error: Largest error of U_k V_k^T beside it, unless s_k and s_(k+1) are copies of one
            singular value; None: the residuals suffice.
    """

    residual: float
    error: float | None = None


def direction_error(residuals: Tensor, s: Tensor, spread: Tensor) -> Tensor:
    """Estimate the relative Frobenius error of U_k V_k^T: |U_k V_k^T - exact| / sqrt(k).

    To first order the part r_ij of a residual along another right singular vector v_j turns v_i by
    r_ij s_i / (s_i^2 - s_j^2). The error is at most sqrt(2/k) |(r_i s_i / (s_i^2 - s_(k+1)^2))_i|,
    if all parts were along v_(k+1), and about at least what the mean of s_j^2 gives in the place of
    s_(k+1)^2. The estimate is the geometric mean of the two.

    Args:
        residuals: |m^T u_i - s_i v_i| / s_i, (..., k).
        s: Singular values, (..., k + 1), descending.
        spread: Mean of s_j^2 outside the k, by the weights r_ij^2, (...).

    Returns:
        (...). Infinite where s_k and s_(k+1) are copies of one singular value, which nothing tells
        apart.
    """
    k = residuals.shape[-1]
    squares, following = s[..., :k] ** 2, s[..., k:] ** 2
    inside = torch.minimum(spread.unsqueeze(-1), following)

    def turned(other: Tensor) -> Tensor:
        angles = torch.where(residuals > 0, residuals * squares / (squares - other), 0)
        return torch.linalg.vector_norm(angles, dim=-1)

    error = (turned(following) * turned(inside) * 2 / k).sqrt()
    copies = (s[..., k] >= (1 - CLUSTER) * s[..., k - 1]) & (s[..., k] > 0)
    return torch.where(copies, torch.inf, error)


class Check:
    """Decides when a search may stop.

    Attributes:
        copies: How many copies of a singular value the random directions so far can find.
        age: Number of blocks since random directions were added.
    """

    def __init__(self, goal: Goal, copies: int, age: int) -> None:
        self.copies = copies
        self.age = age
        self._goal = goal
        self._best = float("inf")
        self._stalls = 0

    def passes(self, residuals: Tensor, s: Tensor, spread: Tensor) -> bool:
        """Return whether the goal is reached, or as much of it as rounding allows.

        Args:
            residuals: Relative residuals, (..., k).
            s: Singular values, (..., k + 1).
            spread: See ``direction_error``.
        """
        k = residuals.shape[-1]
        floor = ROUNDING * torch.finfo(residuals.dtype).eps * s[..., :1] / s[..., :k]
        floor = floor.nan_to_num(0.0)
        reached = (residuals <= floor.clamp(min=self._goal.residual)).all(-1)
        if self._goal.error is not None:
            # Infinite for copies on both sides of the cut, for which the residuals suffice.
            least = direction_error(floor, s, spread).clamp(min=self._goal.error)
            reached &= direction_error(residuals.to(s), s, spread) <= least
        return bool(reached.all())

    def stalls(self, residuals: Tensor) -> bool:
        """Return whether the residuals have stopped to decrease, by the last few checks."""
        worst = float(residuals.max())
        self._stalls += worst > self._best / 2
        self._best = min(self._best, worst)
        return self._stalls > _STALLS

    def may_lack_copies(self, s: Tensor) -> bool:
        """Return whether a singular value has all the copies that the directions can find.

        Then it may have more, and smaller singular values stand in their place.
        """
        k = s.shape[-1]
        if k <= self.copies:
            return False
        close = 1 - max(2 * self._goal.residual, CLUSTER)
        lowest = s[..., self.copies - 1 :]
        equal = lowest >= close * s[..., : k - self.copies + 1]
        return bool((equal & (s[..., -1:] < close * lowest)).any())

"""When a search for leading singular triplets may stop, and how far it is from the exact answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo.factorisations import noise, wide

# Singular values that agree to this part, or to twice the tolerance, count as copies of one.
CLUSTER = 1e-4
# Rounding in float32 or float64 leaves residuals of this many units of rounding of the largest
# singular value: the search does not wait for smaller residuals.
ROUNDING = 16
# How often the residuals may be checked without having halved, before the search gives up.
_STALLS = 5


class Goal(NamedTuple):
    """When a search may stop: both figures are relative, see ``singular_triplets.top_singular``."""

    residual: float  # largest residual |m^T u - s v| / s
    # Largest error of U_k V_k^T beside it, unless s_k and s_(k+1) are copies of one singular value;
    # None: the residuals suffice.
    error: float | None = None


def direction_error(residuals: Tensor, s: Tensor, spread: Tensor) -> Tensor:
    """Estimate the relative Frobenius error of U_k V_k^T: |U_k V_k^T - exact| / sqrt(k).

    To first order the part r_ij of a residual along another right singular vector v_j turns v_i by
    r_ij s_i / (s_i^2 - s_j^2). The error is at most sqrt(2/k) |(r_i s_i / (s_i^2 - s_(k+1)^2))_i|,
    if all parts were along v_(k+1), and about at least what the mean of s_j^2 gives in the place of
    s_(k+1)^2. The estimate, (...), is the geometric mean of the two, and infinite where s_k and
    s_(k+1) are copies of one singular value, whose vectors cannot be told apart.

    ``residuals`` are |m^T u_i - s_i v_i| / s_i, (..., k); the k + 1 singular values s descend;
    ``spread``, (...), is the mean of s_j^2 outside the k, by the weights r_ij^2.
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


class Projection(NamedTuple):
    """What is known of m on a basis: all that a check for convergence needs, on the host."""

    k: int  # number of triplets wanted
    gram: Tensor  # w w^T of the images w of the basis, (..., n, n)
    coupling: Tensor  # how the last block of the basis is coupled to the next, (..., width, width)
    w: Tensor  # the images themselves, (..., n, rows), where m is
    complete: bool  # whether the basis spans the whole space
    ready: Callable[[], None]  # returns when the device has copied the tensors

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the singular values of w, descending, and its left singular vectors."""
        self.ready()
        squares, q = torch.linalg.eigh(wide(self.gram))
        s, q = squares.clamp(min=0).sqrt().flip(-1).to(self.gram), q.flip(-1).to(self.gram)
        # Roots of eigenvalues have half of the digits of w w^T, too few if w has no more digits.
        least = ROUNDING * torch.finfo(self.gram.dtype).eps ** 0.5 * s[..., 0]
        if self.gram.dtype == self.coupling.dtype and bool((s[..., self.k - 1] < least).any()):
            q, s, _ = torch.linalg.svd(wide(self.w), full_matrices=False)
            s, q = s.to(self.gram), q.to(self.gram)
        return s, q

    def spread(self) -> Tensor:
        """Return the mean of |m v|^2 over the last block, (...).

        The next block, which holds the residuals, will have about the same mean: the square of a
        typical singular value outside the space.
        """
        return self.gram.diagonal(dim1=-2, dim2=-1)[..., -self.coupling.shape[-1] :].mean(-1)

    def around_cut(self, s: Tensor) -> Tensor:
        """Return the first k + 1 of the singular values of w.

        If w has only k, the next singular value is unknown (NaN), or 0 in the whole space.
        """
        if s.shape[-1] > self.k:
            return s[..., : self.k + 1]
        following = torch.full_like(s[..., -1:], 0.0 if self.complete else torch.nan)
        return torch.cat([s, following], -1)

    def estimates(self, s: Tensor, q: Tensor) -> Tensor:
        """Return the residuals |m^T u - s v| / s by the recurrence, (..., k)."""
        last = self.coupling.shape[-1]
        coefficients = self.coupling.to(q) @ q[..., -last:, : self.k]
        outside = torch.linalg.vector_norm(coefficients, dim=-2)
        least = noise(s, self.coupling.dtype)
        s = s[..., : self.k]
        # A zero singular value has no defined vectors: its residual counts as 0.
        return torch.where(s > least, outside / s**2, 0.0).to(self.coupling.dtype)


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
        """Return whether the goal, or as much of it as rounding allows, is reached.

        For the arguments see ``direction_error``.
        """
        k = residuals.shape[-1]
        floor = ROUNDING * torch.finfo(residuals.dtype).eps * s[..., :1] / s[..., :k]
        floor = floor.nan_to_num(0.0)
        reached = (residuals <= floor.clamp(min=self._goal.residual)).all(-1)
        if self._goal.error is not None:
            # Infinite for copies on both sides of the cut, for which the residuals suffice.
            least = direction_error(floor, s, spread).clamp(min=self._goal.error)
            reached &= direction_error(residuals.to(s), s, spread) <= least
        return bool((reached | residuals.isnan().all(-1)).all())  # NaN: of a broken matrix

    def stalls(self, residuals: Tensor) -> bool:
        """Return whether the residuals have stopped to decrease, by the last few checks."""
        worst = float(residuals.max())
        self._stalls += worst > self._best / 2
        self._best = min(self._best, worst)
        return self._stalls > _STALLS

    def may_lack_copies(self, s: Tensor) -> bool:
        """Return whether a singular value has all the copies that the directions can find.

        It may then have more copies, in whose place smaller singular values were found.
        """
        k = s.shape[-1]
        if k <= self.copies:
            return False
        close = 1 - max(2 * self._goal.residual, CLUSTER)
        lowest = s[..., self.copies - 1 :]
        equal = lowest >= close * s[..., : k - self.copies + 1]
        return bool((equal & (s[..., -1:] < close * lowest)).any())

"""Split a matrix between two balls, whose Minkowski sum is the unit ball of a blend (Lemma 9).

For a matrix x and balls A and B the blend's norm is the smallest t with x in t * A + t * B. Every
search returns Z, the part of x in t * A, and a y that bounds t from below:
``<x, y> = t * max <y, d>`` over A + B.

A room of its own because ``norms`` consists of formulas, and these are searches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.vector_norms import Euclidean, Largest, VectorNorm, divide, root

# Relative accuracy of the iterative split, and the rounds that it may take.
TOLERANCE = 1e-6
ROUNDS = 20_000
_RELAXATION = 1.8
_REBALANCE = 50  # rounds

Coordinates = Callable[[Tensor], "tuple[Tensor, Callable[[Tensor], Tensor]]"]


class Body(NamedTuple):
    """The ball of matrices x with vector.value(coordinates(x)[0]) <= radius."""

    vector: VectorNorm
    coordinates: Coordinates
    radius: float

    def project(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the nearest coordinates in t * ball: (..., n), (...) -> (..., n)."""
        return self.vector.project(s, self.radius * t)


def split(x: Tensor, first: Body, second: Body) -> tuple[Tensor, Tensor]:
    """Return Z and y (see the module) for matrices (..., rows, cols) in float64.

    Exact by a search in one dimension where one ball is Euclidean, or where both are norms of the
    same coordinates and one is the largest of them; else by iteration to a relative ``TOLERANCE``.
    """
    shared = first.coordinates is second.coordinates
    if isinstance(second.vector, Euclidean):
        s, rebuild = first.coordinates(x)
        z = first.project(s, _search(s, first, second))
        return rebuild(z), rebuild(s - z)  # the rest is normal to both balls
    if shared and isinstance(second.vector, Largest):
        s, rebuild = first.coordinates(x)
        z = s - second.project(s, _search(s, second, first))
        return rebuild(z), rebuild(first.vector.dual_norm.vertex(z))
    if isinstance(first.vector, Euclidean) or (shared and isinstance(first.vector, Largest)):
        rest, y = split(x, second, first)
        return x - rest, y
    return _split_iteratively(x, first, second)


def _search(s: Tensor, first: Body, second: Body) -> Tensor:
    """Return the t for which what exceeds t * first in the coordinates s just fits t * second."""
    # At the largest t they lie in one ball alone.
    high = torch.minimum(*(body.vector.value(s) / body.radius for body in (first, second)))
    return root(
        lambda t: second.vector.value(s - first.project(s, t)) - second.radius * t,
        torch.zeros_like(high),
        high,
    )


def _split_iteratively(x: Tensor, first: Body, second: Body) -> tuple[Tensor, Tensor]:
    """Find Z and y by the alternating direction method of multipliers.

    Maximises ``<x, y>`` over the y whose dual norms, weighted by the radii, sum to at most 1, with
    a copy of y for each of the two terms; Z is the multiplier of their equality. Every round bounds
    the norm of x from below, by a copy, and from above, by Z; the best of each are returned.
    """
    scale = x.abs().amax((-2, -1), keepdim=True)
    x = divide(x, scale)
    y, z, rho = torch.zeros_like(x), x / 2, torch.ones_like(scale)
    best_y, best_z = y, z
    below, above = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for i in range(ROUNDS):
        s, rebuild = first.coordinates(y + z / rho)
        r, rebuild_second = second.coordinates(y + (x - z) / rho)
        shrunk, shrunk_second = _project_pair(first, second, s, r)
        copy, copy_second = rebuild(shrunk), rebuild_second(shrunk_second)

        dual = first.radius * first.vector.dual(shrunk)
        dual = dual + second.radius * second.vector.dual(second.coordinates(copy)[0])
        bound = divide((x * copy).sum((-2, -1)), dual)[..., None, None]
        best_y = torch.where(bound > below, copy, best_y)
        below = torch.maximum(bound, below)
        point = rho * rebuild(s - shrunk)
        inside = rho[..., 0, 0] * first.vector.value(s - shrunk) / first.radius
        outside = second.vector.value(second.coordinates(x - point)[0]) / second.radius
        bound = torch.maximum(inside, outside)[..., None, None]
        best_z = torch.where(bound < above, point, best_z)
        above = torch.minimum(bound, above)
        if (above - below <= TOLERANCE * above).all():
            return scale * best_z, best_y

        previous, y = y, y + _RELAXATION * ((copy + copy_second) / 2 - y)
        z = z - _RELAXATION * rho * (copy - copy_second) / 2
        if i % _REBALANCE == _REBALANCE - 1:
            apart = torch.linalg.matrix_norm(copy - copy_second, keepdim=True)
            moved = 2 * torch.linalg.matrix_norm(y - previous, keepdim=True)
            rho = torch.where(apart > 2 * moved, 2 * rho, rho)
            rho = torch.where(moved > 2 * apart, rho / 2, rho)
    gap = ((above - below) / above).max().item()
    raise RuntimeError(
        f"the blend's norm is known within {gap:.0e} after {ROUNDS} rounds, not within "
        f"{TOLERANCE:.0e}: try smaller matrices"
    )


def _project_pair(first: Body, second: Body, s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest pair of coordinates whose weighted dual norms sum to at most 1.

    Each loses its projection onto a ball of its own term, with one radius t for both.
    """

    def shrunk(t: Tensor) -> tuple[Tensor, Tensor]:
        return s - first.project(s, t), r - second.project(r, t)

    def excess(t: Tensor) -> Tensor:
        a, b = shrunk(t)
        return first.radius * first.vector.dual(a) + second.radius * second.vector.dual(b) - 1

    high = torch.maximum(
        first.vector.value(s) / first.radius, second.vector.value(r) / second.radius
    )
    return shrunk(root(excess, torch.zeros_like(high), high))

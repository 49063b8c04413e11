"""Symmetric norms of non-negative vectors, which become norms of matrices by their coordinates.

``norms`` applies the same few to singular values, to entries and to the lengths of rows and
columns; ``minkowski`` projects onto their balls, and ``bounds`` uses the extreme points. Vectors
have shape (..., n); the order of their components never matters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class VectorNorm(ABC):
    """A symmetric norm of non-negative vectors s of shape (..., n)."""

    @abstractmethod
    def value(self, s: Tensor) -> Tensor:
        """Return the norm: (..., n) -> (...)."""

    @property
    @abstractmethod
    def dual_norm(self) -> VectorNorm:
        """The dual norm."""

    def dual(self, s: Tensor) -> Tensor:
        """Return the dual norm of s: (..., n) -> (...)."""
        return self.dual_norm.value(s)

    @abstractmethod
    def vertex(self, s: Tensor) -> Tensor:
        """Return a maximiser of ``<s, d>`` over the unit ball: (..., n) -> (..., n)."""

    @abstractmethod
    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        """Return the nearest vector of norm <= radius: (..., n), (...) -> (..., n)."""

    @abstractmethod
    def extremes(self, n: int) -> Tensor | None:
        """Return the extreme points of the unit ball up to order and signs, (count, n), on the CPU.

        None for balls that have infinitely many.
        """

    def longest(self, n: int) -> float:
        """Return the largest Euclidean length of vectors of n components in the unit ball."""
        extremes = self.extremes(n)
        return 1.0 if extremes is None else float(torch.linalg.vector_norm(extremes, dim=-1).max())


class Power(VectorNorm):
    """The p-th root of the sum of p-th powers, 1 < p < infinity."""

    def __init__(self, p: float) -> None:
        self.p = p

    def value(self, s: Tensor) -> Tensor:  # noqa: D102
        # Scaled first: the square of 1e-200 underflows to 0.
        peak = s.detach().amax(-1, keepdim=True)
        return torch.linalg.vector_norm(divide(s, peak), ord=self.p, dim=-1) * peak.squeeze(-1)

    @property
    def dual_norm(self) -> VectorNorm:  # noqa: D102
        return Power(self.p / (self.p - 1))

    def vertex(self, s: Tensor) -> Tensor:  # noqa: D102
        powers = divide(s, s.amax(-1, keepdim=True)) ** (1 / (self.p - 1))
        return divide(powers, self.value(powers).unsqueeze(-1))

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        """Return x with x + t x^(p - 1) = s for the one t at which x has norm ``radius``."""
        scale = s.amax(-1, keepdim=True)
        s, radius = divide(s, scale), divide(radius.unsqueeze(-1), scale)
        power = self.p - 1

        def shrunk(t: Tensor) -> Tensor:
            return root(lambda x: s - x - t * x**power, torch.zeros_like(s), s)

        # x is at most (s / t)^(1 / (p - 1)).
        high = divide(self.value(s ** (1 / power)).unsqueeze(-1), radius) ** power
        t = root(
            lambda t: self.value(shrunk(t)).unsqueeze(-1) - radius, torch.zeros_like(high), high
        )
        inside = self.value(s).unsqueeze(-1) <= radius
        return torch.where(inside, s, torch.where(radius > 0, shrunk(t), 0)) * scale

    def extremes(self, n: int) -> None:  # noqa: D102
        return None

    def longest(self, n: int) -> float:  # noqa: D102
        return float(n ** max(0.0, 1 / 2 - 1 / self.p))


class Euclidean(Power):
    """The root of the sum of squares."""

    def __init__(self) -> None:
        super().__init__(2.0)

    @property
    def dual_norm(self) -> VectorNorm:  # noqa: D102
        return self

    def project(self, s: Tensor, radius: Tensor) -> Tensor:  # noqa: D102
        return self.vertex(s) * torch.minimum(self.value(s), radius).unsqueeze(-1)


class Largest(VectorNorm):
    """The largest component."""

    def value(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.amax(-1)

    @property
    def dual_norm(self) -> VectorNorm:  # noqa: D102
        return TopSumDual(1)

    def vertex(self, s: Tensor) -> Tensor:  # noqa: D102
        return (s > 0).to(s)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:  # noqa: D102
        return torch.minimum(s, radius.unsqueeze(-1))

    def extremes(self, n: int) -> Tensor:  # noqa: D102
        return torch.ones(1, n, dtype=torch.float64, device="cpu")


class TopSum(VectorNorm):
    """The sum of the k largest components."""

    def __init__(self, k: int) -> None:
        self.k = k

    def value(self, s: Tensor) -> Tensor:  # noqa: D102
        return s.topk(min(self.k, s.shape[-1]), dim=-1).values.sum(-1)

    @property
    def dual_norm(self) -> VectorNorm:  # noqa: D102
        return TopSumDual(self.k)

    def vertex(self, s: Tensor) -> Tensor:  # noqa: D102
        concentrated = s.amax(-1) >= s.sum(-1) / self.k
        spread = (s > 0).to(s) / self.k
        return torch.where(concentrated.unsqueeze(-1), mark_largest(s, 1), spread)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        """Return s minus its projection onto the dual ball that leaves a rest of norm ``radius``.

        That is Moreau's decomposition; the size of the dual ball is searched for.
        """
        dual = self.dual_norm
        size = root(
            lambda size: self.value(s - dual.project(s, size)) - radius,
            torch.zeros_like(radius),
            self.dual(s),
        )
        inside = (self.value(s) <= radius).unsqueeze(-1)
        return torch.where(inside, s, s - dual.project(s, size))

    def extremes(self, n: int) -> Tensor:  # noqa: D102
        points = torch.zeros(2, n, dtype=torch.float64, device="cpu")
        points[0, 0] = 1
        points[1] = 1 / self.k
        return points


class TopSumDual(VectorNorm):
    """max(largest, sum / k), the dual of the sum of the k largest; k = 1 is the sum."""

    def __init__(self, k: int) -> None:
        self.k = k

    def value(self, s: Tensor) -> Tensor:  # noqa: D102
        return torch.maximum(s.amax(-1), s.sum(-1) / self.k)

    @property
    def dual_norm(self) -> VectorNorm:  # noqa: D102
        return TopSum(self.k)

    def vertex(self, s: Tensor) -> Tensor:  # noqa: D102
        return mark_largest(s, self.k)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        """Return clamp(s - t, 0, radius) with the smallest t >= 0 whose sum is <= k * radius.

        The sum is piecewise linear in t: a binary search finds the two breakpoints around the
        budget, interpolation the rest.
        """
        radius = radius.unsqueeze(-1)
        budget = min(self.k, s.shape[-1]) * radius
        breaks = torch.cat([torch.zeros_like(s[..., :1]), s - radius, s], -1).clamp(min=0)
        breaks = breaks.sort(-1).values

        def cut(t: Tensor) -> Tensor:
            return torch.minimum((s - t).clamp(min=0), radius)

        def total(index: Tensor) -> Tensor:
            return cut(breaks.gather(-1, index)).sum(-1, keepdim=True)

        low = torch.zeros_like(budget, dtype=torch.long)
        high = torch.full_like(low, breaks.shape[-1] - 1)
        too_much = total(low) > budget
        for _ in range(breaks.shape[-1].bit_length()):
            middle = (low + high) // 2
            over = total(middle) > budget
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        f0, f1 = total(low), total(high)
        t0, t1 = breaks.gather(-1, low), breaks.gather(-1, high)
        t = t0 + (t1 - t0) * divide(f0 - budget, f0 - f1)
        return cut(torch.where(too_much, t, 0.0))

    def extremes(self, n: int) -> Tensor:  # noqa: D102
        return (torch.arange(n, device="cpu") < self.k).to(torch.float64).unsqueeze(0)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0; gradients are finite there too."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)


def mark_largest(s: Tensor, k: int) -> Tensor:
    """Return 1 at the k largest positive components and 0 elsewhere."""
    if k >= s.shape[-1]:
        return (s > 0).to(s)
    top = s.topk(k, dim=-1)
    return torch.zeros_like(s).scatter(-1, top.indices, (top.values > 0).to(s))


def root(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return the zero of a decreasing function to float64 accuracy.

    Chandrupatla's method: inverse quadratic interpolation where that is safe, else bisection. f is
    elementwise and at most 0 at ``high``; where it is not above 0 at ``low``, that is the answer.
    """
    a, b = high, low  # the bracket; a is the newer end
    fa, fb = f(a), f(b)
    below = fb <= 0
    t = torch.full_like(a, 0.5)
    for _ in range(100):
        new = a + t * (b - a)
        value = f(new)
        same = value.sign() == fa.sign()
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = new, value
        best = torch.where(fa.abs() < fb.abs(), a, b)
        width, smallest = (b - a).abs(), 2 * torch.finfo(a.dtype).eps * best.abs()
        if (below | (fa == 0) | (width <= 2 * smallest)).all():
            break
        xi, phi = divide(a - b, c - b), divide(fa - fb, fc - fb)
        t = divide(fa, fb - fa) * divide(fc, fb - fc)
        t = t + divide(c - a, b - a) * divide(fa, fc - fa) * divide(fb, fc - fb)
        t = torch.where((phi.square() < xi) & ((1 - phi).square() < 1 - xi), t, 0.5)
        margin = divide(smallest, width).clamp(max=0.5)
        t = torch.minimum(torch.maximum(t, margin), 1 - margin)
    return torch.where(below, low, best)

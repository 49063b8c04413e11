"""Matrix norms with their duals and linear minimisation oracles, exact by SVD in float64.

These are the definitions that everything else in the package is tested against; the fast oracles
that the optimizer uses live in ``lit_fanions.lmo``.

A norm here is a vector norm applied to the *coordinates* of a matrix: its singular values, or the
absolute values of its entries. The two families mirror each other (the paper's Table 1): the
spectral norm is the largest singular value, ``MaxEntry`` the largest entry, and so on. Every method
takes a tensor of shape (..., rows, cols), treats the leading dimensions as a batch, and answers in
float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Blend",
    "Frobenius",
    "KyFan",
    "KyFanDual",
    "MaxEntry",
    "Norm",
    "Nuclear",
    "Spectral",
    "SumEntry",
]


# Vector norms of a non-negative vector s of shape (..., n). All are symmetric: order is free.


class _VectorNorm(ABC):
    @abstractmethod
    def value(self, s: Tensor) -> Tensor:
        """The norm: (..., n) -> (...)."""

    @abstractmethod
    def dual(self, s: Tensor) -> Tensor:
        """The dual norm: (..., n) -> (...)."""

    @abstractmethod
    def vertex(self, s: Tensor) -> Tensor:
        """A maximiser of <s, d> over the unit ball: (..., n) -> (..., n)."""

    @abstractmethod
    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        """The nearest vector of norm <= radius: (..., n), (...) -> (..., n)."""


class _Euclidean(_VectorNorm):
    def value(self, s: Tensor) -> Tensor:
        return torch.linalg.vector_norm(s, dim=-1)

    dual = value

    def vertex(self, s: Tensor) -> Tensor:
        # Scaled first: the square of 1e-200 is no number.
        s = _divide(s, s.amax(-1, keepdim=True))
        return _divide(s, self.value(s).unsqueeze(-1))

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        return self.vertex(s) * torch.minimum(self.value(s), radius).unsqueeze(-1)


class _TopSum(_VectorNorm):
    """The sum of the k largest."""

    def __init__(self, k: int) -> None:
        self.k = k

    def value(self, s: Tensor) -> Tensor:
        return s.topk(min(self.k, s.shape[-1]), dim=-1).values.sum(-1)

    def dual(self, s: Tensor) -> Tensor:
        return torch.maximum(s.amax(-1), s.sum(-1) / self.k)

    def vertex(self, s: Tensor) -> Tensor:
        concentrated = s.amax(-1) >= s.sum(-1) / self.k
        spread = (s > 0).to(s) / self.k
        return torch.where(concentrated.unsqueeze(-1), _largest(s, 1), spread)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        # Moreau's decomposition: s minus its projection onto the dual ball, whose size is such
        # that the rest has norm `radius`.
        dual = _TopSumDual(self.k)
        size = bisect(
            lambda size: self.value(s - dual.project(s, size)) > radius,
            torch.zeros_like(radius),
            self.dual(s),
        )
        inside = (self.value(s) <= radius).unsqueeze(-1)
        return torch.where(inside, s, s - dual.project(s, size))


class _TopSumDual(_VectorNorm):
    """max(largest, sum / k), the dual of the sum of the k largest."""

    def __init__(self, k: int) -> None:
        self.k = k

    def value(self, s: Tensor) -> Tensor:
        return _TopSum(self.k).dual(s)

    def dual(self, s: Tensor) -> Tensor:
        return _TopSum(self.k).value(s)

    def vertex(self, s: Tensor) -> Tensor:
        return _largest(s, self.k)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        # clamp(s - t, 0, radius) with the smallest t >= 0 whose sum is at most k * radius. The
        # sum is piecewise linear in t, so t is interpolated between two breakpoints.
        radius = radius.unsqueeze(-1)
        budget = min(self.k, s.shape[-1]) * radius
        breaks = torch.cat([torch.zeros_like(s[..., :1]), s - radius, s], -1).clamp(min=0)
        breaks = breaks.sort(-1).values
        sums = (s.unsqueeze(-2) - breaks.unsqueeze(-1)).clamp(min=0)
        sums = torch.minimum(sums, radius.unsqueeze(-1)).sum(-1)
        after = (sums > budget).sum(-1, keepdim=True).clamp(1, breaks.shape[-1] - 1)
        t0, t1 = breaks.gather(-1, after - 1), breaks.gather(-1, after)
        f0, f1 = sums.gather(-1, after - 1), sums.gather(-1, after)
        t = t0 + (t1 - t0) * _divide(f0 - budget, f0 - f1)
        t = torch.where(sums[..., :1] > budget, t, 0.0)
        return torch.minimum((s - t).clamp(min=0), radius)


# Coordinates: a matrix -> (s, rebuild), where rebuild turns coordinates d of the same shape into
# the matrix with those coordinates in the bases, or with the signs, of the first.

_Coordinates = Callable[[Tensor], "tuple[Tensor, Callable[[Tensor], Tensor]]"]


def _spectrum(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    u, s, vh = torch.linalg.svd(_float64(x), full_matrices=False)
    # A singular value below this is rounding noise, and its singular vectors mean nothing.
    noise = s.detach().amax(-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(s.dtype).eps
    return torch.where(s > noise, s, 0.0), lambda d: (u * d.unsqueeze(-2)) @ vh


def _entries(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    x = _float64(x)
    return x.abs().flatten(-2), lambda d: x.sign() * d.unflatten(-1, x.shape[-2:])


# Matrix norms.


class Norm(ABC):
    """A norm on matrices, with its dual and the oracle of its unit ball."""

    def __call__(self, x: Tensor) -> Tensor:
        """The same as ``value(x)``."""
        return self.value(x)

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """The norm of each matrix: (..., rows, cols) -> (...), float64, differentiable."""

    @abstractmethod
    def dual(self, x: Tensor) -> Tensor:
        """The dual norm, max <x, d> over the unit ball: (..., rows, cols) -> (...), float64."""

    @abstractmethod
    def lmo(self, m: Tensor) -> Tensor:
        """A maximiser of <m, d> over the unit ball: (..., rows, cols) -> the same shape, float64.

        The answer to a zero matrix is zero. Where there are several maximisers (equal singular
        values at the cut, equal largest entries) one of them is returned.
        """


class _CoordinateNorm(Norm):
    _vector: _VectorNorm
    _coordinates: _Coordinates = staticmethod(_spectrum)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def value(self, x: Tensor) -> Tensor:
        return self._vector.value(self._coordinates(x)[0])

    def dual(self, x: Tensor) -> Tensor:
        return self._vector.dual(self._coordinates(x)[0])

    def lmo(self, m: Tensor) -> Tensor:
        s, rebuild = self._coordinates(m)
        return rebuild(self._vector.vertex(s))


class Frobenius(_CoordinateNorm):
    """The Euclidean norm of the entries, its own dual. Step: normalised SGD (Lemma 1)."""

    _vector = _Euclidean()
    _coordinates = staticmethod(_entries)


class Spectral(_CoordinateNorm):
    """The largest singular value; the dual is the nuclear norm. Step: Muon (Lemma 2)."""

    _vector = _TopSumDual(2**62)


class Nuclear(_CoordinateNorm):
    """The sum of the singular values; the dual is the spectral norm. Step: Neon (Lemma 3)."""

    _vector = _TopSumDual(1)


class KyFan(_CoordinateNorm):
    """The Ky Fan k-norm, the sum of the k largest singular values (Bhatia, Matrix Analysis).

    The dual is max(spectral, nuclear / k); the oracle is u_1 v_1^T where the spectral norm is the
    larger of the two, and U V^T / k otherwise.

    Args:
        k: How many singular values are summed, at least 1; with as many as there are, or more,
            this is the nuclear norm.

    Raises:
        ValueError: If k is not a positive whole number.
    """

    def __init__(self, k: int) -> None:
        self.k = _positive_int(k)
        self._vector = _TopSum(k)

    def __repr__(self) -> str:
        return f"KyFan({self.k})"


class KyFanDual(_CoordinateNorm):
    """The dual of the Ky Fan k-norm, max(spectral, nuclear / k). Step: k-Fanion (Lemma 6).

    The oracle is U_k V_k^T. k = 1 is the nuclear norm, k >= min(rows, cols) the spectral norm.

    Args:
        k: Rank of the oracle's answer, at least 1.

    Raises:
        ValueError: If k is not a positive whole number.
    """

    def __init__(self, k: int) -> None:
        self.k = _positive_int(k)
        self._vector = _TopSumDual(k)

    def __repr__(self) -> str:
        return f"KyFanDual({self.k})"


class MaxEntry(_CoordinateNorm):
    """The largest absolute entry; the dual is the sum of entries. Step: signSGD, Signum."""

    _vector = _TopSumDual(2**62)
    _coordinates = staticmethod(_entries)


class SumEntry(_CoordinateNorm):
    """The sum of absolute entries; the dual is the largest one. Step: Gauss-Southwell."""

    _vector = _TopSumDual(1)
    _coordinates = staticmethod(_entries)


class Blend(Norm):
    """The norm whose dual is alpha * norm.dual + (1 - alpha) * other.dual.

    Its unit ball is the Minkowski sum of the two balls (Lemma 9), so the oracle is the weighted
    sum of the two oracles. ``Blend(Spectral(), a)`` is the ball of F-Muon (equation 22),
    ``Blend(Nuclear(), a)`` that of F-Neon (equation 23).

    Args:
        norm: The norm that gets the weight alpha, any of this module but a blend.
        alpha: The weight. Outside [0, 1] the step is still defined, but there is no norm ball:
            ``value`` then raises.
        blend: The other norm: ``frobenius`` (F-Muon, ...) or ``sign`` (S-Muon, ...: the largest
            entry, with ball radius ``sign_scale``).
        sign_scale: Size s of the sign part, alpha * D + (1 - alpha) * s * sign(m); sign only.

    Raises:
        ValueError: If the norm, the blend or the scale is none of these.
    """

    def __init__(
        self,
        norm: Norm,
        alpha: float,
        blend: Literal["frobenius", "sign"] = "frobenius",
        sign_scale: float = 1.0,
    ) -> None:
        if not isinstance(norm, _CoordinateNorm):
            raise ValueError(f"norm must be a norm of lit_fanions.norms, not a blend; got {norm!r}")
        if blend not in ("frobenius", "sign"):
            raise ValueError(f'blend must be "frobenius" or "sign", got {blend!r}')
        if not sign_scale > 0:
            raise ValueError(f"sign_scale must be positive, got {sign_scale}")
        self.norm, self.alpha, self.blend = norm, float(alpha), blend
        self.sign_scale = float(sign_scale)
        self._other: _CoordinateNorm = Frobenius() if blend == "frobenius" else MaxEntry()
        self._weight = (1 - self.alpha) * (1.0 if blend == "frobenius" else self.sign_scale)

    def __repr__(self) -> str:
        scale = f", sign_scale={self.sign_scale}" if self.blend == "sign" else ""
        return f"Blend({self.norm!r}, {self.alpha}, {self.blend!r}{scale})"

    def dual(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.alpha * self.norm.dual(x) + self._weight * self._other.dual(x)

    def lmo(self, m: Tensor) -> Tensor:  # noqa: D102
        return self.alpha * self.norm.lmo(m) + self._weight * self._other.lmo(m)

    def value(self, x: Tensor) -> Tensor:
        """The smallest t with x in t * (alpha * ball + (1 - alpha) * other ball).

        Raises:
            ValueError: If alpha is outside [0, 1], where there is no norm.
            NotImplementedError: For a sign blend with 0 < alpha < 1: the distance in the largest
                entry has no one-dimensional form.
        """
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha} is outside [0, 1]: this blend is no norm")
        if self.alpha in (0, 1):
            part, weight = (self.norm, 1.0) if self.alpha == 1 else (self._other, self._weight)
            return part.value(x) / weight
        if self.blend == "sign":
            raise NotImplementedError(f"{self!r} has a dual and an lmo, but no value yet")
        s, _ = self.norm._coordinates(x)
        return self._gauge(s)

    def _gauge(self, s: Tensor) -> Tensor:
        # Equations 22 and 23 in coordinates: the Euclidean distance from s to t * alpha * ball
        # falls to t * (1 - alpha) at the t wanted.
        ball, other = self.norm._vector, self._other._vector
        fixed = s.detach()

        def too_small(t: Tensor) -> Tensor:
            rest = fixed - ball.project(fixed, self.alpha * t)
            return other.value(rest) > self._weight * t

        upper = torch.minimum(ball.value(fixed) / self.alpha, other.value(fixed) / self._weight)
        t = bisect(too_small, torch.zeros_like(upper), upper)
        # At the answer the rest is normal to both balls, so the norm is linear along it: one
        # product makes the value accurate to second order, and differentiable.
        rest = fixed - ball.project(fixed, self.alpha * t)
        dual = self.alpha * ball.dual(rest) + self._weight * other.dual(rest)
        return _divide((s * rest).sum(-1), dual)


def _float64(x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"expected a matrix or a batch of them, got shape {tuple(x.shape)}")
    # Apple's GPUs have no float64.
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def _positive_int(k: int) -> int:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    return k


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0; with finite gradients there."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)


def _largest(s: Tensor, k: int) -> Tensor:
    """1 at the k largest positive entries, 0 elsewhere."""
    if k >= s.shape[-1]:
        return (s > 0).to(s)
    top = s.topk(k, dim=-1)
    return torch.zeros_like(s).scatter(-1, top.indices, (top.values > 0).to(s))


def bisect(too_small: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The point where `too_small` turns from true to false, to float64 accuracy."""
    for _ in range(60):
        middle = (low + high) / 2
        small = too_small(middle)
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return (low + high) / 2

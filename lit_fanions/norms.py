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


# Of the values of sign blends, relative; the rounds that they may take.
TOLERANCE = 1e-6
_ROUNDS = 20_000
_RELAXATION = 1.8
_REBALANCE = 50  # rounds


# Vector norms of a non-negative vector s of shape (..., n). All are symmetric: order is free.


class _VectorNorm(ABC):
    @abstractmethod
    def value(self, s: Tensor) -> Tensor:
        """The norm: (..., n) -> (...)."""

    @property
    @abstractmethod
    def dual_norm(self) -> _VectorNorm: ...

    def dual(self, s: Tensor) -> Tensor:
        """The dual norm: (..., n) -> (...)."""
        return self.dual_norm.value(s)

    @abstractmethod
    def vertex(self, s: Tensor) -> Tensor:
        """A maximiser of <s, d> over the unit ball: (..., n) -> (..., n)."""

    @abstractmethod
    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        """The nearest vector of norm <= radius: (..., n), (...) -> (..., n)."""


class _Euclidean(_VectorNorm):
    def value(self, s: Tensor) -> Tensor:
        return torch.linalg.vector_norm(s, dim=-1)

    @property
    def dual_norm(self) -> _VectorNorm:
        return self

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

    @property
    def dual_norm(self) -> _VectorNorm:
        return _TopSumDual(self.k)

    def vertex(self, s: Tensor) -> Tensor:
        concentrated = s.amax(-1) >= s.sum(-1) / self.k
        spread = (s > 0).to(s) / self.k
        return torch.where(concentrated.unsqueeze(-1), _largest(s, 1), spread)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        # Moreau's decomposition: s minus its projection onto the dual ball, whose size is such
        # that the rest has norm `radius`.
        dual = self.dual_norm
        size = root(
            lambda size: self.value(s - dual.project(s, size)) - radius,
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
        return torch.maximum(s.amax(-1), s.sum(-1) / self.k)

    @property
    def dual_norm(self) -> _VectorNorm:
        return _TopSum(self.k)

    def vertex(self, s: Tensor) -> Tensor:
        return _largest(s, self.k)

    def project(self, s: Tensor, radius: Tensor) -> Tensor:
        # clamp(s - t, 0, radius) with the smallest t >= 0 whose sum is at most k * radius. The
        # sum is piecewise linear in t: a binary search for the two breakpoints around it, then
        # interpolation.
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
        t = t0 + (t1 - t0) * _divide(f0 - budget, f0 - f1)
        return cut(torch.where(too_much, t, 0.0))


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

        Exact by a search in one dimension, but for sign blends of norms of singular values: those
        within a relative ``TOLERANCE``, by many decompositions, for matrices of some tens of rows.

        Raises:
            ValueError: If alpha is outside [0, 1], where there is no norm.
            RuntimeError: If the tolerance is not reached.
        """
        self._check_alpha()
        if self.alpha in (0, 1):
            part, radius = (self.norm, 1.0) if self.alpha == 1 else (self._other, self._weight)
            return part.value(x) / radius
        # <x, y> / |y|_dual is below the norm for every y, and the norm for the best one: an error
        # of y counts by its square, and the derivative is y's.
        _, y = self._solve(x)
        return _divide((_float64(x) * y).sum((-2, -1)), self.dual(y))

    def split(self, x: Tensor) -> Tensor:
        """The Z of equations 22 and 23: what the first ball gives to x, the other gives x - Z.

        With t the value of x, Z is in t * alpha * ball and x - Z in t * (1 - alpha) * other ball
        (up to ``TOLERANCE``, see ``value``): the norm's certificate from above.

        Args:
            x: (..., rows, cols).

        Returns:
            Of the same shape, float64.

        Raises:
            ValueError: As ``value``.
            RuntimeError: As ``value``.
        """
        self._check_alpha()
        return _float64(x) * self.alpha if self.alpha in (0, 1) else self._solve(x)[0]

    def _check_alpha(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha} is outside [0, 1]: this blend is no norm")

    def _solve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Z, and a y with <x, y> = |x| |y|_dual, for 0 < alpha < 1; without derivatives."""
        x = _float64(x).detach()
        alpha, weight, ball = self.alpha, self._weight, self.norm._vector
        entrywise = self.norm._coordinates is _entries
        if self.blend == "sign" and not entrywise:
            return _split_by_sign(x, self.norm, alpha, weight)
        s, rebuild = self.norm._coordinates(x)
        other = self._other._vector
        high = torch.minimum(ball.value(s) / alpha, other.value(s) / weight)
        low = torch.zeros_like(high)
        if self.blend == "sign":
            # What is above t * weight has norm t * alpha at the t wanted.
            def above(t: Tensor) -> Tensor:
                return (s - weight * t.unsqueeze(-1)).clamp(min=0)

            z = above(root(lambda t: ball.value(above(t)) - alpha * t, low, high))
            return rebuild(z), rebuild(ball.dual_norm.vertex(z))
        # The distance from s to t * alpha * ball is t * weight at the t wanted; the rest is normal
        # to both balls there.
        t = root(lambda t: other.value(s - ball.project(s, alpha * t)) - weight * t, low, high)
        z = ball.project(s, alpha * t)
        return rebuild(z), rebuild(s - z)


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


def root(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The zero of a decreasing function, to float64 accuracy; `low` where it is not above `low`.

    Chandrupatla's method: inverse quadratic interpolation where that is safe, else bisection.
    """
    a, b = high, low  # the bracket; a is the newer
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
        xi, phi = _divide(a - b, c - b), _divide(fa - fb, fc - fb)
        t = _divide(fa, fb - fa) * _divide(fc, fb - fc)
        t = t + _divide(c - a, b - a) * _divide(fa, fc - fa) * _divide(fb, fc - fb)
        t = torch.where((phi.square() < xi) & ((1 - phi).square() < 1 - xi), t, 0.5)
        margin = _divide(smallest, width).clamp(max=0.5)
        t = torch.minimum(torch.maximum(t, margin), 1 - margin)
    return torch.where(below, low, best)


# Sign blends have no common basis for their two balls, and so no search in one dimension.


def _split_by_sign(
    x: Tensor, norm: _CoordinateNorm, alpha: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Z and y of a sign blend, by the alternating direction method of multipliers.

    Maximises <x, y> over alpha * |y|_dual + weight * |y|_1 <= 1, with a copy of y for each of the
    two terms; Z is the multiplier of their equality. Every round bounds the norm of x from below,
    by a copy, and from above, by Z; the best ones are kept.
    """
    ball = norm._vector
    scale = x.abs().amax((-2, -1), keepdim=True)
    x = _divide(x, scale)
    y, z, rho = torch.zeros_like(x), x / 2, torch.ones_like(scale)
    best_y, best_z = y, z
    below, above = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for i in range(_ROUNDS):
        s, rebuild = norm._coordinates(y + z / rho)
        entries = y + (x - z) / rho
        kept, kept_entries = _project_pair(ball, alpha, weight, s, entries.abs().flatten(-2))
        first = rebuild(kept)
        second = entries.sign() * kept_entries.view_as(entries)

        dual = alpha * ball.dual(kept) + weight * first.abs().sum((-2, -1))
        bound = _divide((x * first).sum((-2, -1)), dual)[..., None, None]
        best_y = torch.where(bound > below, first, best_y)
        below = torch.maximum(bound, below)
        point = rho * rebuild(s - kept)
        inside = rho[..., 0, 0] * ball.value(s - kept) / alpha
        outside = (x - point).abs().amax((-2, -1)) / weight
        bound = torch.maximum(inside, outside)[..., None, None]
        best_z = torch.where(bound < above, point, best_z)
        above = torch.minimum(bound, above)
        if (above - below <= TOLERANCE * above).all():
            return scale * best_z, best_y

        previous, y = y, y + _RELAXATION * ((first + second) / 2 - y)
        z = z - _RELAXATION * rho * (first - second) / 2
        if i % _REBALANCE == _REBALANCE - 1:
            apart = torch.linalg.matrix_norm(first - second, keepdim=True)
            moved = 2 * torch.linalg.matrix_norm(y - previous, keepdim=True)
            rho = torch.where(apart > 2 * moved, 2 * rho, rho)
            rho = torch.where(moved > 2 * apart, rho / 2, rho)
    gap = ((above - below) / above).max().item()
    raise RuntimeError(
        f"the sign blend of {norm!r} with alpha = {alpha} is known within {gap:.0e} only after "
        f"{_ROUNDS} rounds, not within {TOLERANCE:.0e}: try smaller matrices"
    )


def _project_pair(
    ball: _VectorNorm, alpha: float, weight: float, s: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest pair with alpha * ball.dual(s) + weight * sum(entries) <= 1.

    Both lose what is in a ball of their term, of one radius t for both.
    """

    def shrunk(t: Tensor) -> tuple[Tensor, Tensor]:
        return s - ball.project(s, alpha * t), (entries - weight * t.unsqueeze(-1)).clamp(min=0)

    def excess(t: Tensor) -> Tensor:
        s, entries = shrunk(t)
        return alpha * ball.dual(s) + weight * entries.sum(-1) - 1

    high = torch.maximum(ball.value(s) / alpha, entries.amax(-1) / weight)
    return shrunk(root(excess, torch.zeros_like(high), high))

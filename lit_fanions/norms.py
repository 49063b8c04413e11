"""Matrix norms with their duals and linear minimisation oracles, exact by SVD in float64.

These are the definitions that everything else in the package is tested against; the fast oracles
that the optimizer uses live in ``lit_fanions.lmo``.

A norm here is a vector norm (``vector_norms``) of the *coordinates* of a matrix: its singular
values, the absolute values of its entries, or the lengths of its rows or columns. The families
mirror each other (the paper's Table 1): the spectral norm is the largest singular value,
``MaxEntry`` the largest entry, ``MaxRow`` the largest row length. Every method takes a tensor of
shape (..., rows, cols), treats the leading dimensions as a batch, and answers in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lit_fanions.checks import check_choice, exponent, real_number, whole_number
from lit_fanions.minkowski import TOLERANCE, Body, Coordinates, split
from lit_fanions.vector_norms import (
    Euclidean,
    Largest,
    Power,
    TopSum,
    TopSumDual,
    VectorNorm,
    divide,
)

__all__ = [
    "TOLERANCE",
    "Blend",
    "Frobenius",
    "KyFan",
    "KyFanDual",
    "MaxColumn",
    "MaxEntry",
    "MaxRow",
    "Norm",
    "Nuclear",
    "Schatten",
    "Spectral",
    "SumEntry",
]


# Coordinates: a matrix -> (s, rebuild). ``rebuild`` maps coordinates d, of the shape of s, to the
# matrix that has them in the same singular vectors, signs or directions.


def singular_values(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the singular values, (..., min(rows, cols)), and the way back."""
    u, s, vh = torch.linalg.svd(_float64(x), full_matrices=False)
    # A singular value below this is rounding noise, and its singular vectors mean nothing.
    noise = s.detach().amax(-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(s.dtype).eps
    return torch.where(s > noise, s, 0.0), lambda d: (u * d.unsqueeze(-2)) @ vh


def entries(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the absolute values of the entries, (..., rows * cols), and the way back."""
    x = _float64(x)
    return x.abs().flatten(-2), lambda d: x.sign() * d.unflatten(-1, x.shape[-2:])


def row_lengths(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the Euclidean lengths of the rows, (..., rows), and the way back."""
    x = _float64(x)
    peak = x.detach().abs().amax(-1, keepdim=True)  # the square of 1e-200 underflows to 0
    scaled = divide(x, peak)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    unit = divide(scaled, length)
    return (length * peak).squeeze(-1), lambda d: unit * d.unsqueeze(-1)


def column_lengths(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the Euclidean lengths of the columns, (..., cols), and the way back."""
    lengths, rebuild = row_lengths(x.mT)
    return lengths, lambda d: rebuild(d).mT


# Matrix norms.


class Norm(ABC):
    """A norm on matrices, with its dual and the oracle of its unit ball."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``value(x)``."""
        return self.value(x)

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return the norm of each matrix: (..., rows, cols) -> (...), float64, differentiable."""

    @abstractmethod
    def dual(self, x: Tensor) -> Tensor:
        """Return max ``<x, d>`` over the unit ball, the dual norm: (..., rows, cols) -> (...)."""

    @abstractmethod
    def lmo(self, m: Tensor) -> Tensor:
        """Return a maximiser of ``<m, d>`` in the unit ball, of the shape of m, in float64.

        Zero for a zero matrix. Where there are several maximisers (equal singular values at the
        cut, equal largest entries) it is one of them.
        """


class CoordinateNorm(Norm):
    """A vector norm of the singular values, entries, or lengths of rows or columns of a matrix."""

    vector: VectorNorm
    coordinates: Coordinates = staticmethod(singular_values)
    _argument = ""  # of the constructor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._argument})"

    def value(self, x: Tensor) -> Tensor:
        return self.vector.value(self.coordinates(x)[0])

    def dual(self, x: Tensor) -> Tensor:
        return self.vector.dual(self.coordinates(x)[0])

    def lmo(self, m: Tensor) -> Tensor:
        s, rebuild = self.coordinates(m)
        return rebuild(self.vector.vertex(s))


class Frobenius(CoordinateNorm):
    """The Euclidean norm of the entries, its own dual. Step: normalised SGD (Lemma 1)."""

    vector = Euclidean()
    coordinates = staticmethod(entries)


class Spectral(CoordinateNorm):
    """The largest singular value; the dual is the nuclear norm. Step: Muon (Lemma 2)."""

    vector = Largest()


class Nuclear(CoordinateNorm):
    """The sum of the singular values; the dual is the spectral norm. Step: Neon (Lemma 3)."""

    vector = TopSumDual(1)


class KyFan(CoordinateNorm):
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
        self.k = whole_number("k", k)
        self.vector, self._argument = TopSum(k), str(k)


class KyFanDual(CoordinateNorm):
    """The dual of the Ky Fan k-norm, max(spectral, nuclear / k). Step: k-Fanion (Lemma 6).

    The oracle is U_k V_k^T. k = 1 is the nuclear norm, k >= min(rows, cols) the spectral norm.

    Args:
        k: Rank of the oracle's answer, at least 1.

    Raises:
        ValueError: If k is not a positive whole number.
    """

    def __init__(self, k: int) -> None:
        self.k = whole_number("k", k)
        self.vector, self._argument = TopSumDual(k), str(k)


class Schatten(CoordinateNorm):
    """The p-th root of the sum of p-th powers of the singular values, 1 <= p <= infinity.

    The dual is the Schatten q-norm, 1/p + 1/q = 1, the oracle U (S / |S|_q)^(q - 1) V^T. p = 1 is
    the nuclear norm, 2 the Frobenius norm, infinity the spectral norm.

    Args:
        p: The exponent.

    Raises:
        ValueError: If p is below 1.
    """

    def __init__(self, p: float) -> None:
        self.p = exponent("p", p)
        self.vector = {1.0: TopSumDual(1), math.inf: Largest()}.get(self.p) or Power(self.p)
        self._argument = f"{self.p:g}"


class MaxEntry(CoordinateNorm):
    """The largest absolute entry; the dual is the sum of entries. Step: signSGD, Signum."""

    vector = Largest()
    coordinates = staticmethod(entries)


class SumEntry(CoordinateNorm):
    """The sum of absolute entries; the dual is the largest one. Step: Gauss-Southwell."""

    vector = TopSumDual(1)
    coordinates = staticmethod(entries)


class MaxRow(CoordinateNorm):
    """The largest row length (2 -> infinity); the dual is the sum of row lengths.

    Step: each row over its length, as Scion does for embeddings (arXiv 2502.07529).
    """

    vector = Largest()
    coordinates = staticmethod(row_lengths)


class MaxColumn(CoordinateNorm):
    """The largest column length (1 -> 2); the dual is the sum of column lengths.

    Step: each column over its length (arXiv 2502.07529).
    """

    vector = Largest()
    coordinates = staticmethod(column_lengths)


class Blend(Norm):
    """The norm whose dual is alpha * norm.dual + (1 - alpha) * other.dual.

    Its unit ball is the Minkowski sum of the two balls (Lemma 9), so the oracle is the weighted
    sum of the two oracles. ``Blend(Spectral(), a)`` is the ball of F-Muon (equation 22),
    ``Blend(Nuclear(), a)`` that of F-Neon (equation 23).

    Args:
        norm: The norm that gets the weight alpha, any but a blend.
        alpha: The weight. Outside [0, 1] the step is still defined, but there is no norm ball:
            ``value`` then raises.
        blend: The other norm: any but a blend, or ``frobenius`` (F-Muon, ...) or ``sign``
            (S-Muon, ...: the largest entry).
        sign_scale: Radius s of the other norm's ball: alpha * D + (1 - alpha) * s * sign(m).

    Attributes:
        norm: The norm that gets the weight alpha.
        alpha: The weight.
        other: The other norm.
        weight: Weight of the other norm's unit ball, (1 - alpha) * sign_scale.

    Raises:
        ValueError: If the norm, alpha, the blend or the scale is none of these.
    """

    def __init__(
        self, norm: Norm, alpha: float, blend: Norm | str = "frobenius", sign_scale: float = 1.0
    ) -> None:
        named = {"frobenius": Frobenius, "sign": MaxEntry}
        if not isinstance(blend, Norm):
            check_choice("blend", blend, named)
            self.other: Norm = named[blend]()
        else:
            self.other = blend
        for part in (norm, self.other):
            if not isinstance(part, Norm) or isinstance(part, Blend):
                raise ValueError(f"a blend takes two norms that are no blends, got {part!r}")
        self.norm, self.alpha, self.blend = norm, real_number("alpha", alpha), blend
        self.sign_scale = real_number("sign_scale", sign_scale, above=0.0)
        self.weight = (1 - self.alpha) * self.sign_scale

    def __repr__(self) -> str:
        scale = f", sign_scale={self.sign_scale}" if self.sign_scale != 1 else ""
        return f"Blend({self.norm!r}, {self.alpha}, {self.blend!r}{scale})"

    def dual(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.alpha * self.norm.dual(x) + self.weight * self.other.dual(x)

    def lmo(self, m: Tensor) -> Tensor:  # noqa: D102
        return self.alpha * self.norm.lmo(m) + self.weight * self.other.lmo(m)

    def value(self, x: Tensor) -> Tensor:
        """Return the smallest t with x in t * (alpha * ball + (1 - alpha) * other ball).

        Exact by a search in one dimension where one of the norms is Frobenius, or where both are
        norms of the same coordinates and one is the largest of them; else within a relative
        ``TOLERANCE``, by many decompositions, for matrices of some tens of rows.

        Raises:
            ValueError: If alpha is outside [0, 1], where there is no norm, or a norm is not one of
                coordinates.
            RuntimeError: If the tolerance is not reached.
        """
        self.check_alpha()
        if self.alpha in (0, 1):
            part, radius = (self.norm, 1.0) if self.alpha == 1 else (self.other, self.weight)
            return part.value(x) / radius
        # <x, y> / |y|_dual is below the norm for every y, and equals it for the best one: an error
        # of y counts by its square, and the derivative is y's.
        _, y = self._solve(x)
        return divide((_float64(x) * y).sum((-2, -1)), self.dual(y))

    def split(self, x: Tensor) -> Tensor:
        """Return the Z of equations 22 and 23: the part of x in the first ball.

        With t the value of x, Z is in t * alpha * ball and x - Z in t * (1 - alpha) * other ball
        (up to ``TOLERANCE``, see ``value``): the norm's certificate from above.

        Args:
            x: Matrices, (..., rows, cols).

        Returns:
            The same shape, float64.

        Raises:
            ValueError: As ``value``.
            RuntimeError: As ``value``.
        """
        self.check_alpha()
        return _float64(x) * self.alpha if self.alpha in (0, 1) else self._solve(x)[0]

    def check_alpha(self) -> None:
        """Refuse an alpha for which the blend is no norm.

        Raises:
            ValueError: If alpha is outside [0, 1].
        """
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha = {self.alpha} is outside [0, 1]: this blend is no norm")

    def _solve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z, and a y with <x, y> = |x| |y|_dual, for 0 < alpha < 1; without derivatives."""
        balls = []
        for part, radius in ((self.norm, self.alpha), (self.other, self.weight)):
            if not isinstance(part, CoordinateNorm):
                raise ValueError(f"the value of a blend with {part!r} is not known: only its dual")
            balls.append(Body(part.vector, part.coordinates, radius))
        return split(_float64(x).detach(), *balls)


def check_matrices(x: Tensor, kind: str = "real") -> None:
    """Refuse what is no batch of matrices.

    Args:
        x: What is given.
        kind: Of the numbers: real, or floating-point.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If the tensor has another shape, kind of numbers or layout.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor of shape (..., rows, cols), got {type(x).__name__}")
    fits = not x.is_complex() if kind == "real" else x.is_floating_point()
    if x.ndim < 2 or not fits or 0 in x.shape[-2:] or x.layout != torch.strided:
        layout = "" if x.layout == torch.strided else f" {x.layout}"
        raise ValueError(
            f"expected {kind} matrices of shape (..., rows, cols) with at least one entry, "
            f"got {x.dtype}{layout} {tuple(x.shape)}"
        )


def _float64(x: Tensor) -> Tensor:
    check_matrices(x)
    # Apple's GPUs have no float64.
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)

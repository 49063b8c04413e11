"""Norms of large Gaussian matrices, by which section 5.1 estimates L."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lit_fanions.bounds import coordinate_norm
from lit_fanions.minkowski import Coordinates
from lit_fanions.norms import (
    Blend,
    Norm,
    column_lengths,
    entries,
    row_lengths,
    singular_values,
)
from lit_fanions.vector_norms import Euclidean

# Points of the quadrature of the Marchenko-Pastur law; its error is of the order of their square.
_GRID = 2**16


def gaussian_spectrum(rows: int, cols: int) -> Tensor:
    """Return the singular values of a large matrix of independent standard normal entries.

    The i-th is the mean of the Marchenko-Pastur law between its quantiles (i - 1) / n and i / n,
    n = min(rows, cols), so that sums of the leading ones have the right constants; for a square
    matrix the nuclear norm is 8 / (3 pi) n^1.5. Correct to leading order for large matrices: a
    single value deviates by O(n^(-1/6)) at the upper edge, sqrt(rows) + sqrt(cols), less inside.

    Returns:
        (min(rows, cols),), float64, descending.
    """
    small, large = sorted((rows, cols))
    ratio = small / large
    # s^2 / large = 1 + y + 2 sqrt(y) cos(t): in t the law has no square roots.
    t = (np.arange(_GRID) + 0.5) * math.pi / _GRID
    squares = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(t)
    mass = 2 / math.pi * np.sin(t) ** 2 / squares
    moment = np.concatenate([[0.0], np.cumsum(mass * np.sqrt(squares))]) / mass.sum()
    mass = np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
    moment = np.interp(np.linspace(0, 1, small + 1), mass, moment)
    return torch.from_numpy(np.diff(moment)) * small * math.sqrt(large)


def gaussian_norm(norm: Norm, rows: int, cols: int) -> float:
    """Return the norm of a rows x cols matrix of standard normal entries, asymptotically.

    The coordinates are taken at the quantiles of their law: singular values by Marchenko-Pastur
    (``gaussian_spectrum``), entries by the half-normal law, lengths of rows and columns by the
    normal law that the chi law of many degrees of freedom tends to.

    Args:
        norm: Any of ``lit_fanions.norms`` but blends of norms of different coordinates, unless one
            of them is Frobenius.
        rows: Number of rows.
        cols: Number of columns.

    Raises:
        ValueError: If the norm is not of ``lit_fanions.norms``, a blend's alpha is outside [0, 1],
            or a blend depends on two kinds of coordinates at once.
    """
    if not isinstance(norm, Blend):
        norm = coordinate_norm(norm)
        if isinstance(norm.vector, Euclidean):
            return math.sqrt(rows * cols)
        return float(norm.vector.value(_GAUSSIAN[norm.coordinates](rows, cols)))
    if norm.alpha in (0, 1):
        part, radius = (norm.norm, 1.0) if norm.alpha == 1 else (norm.other, norm.weight)
        return gaussian_norm(part, rows, cols) / radius
    first, second = coordinate_norm(norm.norm), coordinate_norm(norm.other)
    if isinstance(first.vector, Euclidean):
        first, second = second, first
    if first.coordinates is not second.coordinates and not isinstance(second.vector, Euclidean):
        raise ValueError(f"{norm!r} depends on two kinds of coordinates: no asymptotic is known")
    # A matrix with these coordinates: on the diagonal they are its singular values, its entries,
    # and the lengths of its rows and columns.
    coordinates = _GAUSSIAN[first.coordinates](rows, cols)
    if first.coordinates is entries:
        return float(norm.value(coordinates.view(rows, cols)))
    return float(norm.value(torch.diag(coordinates)))


def _gaussian_entries(rows: int, cols: int) -> Tensor:
    """Return means of |N(0, 1)| between neighbouring quantiles, (rows * cols,)."""
    count = rows * cols
    edges = math.sqrt(2) * torch.erfinv(torch.linspace(0, 1, count + 1, dtype=torch.float64))
    density = math.sqrt(2 / math.pi) * torch.exp(-edges.square() / 2)
    return -density.diff() * count


def _gaussian_lengths(count: int, size: int) -> Tensor:
    """Return quantiles of the lengths of ``count`` normal vectors of ``size`` components."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return math.sqrt(size - 0.5) + torch.special.ndtri(quantiles) / math.sqrt(2)


_GAUSSIAN: dict[Coordinates, Callable[[int, int], Tensor]] = {
    singular_values: gaussian_spectrum,
    entries: _gaussian_entries,
    row_lengths: lambda rows, cols: _gaussian_lengths(rows, cols),
    column_lengths: lambda rows, cols: _gaussian_lengths(cols, rows),
}


def gamma(norm: Norm, rows: int, cols: int) -> float:
    """Return the ratio of the norm to the Frobenius norm of large Gaussian matrices (section 5.1).

    The paper has 1 for Frobenius, 2 / sqrt(n) for the spectral norm and sqrt(n) for the nuclear
    norm of n x n matrices; the last lacks the constant 8 / (3 pi). Arguments as for
    ``gaussian_norm``.
    """
    return gaussian_norm(norm, rows, cols) / math.sqrt(rows * cols)


def asymptotic_smoothness(norm: Norm, a: Tensor, b: Tensor) -> Tensor:
    r"""Return the paper's estimate of L, gamma^2 \|A\|_dual \|B\|_dual (section 5.1).

    It is not a valid L: it uses ratios of norms that hold for Gaussian matrices, not for all
    matrices of the ball, and the article's own ratio (dual norm = norm / gamma^2) would divide by
    gamma^2. The tables show it beside ``bounds.smoothness``.

    Args:
        norm: As for ``gaussian_norm``.
        a: A, (..., rows, rows).
        b: B, (..., cols, cols).

    Returns:
        (...), float64.
    """
    return gamma(norm, a.shape[-1], b.shape[-1]) ** 2 * norm.dual(a) * norm.dual(b)

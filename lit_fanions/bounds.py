r"""Trust-region theory: what a norm promises before anything is trained (the paper's section 4).

The step X+ = X - lr D, with D the oracle's answer to the (momentum of the) gradient, is analysed
in the norm of the oracle: the gradient is L-Lipschitz from the norm to its dual (A1), the noise of
the gradient is ``rho`` times its Frobenius norm at most (A3), and ``plan`` turns both into a
learning rate and a number of steps (Lemmas 7 and 8, after arXiv 2503.12645). ``smoothness`` is L
for the least-squares problem of equation 19; ``gaussian_norm`` and what follows from it are the
asymptotics of random matrices, by which the paper estimates the same L.

``norms`` are the ground truth here as elsewhere: everything is exact and in float64 but where the
docstring says that it is a bound or an asymptotic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_fanions.minkowski import Coordinates
from lit_fanions.norms import (
    Blend,
    CoordinateNorm,
    Norm,
    column_lengths,
    entries,
    row_lengths,
    singular_values,
)
from lit_fanions.vector_norms import Euclidean, Largest, TopSumDual, root

__all__ = [
    "Plan",
    "asymptotic_smoothness",
    "gamma",
    "gaussian_norm",
    "gaussian_spectrum",
    "plan",
    "rho",
    "smoothness",
]

# Points of the quadrature of the Marchenko-Pastur law; its error is of the order of their square.
_GRID = 2**16


class Plan(NamedTuple):
    """How to reach a precision.

    Attributes:
        lr: Learning rate, the radius of the ball (eta).
        steps: Number of steps (K).
        momentum: Of ``Fanion``, 1 - alpha of Lemma 8; 0 without noise.
    """

    lr: float
    steps: int
    momentum: float


def plan(
    smoothness: float, gap: float, precision: float, *, rho: float = 1.0, sigma: float = 0.0
) -> Plan:
    r"""Learning rate, steps and momentum that reach a precision, with constants (Lemmas 7, 8).

    From F(X+) <= F(X) - lr \|G\|_dual + 2 lr \|E\|_dual + L lr^2 / 2, where E is the error of the
    momentum M <- (1 - a) M + a g, follows for the mean over K steps of the dual norm of G

        gap / (lr K) + L lr / 2 + 2 (rho sigma / (a K) + rho sigma sqrt(a / (2 - a))
        + L lr (1 - a) / a).

    Half of the precision at most goes to the part that neither lr nor K changes, by
    a = min(1, (precision / (4 rho sigma))^2); of the rest r, half to the terms with lr, half to
    those with K. Without noise that is a = 1, lr = precision / L and
    K = 2 L gap / precision^2, the best that the inequality gives.

    ``Fanion`` starts its momentum from zero instead of from the first gradient: its oracle is blind
    to scale and sees an average with bias correction, whose error is within the same bound.

    Args:
        smoothness: L of (A1), in the oracle's norm.
        gap: F at the start minus its minimum.
        precision: What the dual norm of the gradient shall be at most, in some step, in the mean.
        rho: Of (A3).
        sigma: Standard deviation of the gradient's noise, in the Frobenius norm (A2).

    Returns:
        A sufficient choice for momentum without Nesterov, weight decay and scale.

    Raises:
        ValueError: If an argument is not positive (gap, sigma: negative) or not finite.
    """
    given = {"smoothness": smoothness, "precision": precision, "rho": rho}
    for name, value in {**given, "gap": gap, "sigma": sigma}.items():
        strict = name in given
        if not math.isfinite(value) or value < 0 or (strict and value == 0):
            allowed = "positive" if strict else "0 or more"
            raise ValueError(f"{name} must be {allowed} and finite, got {value}")
    noise = float(rho * sigma)
    weight = min(1.0, (precision / (4 * noise)) ** 2) if noise > 0 else 1.0
    rest = precision - 2 * noise * math.sqrt(weight / (2 - weight))
    lr = rest / (smoothness * (1 + 4 * (1 - weight) / weight))
    steps = math.ceil(2 * (gap / lr + 2 * noise / weight) / rest)
    return Plan(float(lr), max(1, steps), 1 - weight)


# L of the least-squares problem. The eigenvalues of X -> A X B are the products of those of A and
# B; of the norms that depend on singular values alone, the largest products face the largest
# singular values (von Neumann's trace inequality), and L = max sum c_i x_i^2 over the vectors x of
# the ball, with c_i = a_i b_i. The maximum of a convex function is at an extreme point.


def smoothness(norm: Norm, a: Tensor, b: Tensor) -> Tensor:
    """Return L of (A1) for the gradient A (X - S) B.

    L is the largest dual norm of A X B over the unit ball. Exact for all norms of singular values
    (Frobenius, Spectral, Nuclear, KyFan, KyFanDual), their Frobenius blends and SumEntry. An upper
    bound, which is a valid L all the same, for MaxEntry, MaxRow and MaxColumn, whose exact value
    is NP-hard, and for all other blends: (alpha sqrt(L_1) + weight sqrt(L_2))^2 from the L of the
    two parts.

    Args:
        norm: Any of ``lit_fanions.norms``.
        a: A, symmetric positive semi-definite, (..., rows, rows).
        b: B, symmetric positive semi-definite, (..., cols, cols).

    Returns:
        (...), float64.

    Raises:
        ValueError: If A or B is not positive semi-definite, the norm is not of
            ``lit_fanions.norms``, or a blend's alpha is outside [0, 1].
    """
    a, b = _semidefinite("A", a), _semidefinite("B", b)
    size = min(a.shape[-1], b.shape[-1])
    products = torch.linalg.eigvalsh(a)[..., -size:] * torch.linalg.eigvalsh(b)[..., -size:]
    return _smoothness(norm, a, b, products.flip(-1).clamp(min=0))


def _smoothness(norm: Norm, a: Tensor, b: Tensor, products: Tensor) -> Tensor:
    """Return L, from the products of eigenvalues, (..., size), descending."""
    if isinstance(norm, Blend):
        norm.check_alpha()
        first, second = _coordinate_norm(norm.norm), _coordinate_norm(norm.other)
        extremes = first.vector.extremes(products.shape[-1])
        spectral = first.coordinates is singular_values and extremes is not None
        if spectral and isinstance(second.vector, Euclidean):
            assert extremes is not None
            return _blended(products, extremes, norm.alpha, norm.weight)
        roots = [_smoothness(part, a, b, products).sqrt() for part in (first, second)]
        return (norm.alpha * roots[0] + norm.weight * roots[1]) ** 2
    norm = _coordinate_norm(norm)
    extremes = norm.vector.extremes(products.shape[-1])
    if extremes is None:  # Frobenius
        return products[..., 0]
    if norm.coordinates is singular_values:
        return (products.unsqueeze(-2) * extremes.square()).sum(-1).amax(-1)
    if norm.coordinates is entries and isinstance(norm.vector, TopSumDual) and norm.vector.k == 1:
        return _largest_diagonal(a) * _largest_diagonal(b)
    if isinstance(norm.vector, Largest):
        # For rows of length 1 only A mixes rows: B acts within each, by its largest eigenvalue.
        left = _largest_eigenvalue if norm.coordinates is column_lengths else _sign_bound
        right = _largest_eigenvalue if norm.coordinates is row_lengths else _sign_bound
        return left(a) * right(b)
    # |A X B|_dual <= rho |A X B|_F, and |X|_F <= rho in the ball.
    furthest = rho(norm, a.shape[-1], b.shape[-1])
    return furthest**2 * _largest_eigenvalue(a) * _largest_eigenvalue(b)


def _coordinate_norm(norm: Norm) -> CoordinateNorm:
    if not isinstance(norm, CoordinateNorm):
        raise ValueError(f"norm must be one of lit_fanions.norms, got {norm!r}")
    return norm


def _blended(products: Tensor, extremes: Tensor, alpha: float, weight: float) -> Tensor:
    """The largest sum c_i (alpha p_i + weight q_i)^2 over the extremes p and unit vectors q.

    For fixed p this is the trust-region subproblem: q_i = alpha c_i p_i / (t - weight c_i), with
    the one t beyond the pole at which q has length 1.
    """
    c = products.unsqueeze(-2)  # (..., 1, size)
    if alpha == 0:
        return weight**2 * products[..., 0]
    pull, pole = alpha * c * extremes, weight * products[..., :1]

    def inverse(t: Tensor) -> Tensor:
        gap = t.unsqueeze(-1) - weight * c
        return pull / torch.where(pull > 0, gap, 1.0)

    t = root(
        lambda t: inverse(t).square().sum(-1) - 1,
        pole + pull[..., 0],
        pole + torch.linalg.vector_norm(pull, dim=-1),
    )
    q = inverse(t)
    return (c * (alpha * extremes + weight * q).square()).sum(-1).amax(-1)


def _largest_diagonal(a: Tensor) -> Tensor:
    # No entry of a positive semi-definite matrix is larger than the largest of its diagonal.
    return a.diagonal(dim1=-2, dim2=-1).amax(-1)


def _largest_eigenvalue(a: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(a)[..., -1]


def _sign_bound(a: Tensor) -> Tensor:
    # lambda_1 times the identity, and the diagonal matrix of the row sums of |A|, are above A in
    # the order of semi-definite matrices, and so are Kronecker products of such bounds. For a
    # diagonal matrix the maximum over signs (or rows of length 1) is the trace.
    return torch.minimum(a.shape[-1] * torch.linalg.eigvalsh(a)[..., -1], a.abs().sum((-2, -1)))


def _semidefinite(name: str, a: Tensor) -> Tensor:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or not a.shape[-1]:
        raise ValueError(f"{name} must be a square matrix or a batch, got shape {tuple(a.shape)}")
    a = a.to(torch.float64)
    scale = a.abs().amax((-2, -1), keepdim=True)
    # As exact as float32 is, in which it may have been made.
    if ((a - a.mT).abs() > 1e-5 * scale).any() or (
        torch.linalg.eigvalsh(a) < -1e-5 * a.shape[-1] * scale[..., 0]
    ).any():
        raise ValueError(f"{name} must be symmetric and positive semi-definite")
    return (a + a.mT) / 2


def rho(norm: Norm, rows: int, cols: int) -> float:
    r"""Return the constant of (A3): the largest \|X\|_dual / \|X\|_F of rows x cols matrices.

    It equals the Frobenius norm of the furthest point of the unit ball. Exact, but for blends of
    norms of different coordinates an upper bound: for sign blends of norms of singular values it
    is attained where the entries of a matrix U_k V_k^T can all be of one size (k = 1, and wherever
    there is a Hadamard matrix).

    Args:
        norm: Any of ``lit_fanions.norms``.
        rows: Number of rows of the matrices.
        cols: Number of columns of the matrices.

    Returns:
        At least 1 but for blends with a small sign_scale.

    Raises:
        ValueError: If the norm is not of ``lit_fanions.norms``, a blend's alpha is outside [0, 1],
            or the matrix has no entry.
    """
    if min(rows, cols) < 1:
        raise ValueError(f"rows and cols must be at least 1, got {rows} and {cols}")
    if not isinstance(norm, Blend):
        norm = _coordinate_norm(norm)
        return norm.vector.furthest(_COUNTS[norm.coordinates](rows, cols))
    norm.check_alpha()
    first, second = _coordinate_norm(norm.norm), _coordinate_norm(norm.other)
    if first.coordinates is second.coordinates:
        # Extreme points of a sum are sums of extreme points, furthest where they are aligned.
        n = _COUNTS[first.coordinates](rows, cols)
        points, others = first.vector.extremes(n), second.vector.extremes(n)
        if points is not None and others is not None:
            sums = norm.alpha * points[:, None] + norm.weight * others
            return float(torch.linalg.vector_norm(sums, dim=-1).max())
    return norm.alpha * rho(first, rows, cols) + norm.weight * rho(second, rows, cols)


# Number of coordinates of a rows x cols matrix.
_COUNTS: dict[Coordinates, Callable[[int, int], int]] = {
    singular_values: min,
    entries: lambda rows, cols: rows * cols,
    row_lengths: lambda rows, cols: rows,
    column_lengths: lambda rows, cols: cols,
}


# Random matrices.


def gaussian_spectrum(rows: int, cols: int) -> Tensor:
    """Where the singular values of a matrix of independent standard normal entries lie.

    The i-th is the mean of the Marchenko-Pastur law between its quantiles (i - 1) / n and i / n,
    n = min(rows, cols), so that sums of the leading ones have the right constants; for a square
    matrix the nuclear norm is 8 / (3 pi) n^1.5. Correct to leading order for large matrices: a
    single value deviates by O(n^(-1/6)) at the upper edge, sqrt(rows) + sqrt(cols), less inside.

    Args:
        rows: Of the matrix.
        cols: Of the matrix.

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
        ValueError: If a blend depends on two kinds of coordinates at once.
    """
    if not isinstance(norm, Blend):
        norm = _coordinate_norm(norm)
        if isinstance(norm.vector, Euclidean):
            return math.sqrt(rows * cols)
        return float(norm.vector.value(_GAUSSIAN[norm.coordinates](rows, cols)))
    if norm.alpha in (0, 1):
        part, radius = (norm.norm, 1.0) if norm.alpha == 1 else (norm.other, norm.weight)
        return gaussian_norm(part, rows, cols) / radius
    first, second = _coordinate_norm(norm.norm), _coordinate_norm(norm.other)
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
    """The ratio of the norm to the Frobenius norm of large Gaussian matrices (section 5.1).

    The paper has 1 for Frobenius, 2 / sqrt(n) for the spectral norm and sqrt(n) for the nuclear
    norm of n x n matrices; the last is short of the constant 8 / (3 pi).

    Args:
        norm: As for ``gaussian_norm``.
        rows: Of the matrix.
        cols: Of the matrix.
    """
    return gaussian_norm(norm, rows, cols) / math.sqrt(rows * cols)


def asymptotic_smoothness(norm: Norm, a: Tensor, b: Tensor) -> Tensor:
    r"""The paper's estimate of L, gamma^2 \|A\|_dual \|B\|_dual (section 5.1).

    It is no L. It follows from ratios of norms that hold for Gaussian matrices, not for all of the
    ball; and what follows from them, dual norm = norm / gamma^2, would divide by gamma^2. Beside
    ``smoothness``, to show by how much it is off.

    Args:
        norm: As for ``gaussian_norm``.
        a: A, (..., rows, rows).
        b: B, (..., cols, cols).

    Returns:
        (...), float64.
    """
    return gamma(norm, a.shape[-1], b.shape[-1]) ** 2 * norm.dual(a) * norm.dual(b)

r"""Trust-region theory: what a norm promises before anything is trained (the paper's section 4).

The step X+ = X - lr D, with D the oracle's answer to the (momentum of the) gradient, is analysed
in the norm of the oracle: the gradient is L-Lipschitz from the norm to its dual (A1), the noise of
the gradient is ``rho`` times its Frobenius norm at most (A3), and ``plan`` turns both into a
learning rate and a number of steps (Lemmas 7 and 8, after arXiv 2503.12645). ``smoothness`` is L
for the least-squares problem of equation 19.

``norms`` are the ground truth here as elsewhere: everything is exact and in float64 but where the
docstring says that it is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
from lit_fanions.vector_norms import Euclidean, Largest, Power, TopSumDual, root

__all__ = ["Plan", "fit_smoothness", "plan", "rho", "smoothness"]


class Plan(NamedTuple):
    """How to reach a precision.

    Attributes:
        lr: Learning rate, the radius of the ball (eta).
        steps: Number of steps (K).
        momentum: Momentum of ``Fanion``, 1 - alpha of Lemma 8; 0 without noise.
    """

    lr: float
    steps: int
    momentum: float


def plan(
    smoothness: float, gap: float, precision: float, *, rho: float = 1.0, sigma: float = 0.0
) -> Plan:
    r"""Return the learning rate, steps and momentum that reach a precision (Lemmas 7 and 8).

    From F(X+) <= F(X) - lr \|G\|_dual + 2 lr \|E\|_dual + L lr^2 / 2, where E is the error of the
    momentum M <- (1 - a) M + a g, follows for the mean over K steps of the dual norm of G

        gap / (lr K) + L lr / 2 + 2 (rho sigma / (a K) + rho sigma sqrt(a / (2 - a))
        + L lr (1 - a) / a).

    a = min(1, (precision / (4 rho sigma))^2) gives at most half of the precision to the term that
    neither lr nor K changes; of the rest, half goes to the terms with lr, half to those with K.
    Without noise that is a = 1, lr = precision / L and K = 2 L gap / precision^2, the best that
    the inequality gives.

    ``Fanion`` starts its momentum from zero instead of from the first gradient. Its oracle does
    not depend on the scale and so sees an average with bias correction, whose error is within the
    same bound.

    Args:
        smoothness: L of (A1), in the oracle's norm.
        gap: F at the start minus its minimum.
        precision: Largest dual norm of the gradient allowed in the best step, in the mean.
        rho: Constant of (A3).
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


def fit_smoothness(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return L0 and L1 of generalised smoothness, L ~ L0 + L1 * dual norm of the gradient.

    The least-squares fit of which neither is negative; L1 = 0 if all gradients are of one size. The
    form is Assumption 1 of Gluon (arXiv 2505.13416, version 1), whose step (Theorem 1) is dual /
    (L0 + L1 * dual). Gluon's fit weighs underestimates more.

    Args:
        points: Dual norms of gradients, each with the L measured there; at least one, not negative.
    """
    sizes, values = torch.tensor(points, dtype=torch.float64, device="cpu").unbind(-1)
    deviations = sizes - sizes.mean()
    variance = float(deviations.square().sum())
    slope = max(0.0, float((deviations * values).sum()) / variance) if variance > 0 else 0.0
    constant = float(values.mean() - slope * sizes.mean())
    if constant < 0:
        return 0.0, float((sizes * values).sum() / sizes.square().sum())
    return constant, slope


# L of the least-squares problem. The eigenvalues of X -> A X B are the products of those of A and
# B; of the norms that depend on singular values alone, the largest products face the largest
# singular values (von Neumann's trace inequality), and L = max sum c_i x_i^2 over the vectors x of
# the ball, with c_i = a_i b_i. The maximum of a convex function is at an extreme point.


def smoothness(norm: Norm, a: Tensor, b: Tensor) -> Tensor:
    """Return L of (A1) for the gradient A (X - S) B.

    L is the largest dual norm of A X B over the unit ball. Exact for all norms of singular values
    (Frobenius, Spectral, Nuclear, KyFan, KyFanDual, Schatten), the Frobenius blends of the middle
    four, and SumEntry. An upper bound, which is a valid L all the same, for MaxEntry, MaxRow and
    MaxColumn, whose exact value is NP-hard, and for all other blends: (alpha sqrt(L_1) + weight
    sqrt(L_2))^2 from the L of the two parts.

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
        first, second = coordinate_norm(norm.norm), coordinate_norm(norm.other)
        extremes = _extremes(first, products)
        spectral = first.coordinates is singular_values and extremes is not None
        if spectral and isinstance(second.vector, Euclidean):
            assert extremes is not None
            return _blended(products, extremes, norm.alpha, norm.weight)
        roots = [_smoothness(part, a, b, products).sqrt() for part in (first, second)]
        return (norm.alpha * roots[0] + norm.weight * roots[1]) ** 2
    norm = coordinate_norm(norm)
    extremes = _extremes(norm, products)
    if isinstance(norm.vector, Power) and norm.vector.p > 2:
        # max sum c_i y_i over sums of y_i^(p / 2) of at most 1, by Hoelder's inequality
        return Power(norm.vector.p / (norm.vector.p - 2)).value(products)
    if extremes is None:  # Frobenius, or Schatten with p below 2
        return products[..., 0]
    if norm.coordinates is singular_values:
        return (products.unsqueeze(-2) * extremes.square()).sum(-1).amax(-1)
    if norm.coordinates is entries and isinstance(norm.vector, TopSumDual) and norm.vector.k == 1:
        # No entry of a positive semi-definite matrix is larger than the largest of its diagonal.
        largest = [x.diagonal(dim1=-2, dim2=-1).amax(-1) for x in (a, b)]
        return largest[0] * largest[1]
    if isinstance(norm.vector, Largest):
        # For rows of length 1 only A mixes rows: B acts within each, by its largest eigenvalue.
        left = _largest_eigenvalue if norm.coordinates is column_lengths else _sign_bound
        right = _largest_eigenvalue if norm.coordinates is row_lengths else _sign_bound
        return left(a) * right(b)
    # |A X B|_dual <= rho |A X B|_F, and |X|_F <= rho in the ball.
    furthest = rho(norm, a.shape[-1], b.shape[-1])
    return furthest**2 * _largest_eigenvalue(a) * _largest_eigenvalue(b)


def _extremes(norm: CoordinateNorm, products: Tensor) -> Tensor | None:
    """Return the extreme points of the norm's ball where the products of eigenvalues are."""
    extremes = norm.vector.extremes(products.shape[-1])
    return None if extremes is None else extremes.to(products.device)


def coordinate_norm(norm: Norm) -> CoordinateNorm:
    """Return the norm; refuse blends and what is no norm of ``lit_fanions.norms``."""
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


def _largest_eigenvalue(a: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(a)[..., -1]


def _sign_bound(a: Tensor) -> Tensor:
    # lambda_1 times the identity, and the diagonal matrix of the row sums of |A|, are above A in
    # the order of semi-definite matrices, and so are Kronecker products of such bounds. For a
    # diagonal matrix the maximum over signs (or rows of length 1) is the trace.
    return torch.minimum(a.shape[-1] * _largest_eigenvalue(a), a.abs().sum((-2, -1)))


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
        norm = coordinate_norm(norm)
        return norm.vector.longest(_COUNTS[norm.coordinates](rows, cols))
    norm.check_alpha()
    first, second = coordinate_norm(norm.norm), coordinate_norm(norm.other)
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

"""U S^(q - 1) V^T, the oracle of the Schatten-p ball: between normalised SGD and Muon for p > 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_fanions.lmo.factorisations import noise, wide
from lit_fanions.lmo.newton_schulz import unit_polar
from lit_fanions.lmo.presets import AUTO, polynomials

# Added to the eigenvalues of a matrix of norm 1 before its square root is taken: the iteration
# diverges on the negative eigenvalues that rounding may leave.
_SHIFT = 1e-6


def takes_products(p: float) -> bool:
    """Return whether the oracle for p takes matrix products alone on a GPU: p = 3, 5, 9, ..."""
    return p > 2 and math.log2(p - 1).is_integer()


def schatten_direction(x: Tensor, p: float, *, exact: bool = False) -> Tensor:
    """Return U (S / |S|_q)^(q - 1) V^T with 1/p + 1/q = 1, for 1 < p < infinity.

    By an eigendecomposition of the Gram matrix in float64. On a GPU, where that waits for the
    device, by matrix products alone if p is 3, 5, 9, ...: q - 1 is then 1/2, 1/4, 1/8, ...
    ``exact``: by a singular value decomposition of x in float64. The matrices x are finite, of
    Frobenius norm 1 or zero, in float32 or float64.
    """
    if x.device.type != "cpu" and not exact and takes_products(p):
        return _by_products(x, int(math.log2(p - 1)))
    return _by_decomposition(x, p, exact or x.dtype == torch.float64)


def _by_decomposition(x: Tensor, p: float, exact: bool) -> Tensor:
    is_wide = x.shape[-2] <= x.shape[-1]
    rows = wide(x if is_wide else x.mT)
    if exact:
        u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    else:
        squares, u = torch.linalg.eigh(rows @ rows.mT)
        s, u = squares.clamp(min=0).sqrt().flip(-1), u.flip(-1)
    largest = s[..., :1]
    counts = s > noise(s, x.dtype)
    relative = torch.where(counts, s, 0) / torch.where(largest > 0, largest, 1)
    power = 1 / (p - 1)
    total = (relative ** (power + 1)).sum(-1, keepdim=True) ** (1 / p)
    weights = torch.where(counts, relative**power / (s * total), 0)
    d = ((u * weights.unsqueeze(-2)) @ (u.mT @ rows)).to(x)
    return d if is_wide else d.mT


def _by_products(x: Tensor, halvings: int) -> Tensor:
    """Return the direction for p = 1 + 2^halvings from the polar factor and square roots."""
    is_wide = x.shape[-2] <= x.shape[-1]
    rows = x if is_wide else x.mT
    q = unit_polar(rows, AUTO)
    root = rows @ q.mT
    root = (root + root.mT) / 2
    for _ in range(halvings):
        root = _square_root(root)
    d = root @ q
    # <x, d> is the sum of s^q.
    size = (rows * d).sum((-2, -1), keepdim=True).clamp(min=0) ** (1 / (1 + 2**halvings))
    d = d / torch.where(size > 0, size, 1)
    return d if is_wide else d.mT


def _square_root(h: Tensor) -> Tensor:
    """Return the square root of positive semidefinite matrices of Frobenius norm 1 or less.

    By Newton-Schulz iterations for y = h^(1/2) and z = h^(-1/2) together (Higham, Functions of
    Matrices, section 6.7), with the polynomials of a polar factor.
    """
    norm = torch.linalg.matrix_norm(h, keepdim=True)
    norm = torch.where(norm > 0, norm, 1)
    z = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    y = h / norm + _SHIFT * z
    for a, b, c in polynomials(AUTO):
        t = z @ y
        factor = b * t + c * (t @ t)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        y, z = y @ factor, factor @ z
    return y * norm.sqrt()

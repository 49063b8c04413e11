"""Factorisations of a block of a few row vectors, which the rank-k solvers are made of.

Gram matrices of float32 rows are taken in float64: squaring then loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Alternating sweeps that stand in for an eigendecomposition where that would wait for the device.
_SWEEPS = 4
# A Gram matrix of unit rows with a smaller pivot is not factorised: the rows are dependent.
_PIVOT = 1e-5
# Singular values of fewer units of rounding than this, relative to the largest, are none.
_NOISE = 64


def wide(x: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if it is on an Apple GPU, which has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def orthonormal_rows(x: Tensor) -> Tensor:
    """Orthonormal rows with the span of the rows of x; arbitrary ones for what is dependent.

    Args:
        x: (..., count, length), float32 or float64, finite.

    Returns:
        The same shape and dtype.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # Several times faster than reflections, and as exact where it is possible at all.
        unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=0)
        factor, failed = torch.linalg.cholesky_ex(unit @ unit.mT)
        if not failed.any() and bool((factor.diagonal(dim1=-2, dim2=-1) > _PIVOT).all()):
            return (torch.linalg.inv_ex(factor).inverse @ unit).to(x.dtype)
    return torch.linalg.qr(x.mT).Q.mT


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of positive semidefinite matrices and the roots of the eigenvalues.

    On a GPU an approximation that is near for a matrix near to diagonal and of descending order,
    as those of a warm-started block are: torch's eigendecomposition waits for the device.

    Args:
        gram: (..., n, n), float64.

    Returns:
        (..., n), descending, and (..., n, n), columns.
    """
    if gram.device.type == "cpu":
        squares, q = torch.linalg.eigh(gram)
        return squares.clamp(min=0).sqrt().flip(-1), q.flip(-1)
    return by_sweeps(gram)


def by_sweeps(gram: Tensor) -> tuple[Tensor, Tensor]:
    """``principal`` by orthogonal iteration, in matrix products and QR factorisations alone."""
    q = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    squared = gram @ gram
    for _ in range(_SWEEPS):
        q = torch.linalg.qr(squared @ q).Q
    squares, order = (q * (gram @ q)).sum(-2).sort(-1, descending=True)
    return squares.clamp(min=0).sqrt(), q.gather(-1, order.unsqueeze(-2).expand_as(q))


def noise(s: Tensor, dtype: torch.dtype) -> Tensor:
    """What a singular value must exceed to be one, (..., 1).

    Args:
        s: Singular values, (..., n), descending.
        dtype: Of the matrix they were computed from.
    """
    return _NOISE * torch.finfo(dtype).eps * s[..., :1]


def completed(rows: Tensor, s: Tensor) -> Tensor:
    """Rows of length s made unit rows, arbitrary orthonormal ones where s is nothing.

    Args:
        rows: (..., n, length), orthogonal, the i-th of length s_i.
        s: (..., n), descending, at least as exact as the rows.

    Returns:
        (..., n, length), orthonormal.
    """
    # In float64 the roots of a Gram matrix's eigenvalues have half the digits of the rows.
    fast = rows.device.type == "cpu" and rows.dtype == torch.float32
    if fast and bool((s > noise(s, rows.dtype)).all()):
        return rows / s.unsqueeze(-1).to(rows.dtype)
    q, r = torch.linalg.qr(rows.mT)
    return (q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).unsqueeze(-2)).mT

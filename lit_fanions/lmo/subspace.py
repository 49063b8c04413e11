"""Rank k: block iterations, which are matrix products and small QR factorisations alone."""

from __future__ import annotations

import torch
from torch import Tensor


def subspace(m: Tensor, basis: Tensor, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets within a block power iteration's last subspace.

    Warm-started with the singular vectors of a slightly different matrix, one or two iterations
    suffice; from a random block this is randomised SVD (Halko, Martinsson & Tropp,
    arXiv 0909.4061).

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64.
        basis: Start block, (batch, cols, width), width <= min(rows, cols), of full rank.
        iterations: Products with m and its transpose, at least 1.

    Returns:
        U (batch, rows, width), S (batch, width) descending, Vh (batch, width, cols): all of the
        block. The first k < width are accurate, the rest warms the next start.
    """
    for _ in range(iterations):
        left = torch.linalg.qr(m @ basis).Q
        product = m.mT @ left
        basis, small = torch.linalg.qr(product)
    p, s, qh = torch.linalg.svd(small.mT)  # m's part in the block is left @ small^T @ basis^T
    return left @ p, s, (basis @ qh.mT).mT


def dion(m: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One power iteration as in centralised Dion (arXiv 2504.05295, algorithm 1).

    Args:
        m: Momentum plus gradient, (batch, rows, cols), float32 or float64.
        basis: The previous right basis Q, (batch, cols, k).

    Returns:
        P (batch, rows, k), orthonormal; R = m^T P (batch, cols, k), which error feedback takes
        away from the momentum; and Q, R with unit columns, which is not orthonormal. The
        direction is P Q^T. A column of R that is zero leaves that column of Q at zero.
    """
    p = torch.linalg.qr(m @ basis).Q
    r = m.mT @ p
    norm = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
    return p, r, r / torch.where(norm == 0, 1.0, norm)

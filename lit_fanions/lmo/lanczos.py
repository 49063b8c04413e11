"""Rank k: thick-restart Lanczos bidiagonalisation (Wu & Simon 1998; Baglama & Reichel 2005).

The paper's section 3 names this method and misses it in PyTorch. Each step costs one product with
the matrix and one with its transpose; a restart keeps the best Ritz vectors and goes on from them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lanczos(
    m: Tensor,
    start: Tensor,
    k: int,
    *,
    tol: float,
    basis: int,
    cycles: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triplets of each matrix.

    Both bases are orthogonalised in full, twice: they are small, and the vectors are what the
    caller wants. An exhausted Krylov space (fewer distinct singular values than vectors) goes on
    with a random vector, so that repeated singular values are found.

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64, of moderate scale.
        start: Start vectors, (batch, cols), not zero.
        k: Number of triplets, at most min(rows, cols).
        tol: Stops when every residual |m^T u - s v| is at most tol * s. On an accelerator, where
            looking would synchronise, all cycles are run.
        basis: Krylov vectors before a restart; clamped to k + 1 ... min(rows, cols).
        cycles: Restarts at most.
        generator: Source of the random vectors, on the device of m.

    Returns:
        U (batch, rows, k), S (batch, k) descending, Vh (batch, k, cols).
    """
    batch, rows, cols = m.shape
    limit = min(rows, cols)
    basis = min(max(basis, k + 2), limit)
    keep = min(k + (basis - k) // 2, basis - 1)
    tiny = torch.finfo(m.dtype).eps * torch.linalg.matrix_norm(m).clamp(min=1e-30)[:, None]

    v = m.new_zeros(batch, cols, basis + 1)
    u = m.new_zeros(batch, rows, basis)
    projected = m.new_zeros(batch, basis, basis)  # u^T m v
    v[:, :, 0] = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    beta = m.new_zeros(batch, 1)
    first = 0
    for cycle in range(cycles):
        for j in range(first, basis):
            w, h = _orthogonalise(_apply(m, v[:, :, j]), u[:, :, :j])
            projected[:, :j, j] = h
            u[:, :, j], alpha = _normalise(w, u[:, :, :j], tiny, generator)
            projected[:, j, j] = alpha[:, 0]
            w, _ = _orthogonalise(_apply(m.mT, u[:, :, j]), v[:, :, : j + 1])
            if j + 1 < cols:
                v[:, :, j + 1], beta = _normalise(w, v[:, :, : j + 1], tiny, generator)
        p, s, qh = torch.linalg.svd(projected)
        left, right = u @ p, v[:, :, :basis] @ qh.mT
        residual = beta * p[:, -1, :k].abs()
        done = basis == limit or cycle == cycles - 1
        if not done and m.device.type == "cpu":
            done = bool((residual <= tol * s[:, :k] + tiny).all())
        if done:
            break
        # Thick restart: the kept Ritz vectors, then the next Krylov vector. The coupling between
        # them comes back by itself from the projection of m v onto u.
        v[:, :, keep] = v[:, :, basis].clone()
        v[:, :, :keep], u[:, :, :keep] = right[:, :, :keep], left[:, :, :keep]
        projected.zero_()
        projected[:, :keep, :keep] = torch.diag_embed(s[:, :keep])
        first = keep
    return left[:, :, :k], s[:, :k], right[:, :, :k].mT


def _apply(m: Tensor, x: Tensor) -> Tensor:
    return (m @ x.unsqueeze(-1)).squeeze(-1)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """w minus its part in the basis, twice for rounding, and the coefficients of that part."""
    total = _apply(basis.mT, w)
    w = w - _apply(basis, total)
    again = _apply(basis.mT, w)
    return w - _apply(basis, again), total + again


def _normalise(
    w: Tensor, basis: Tensor, tiny: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """w / |w| and |w|; where w is rounding noise, a random vector outside the basis and 0."""
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    lost = norm <= tiny
    if w.device.type != "cpu" or bool(lost.any()):
        fresh = torch.randn(w.shape, dtype=w.dtype, device=w.device, generator=generator)
        fresh, _ = _orthogonalise(fresh, basis)
        fresh = fresh / torch.linalg.vector_norm(fresh, dim=-1, keepdim=True)
        return torch.where(lost, fresh, w / norm), torch.where(lost, 0.0, norm)
    return w / norm, norm

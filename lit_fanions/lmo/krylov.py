"""Rank k to a tolerance: thick-restart block Lanczos, every step a product with m and with m^T.

The method of the paper's section 3 (Wu & Simon, SIAM J. Matrix Anal. Appl. 22, 2000), on m^T m
without forming it. Blocks of vectors instead of single ones, because a product with eight reads
the matrix as often as one with a single vector; only the right vectors are kept orthonormal,
since the left ones follow from them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo.factorisations import completed, noise, wide
from lit_fanions.lmo.scaling import largest_entry

# Blocks of a cycle, before a restart keeps the best of their vectors.
_BLOCKS = 24
# A look at the residuals solves a small eigenproblem: not before so many times the vectors.
_LOOK_AGAIN = 1.25
# Residuals that a search in coarse products may hope for.
_COARSE_TOLERANCE = 5e-4


class Lanczos(NamedTuple):
    """What ``lanczos`` found.

    Attributes:
        U: (batch, rows, width), width >= k where the matrix has as many.
        S: (batch, width), descending.
        Vh: (batch, width, cols).
        residuals: |m^T u - s v| relative to s, (batch, k).
        products: Columns multiplied by m or by m^T; for a batch in step, of one matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    products: int


def block_width(k: int, limit: int) -> int:
    """How many vectors a cold start should have; more use the memory better and converge later.

    A block can find as many copies of a repeated singular value as it has vectors. Further copies
    come in by rounding alone: at loose tolerances they may be missed, and smaller singular values
    stand in their place.

    Args:
        k: Triplets wanted.
        limit: min(rows, cols).
    """
    width = 8 if k <= 4 else 16 if k <= 48 else 32
    return min(width, limit)


def lanczos(
    m: Tensor,
    k: int,
    start: Tensor,
    *,
    tol: float = 1e-2,
    cycles: int = 50,
    basis: int | None = None,
    coarse: torch.dtype | None = None,
) -> Lanczos:
    """The leading singular triplets by thick-restart block Lanczos.

    On a CPU every matrix stops when its own residuals are small enough. Elsewhere, where looking
    at them waits for the device, all stop together at the end of a cycle.

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64, of entries from 1e-30 to 1e30.
        k: Number of triplets, at most min(rows, cols).
        start: Start vectors, (batch, cols, width), of full rank; the blocks get their width.
        tol: Residual |m^T u - s v| relative to s to stop at.
        cycles: How many times the search starts, at most.
        basis: Vectors that it collects before a restart keeps k and a block of the best, at least
            k and three blocks. None: 24 blocks.
        coarse: A dtype of faster products: the search is made in it, and its outcome is the start
            of one in the dtype of m, which alone decides when to stop.

    Returns:
        See ``Lanczos``. NaN for a matrix with a NaN or an infinity.
    """
    if m.shape[-1] > m.shape[-2]:  # the vectors to keep orthonormal are the shorter ones
        turned = lanczos(m.mT, k, m @ start, tol=tol, cycles=cycles, basis=basis, coarse=coarse)
        return turned._replace(U=turned.Vh.mT, Vh=turned.U.mT)
    if m.device.type != "cpu" or not len(m):
        return _search(m, k, start.mT, tol, cycles, basis, coarse)
    pairs = zip(m, start.mT, strict=True)
    parts = [_search(x, k, block, tol, cycles, basis, coarse) for x, block in pairs]
    width = min(part.S.shape[-1] for part in parts)  # each stopped when it had enough
    return Lanczos(
        torch.stack([part.U[..., :width] for part in parts]),
        torch.stack([part.S[:width] for part in parts]),
        torch.stack([part.Vh[:width] for part in parts]),
        torch.stack([part.residuals for part in parts]),
        sum(part.products for part in parts),
    )


def _search(
    m: Tensor,
    k: int,
    start: Tensor,
    tol: float,
    cycles: int,
    basis: int | None,
    coarse: torch.dtype | None,
) -> Lanczos:
    """``lanczos`` of one matrix, or of a batch in step, with the start vectors as rows."""
    if coarse is None:
        return _krylov(m, k, start, tol, cycles, basis)
    found = _krylov(m.to(coarse), k, start, max(tol, _COARSE_TOLERANCE), 2, basis)
    better = _krylov(m, k, found.Vh, tol, cycles, basis)
    return better._replace(products=found.products + better.products)


def _krylov(
    m: Tensor, k: int, start: Tensor, tol: float, cycles: int, basis: int | None
) -> Lanczos:
    rows, cols = m.shape[-2:]
    dtype, width = start.dtype, min(start.shape[-2], cols)
    basis = _BLOCKS * block_width(k, cols) if basis is None else basis
    size = min(max(basis, k + 3 * width), cols)
    batch, looks = m.shape[:-2], m.device.type == "cpu"
    # Squares of the singular values would lose half of float32's digits.
    exact = torch.float32 if m.device.type == "mps" else torch.float64
    v = start.new_empty(*batch, size + 2 * width, cols)
    w = start.new_empty(*batch, size + width, rows, dtype=exact)  # v m^T
    gram = w.new_zeros(*batch, size + width, size + width)  # w w^T

    v[..., :width, :] = torch.linalg.qr(start[..., :width, :].mT).Q.mT
    done, ready, products, cycle, look = 0, width, 0, 1, float(k)
    scale: Tensor | None = None
    while True:
        block, new = slice(done, ready), ready - done
        left = (v[..., block, :].to(m.dtype) @ m.mT).to(dtype)
        if scale is None:
            # Of the blocks, as that of the matrix would take a copy of it.
            peak = largest_entry(left)
            broken = ~peak.isfinite()
            scale = torch.where(broken | (peak == 0), 1, 1 / peak)
        left = torch.where(broken, 0, left * scale)
        w[..., block, :] = left
        gram[..., block, :ready] = w[..., block, :] @ w[..., :ready, :].mT
        gram[..., :ready, block] = gram[..., block, :ready].mT.clone()
        z = (left.to(m.dtype) @ m).to(dtype) * scale
        fresh, coupling = _outside(torch.where(broken, 0, z), v[..., :ready, :])
        done, ready = ready, min(ready + fresh.shape[-2], cols)
        products += 2 * new
        v[..., done:ready, :] = fresh[..., : ready - done, :]

        complete, over = ready == done, done >= size
        if not (complete or over or (looks and done >= look)):
            continue
        look = _LOOK_AGAIN * done
        squares, q = torch.linalg.eigh(wide(gram[..., :done, :done]))
        s, q = squares.clamp(min=0).sqrt().flip(-1).to(gram), q.flip(-1).to(gram)
        noise_level = noise(s, dtype)
        residuals = _residuals(s[..., :k], q[..., -new:, :k], coupling.to(exact), noise_level)
        if complete or bool((residuals <= tol).all()) or (over and cycle == cycles):
            break
        if over:
            kept = min(k + width, done)
            following = v[..., done:ready, :].clone()
            v[..., :kept, :] = q[..., :kept].mT.to(dtype) @ v[..., :done, :]
            w[..., :kept, :] = q[..., :kept].mT @ w[..., :done, :]
            gram.zero_().diagonal(dim1=-2, dim2=-1)[..., :kept] = s[..., :kept] ** 2
            done, ready, cycle, look = kept, kept + following.shape[-2], cycle + 1, float(kept)
            v[..., done:ready, :] = following

    best = q[..., : min(k + width, done)].mT
    s = s[..., : best.shape[-2]]
    nan = torch.where(broken, torch.nan, 0.0).to(dtype)
    u = completed((best @ w[..., :done, :]).to(dtype), s).mT + nan
    vh = best.to(dtype) @ v[..., :done, :] + nan
    s = s.to(dtype) / scale[..., 0] + nan[..., 0]
    return Lanczos(u, s, vh, residuals.to(dtype) + nan[..., 0], products)


def _outside(z: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span the rows of z outside the basis, and r: z's part is r^T rows.

    Where z has nothing outside, rows of rounding noise would lie inside: random ones replace them.
    """
    q, r = torch.linalg.qr((z - z @ basis.mT @ basis).mT)
    size = torch.linalg.vector_norm(z, dim=(-2, -1)).unsqueeze(-1)
    lost = r.diagonal(dim1=-2, dim2=-1).abs() <= 64 * torch.finfo(z.dtype).eps * size
    passes = 1
    if z.device.type != "cpu" or bool(lost.any()):
        generator = torch.Generator().manual_seed(basis.shape[-2])
        random = torch.randn(q.shape[-2:], dtype=q.dtype, generator=generator).to(q.device)
        q = torch.where(lost.unsqueeze(-2), random / q.shape[-2] ** 0.5, q)
        r = torch.where(lost.unsqueeze(-1), 0, r)
        passes = 2
    for _ in range(passes):  # for rounding
        q, again = torch.linalg.qr(q - basis.mT @ (basis @ q))
        r = again @ r
    return q.mT, r


def _residuals(s: Tensor, last: Tensor, coupling: Tensor, least: Tensor) -> Tensor:
    """|m^T u - s v| / s of Ritz triplets, from their coefficients in the last block."""
    outside = torch.linalg.vector_norm(coupling @ last, dim=-2)
    # Of a singular value that is none, any vectors are right.
    return torch.where(s > least, outside / s**2, 0.0)

"""Rank k by a fixed number of block products: block power iteration, warm or cold."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_fanions.lmo.factorisations import (
    NOISE,
    completed,
    gram_schmidt,
    orthonormal_rows,
    principal_rows,
    rows_outside,
    wide,
)
from lit_fanions.lmo.newton_schulz import unit_polar
from lit_fanions.lmo.presets import AUTO
from lit_fanions.lmo.problems import OVERSAMPLING
from lit_fanions.lmo.scaling import largest_entry, unit_frobenius

# Block iterations that turn a random block towards the leading singular vectors.
_WARMING = 8
# A float64 Gram matrix does not show parts of vectors that are smaller than this.
_LEAST_NOISE = 1e-7
# A column is no rounding error if its part outside the columns before it is longer than this times
# the longest column.
_CLEAR = 1e-3


def subspace(m: Tensor, basis: Tensor, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets in the last subspace of a block power iteration.

    Warm-started with the singular vectors of a slightly different matrix, one iteration suffices;
    from a random block this is randomised SVD (Halko, Martinsson & Tropp, arXiv 0909.4061).

    The matrices, (batch, rows, cols), are float32 or float64 of entries from 1e-30 to 1e30. The
    columns of the basis, (batch, cols, width), need not be orthonormal; dependent ones are
    replaced. U, S and Vh are those of the whole block: its last columns are less accurate, but make
    the next warm start better. NaN for a matrix with a NaN or an infinity.
    """
    single = len(m) == 1  # on a CPU two-dimensional products are faster
    m, v = (m[0], basis[0].mT) if single else (m, basis.mT)
    u, s, v = block_iteration(Products(m), v, iterations)
    return (u.mT[None], s[None], v[None]) if single else (u.mT, s, v)


class Products:
    """Matrices as a block power iteration uses them: by products with blocks of rows.

    A subclass may hold shards of the matrices. Vectors with an entry for each of their columns are
    whole all the same; vectors with an entry for each row may be shards.
    """

    def __init__(self, m: Tensor) -> None:
        self.m = m

    def left(self, v: Tensor) -> Tensor:
        """Return v m^T, (..., width, rows), of v (..., width, cols)."""
        return v @ self.m.mT

    def right(self, u: Tensor) -> Tensor:
        """Return u m, (..., width, cols), of u (..., width, rows)."""
        return u @ self.m

    def orthonormal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return orthonormal rows with the span of w, and 0, or NaN where w is not finite.

        The memory of w may be used.
        """
        broken = largest_entry(w) * 0
        return orthonormal_rows(w.masked_fill_(broken.isnan(), 0)), broken


def block_iteration(products: Products, v: Tensor, iterations: int) -> tuple[Tensor, ...]:
    """Return ``subspace`` with all vectors as rows, the start block v too: U^T, S and Vh."""
    for _ in range(iterations):
        # Products of small or large vectors would underflow or overflow.
        v = v / largest_entry(v).clamp(min=torch.finfo(v.dtype).tiny)
        u, broken = products.orthonormal(products.left(v))
        v = products.right(u).masked_fill_(broken.isnan(), 0)
    s, p = principal_rows(v)
    rotation = p.to(v).mT
    u, v = rotation @ u + broken, completed(rotation @ v, s.to(v)) + broken
    return u, s.to(v) + broken[..., 0], v


def polar_block(m: Tensor, basis: Tensor, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and W with U W the polar factor of m within the span of U: about U_k V_k^T.

    U is an orthonormal basis of the columns of m basis, and W the polar factor of U^T m, by
    Newton-Schulz iterations of k x k products. So it takes no eigenvectors, but a block of k
    columns converges more slowly than the wider one of ``subspace``, whose arguments these are.
    S (batch, k), descending, is u^T m w of each pair; W is the next start.
    """
    v, products = basis.mT, Products(m)
    for _ in range(iterations):
        u, broken = products.orthonormal(unit_frobenius(v @ m.mT)[0])
        projected = u @ m
        unit, _ = unit_frobenius(projected)
        v = unit_polar(unit, AUTO)
    s, order = (projected * v).sum(-1).sort(-1, descending=True)
    u, v = (x.gather(-2, order.unsqueeze(-1).expand_as(x)) for x in (u, v))
    return u.mT + broken, s, v


def dion(m: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return one power iteration of centralised Dion (arXiv 2504.05295, algorithm 1).

    From the previous right basis Q, (batch, cols, k), it makes P (batch, rows, k), with orthonormal
    columns; R = m^T P, which error feedback subtracts from the momentum; and the new Q, the columns
    of R divided by their lengths, which are not orthogonal to each other. The direction is P Q^T.

    Where m has a lower rank than k, the part of a column of R outside those before it is a
    rounding error: P and R are zero there, and Q is the old column, to be tried again.
    """
    y = m @ basis
    p = gram_schmidt(y.mT).mT
    r = m.mT @ p
    length = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
    if y.device.type == "cpu" and _is_well_conditioned(y, p):
        return p, r, r / length
    return _without_noise(p, r, length, basis)


def dion_by_products(products: Products, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dion`` of matrices that are known by products; P as ``Products`` has rows."""
    p, broken = products.orthonormal(products.left(basis.mT))
    p, r = p.mT, products.right(p).mT
    length = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
    p, r, q = _without_noise(p, r.masked_fill(broken.isnan(), 0), length, basis)
    return p + broken, r + broken, q + broken


def _without_noise(
    p: Tensor, r: Tensor, length: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, R and Q of ``dion``, with zeros and old columns in place of rounding errors."""
    lost = _depend_on_columns_before(r, length)
    return p.masked_fill_(lost, 0), r.masked_fill_(lost, 0), torch.where(lost, basis, r / length)


def _is_well_conditioned(y: Tensor, p: Tensor) -> bool:
    """Return whether each column of y is far outside those before it, with p = Gram-Schmidt(y)."""
    outside = (p * y).sum(-2).abs()
    longest = torch.linalg.vector_norm(y, dim=-2).amax(-1, keepdim=True)
    return bool((outside > _CLEAR * longest).all())


def _depend_on_columns_before(r: Tensor, length: Tensor) -> Tensor:
    """Return whether the part of a column of r outside those before it is a rounding error."""
    unit = wide(r / length.amax(-1, keepdim=True).clamp_(min=torch.finfo(r.dtype).tiny))
    bound = max(NOISE * torch.finfo(r.dtype).eps, _LEAST_NOISE)
    gram = unit.mT @ unit
    gram.diagonal(dim1=-2, dim2=-1).add_((bound / 4) ** 2)  # so that it has a factor
    outside = torch.linalg.cholesky_ex(gram).L.diagonal(dim1=-2, dim2=-1)
    return (outside <= bound).unsqueeze(-2).to(r.device)


def start_block(
    shape: tuple[int, ...],
    k: int,
    *,
    device: torch.device,
    oversampling: int = OVERSAMPLING,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a random orthonormal start for the rank-k solvers.

    Args:
        shape: Shape of the matrices, (..., rows, cols).
        k: Rank wanted.
        device: Device of the block. It is drawn on the CPU, so that every device gets the same.
        oversampling: Columns beyond k.
        generator: A CPU generator; None is a fresh one of seed 0.

    Returns:
        (..., cols, width) in float32, width = min(k + oversampling, rows, cols).
    """
    *batch, rows, cols = shape
    width = min(k + oversampling, rows, cols)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    block = torch.randn(*batch, cols, width, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(block).Q.to(device)


def warmed(m: Tensor, block: Tensor) -> Tensor:
    """Return a start block turned towards the leading right singular vectors of a matrix.

    Args:
        m: Matrices, (..., rows, cols).
        block: ``start_block`` for them, (..., cols, width).

    Returns:
        The same shape as block; where m is zero or not finite, the block as it is.
    """
    x, norm = unit_frobenius(m)
    usable = (norm > 0) & norm.isfinite()
    x = torch.where(usable, x, 0.0)
    _, _, vh = subspace(x, block.to(x.dtype), iterations=_WARMING)
    return torch.where(usable, vh.mT, block)


def warmed_by_products(products: Products, norm: Tensor, block: Tensor) -> Tensor:
    """Return ``warmed`` of matrices over their Frobenius norms, (..., 1, 1), known by products."""
    _, _, vh = block_iteration(products, block.mT, _WARMING)
    return torch.where((norm > 0) & norm.isfinite(), vh.mT, block)


def widened(m: Tensor, basis: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Return a basis with further columns, turned towards what a matrix has outside the basis.

    Args:
        m: Matrices, (..., rows, cols).
        basis: A right basis of their solver, (..., cols, width); its columns stay as they are.
        columns: Columns wanted, more than width.
        generator: A CPU generator for the start of the new columns.

    Returns:
        (..., cols, columns), in the dtype of the basis; the new columns are orthonormal, and
        orthogonal to the old ones.
    """
    x = m if m.dtype == torch.float64 else m.float()
    old = orthonormal_rows(basis.mT.to(x))  # columns of dion are not orthogonal to each other
    rest = x - x @ old.mT @ old
    missing = columns - basis.shape[-1]
    block = start_block(m.shape, missing, device=m.device, oversampling=0, generator=generator)
    new, _ = rows_outside(warmed(rest, block).mT.to(x), old)
    return torch.cat([basis, new.mT.to(basis)], -1)

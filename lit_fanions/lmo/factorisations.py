"""Factorisations of a block of a few row vectors, which the rank-k solvers are made of.

Gram matrices of float32 rows are taken in float64: squaring then loses nothing.

On GPUs torch's QR factorisations loop over a batch, and its eigendecompositions make the host wait
for the device. Rows are made orthonormal there by Cholesky factorisations of Gram matrices, which
are single calls for a whole batch and need no decision by the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_fanions.lmo.scaling import largest_entry

# Sweeps of orthogonal iteration that replace an eigendecomposition on a GPU.
_SWEEPS = 4
# Rows are taken as dependent if their Gram matrix, scaled to a diagonal of 1, has a smaller pivot.
_PIVOT = 1e-5
# Singular values below NOISE * eps * s_max count as zero.
NOISE = 64
# Cholesky factorisations one after the other: each squares the distance to orthonormal rows.
_CHOLESKY_PASSES = 3
# Added to the diagonal of the first Gram matrix, for each row: more than its rounding errors, so
# that it has a Cholesky factor.
_SHIFT = 1e-14


def wide(x: Tensor) -> Tensor:
    """Return the tensor in float64; on the CPU if it is on an Apple GPU, which has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def scattered_rows(count: int, length: int, like: Tensor, index: int = 0) -> Tensor:
    """Return fixed rows of entries without a pattern, of lengths close to 1.

    They serve as random vectors where drawing would change the state of a generator of the device
    or copy numbers to it. ``like`` has the dtype and device wanted; rows of different ``index`` are
    independent of each other.
    """
    device = "cpu" if like.device.type == "mps" else like.device  # Apple GPUs have no float64
    steps = torch.arange(1, count * length + 1, dtype=torch.float64, device=device)
    chirp = steps.square_().mul_((2 + index) ** 0.5).sin_().div_((length / 2) ** 0.5)
    return chirp.view(count, length).to(like)


def gram_schmidt(x: Tensor) -> Tensor:
    """Return orthonormal rows of which the first n span the first n rows of x, for every n.

    The rows of x are finite, in float32 or float64. A row that depends on the rows before it is
    replaced by an arbitrary row. By Householder reflections on a CPU, where this is one call, and
    on an Apple GPU, which has no float64; elsewhere by ``cholesky_rows``.
    """
    if by_reflections(x):
        return torch.linalg.qr(x.mT).Q.mT
    return cholesky_rows(x)


def by_reflections(x: Tensor) -> bool:
    """Return whether QR factorisations are used on the device of x."""
    return x.device.type in ("cpu", "mps")


def cholesky_rows(x: Tensor) -> Tensor:
    """Return ``gram_schmidt`` by shifted Cholesky QR, for which the host does not wait.

    The method is that of Fukaya et al. (SIAM J. Sci. Comput. 42, 2020), with fixed vectors added
    in place of what dependent rows lack.
    """
    return _cholesky_passes(x, _rounding_rows(x), _CHOLESKY_PASSES).to(x.dtype)


def _rounding_rows(x: Tensor) -> Tensor:
    """Return a rounding error for each row, which makes even equal and zero rows independent."""
    count, length = x.shape[-2:]
    rows = scattered_rows(count, length, x.new_empty(0, dtype=torch.float64))
    return rows.mul_(torch.finfo(x.dtype).eps)


def _cholesky_passes(x: Tensor, rounding: Tensor, passes: int) -> Tensor:
    """Return float64 rows after Cholesky factorisations of their Gram matrices in sequence.

    After the first pass rows that are nearly dependent are not orthogonal yet.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=rounding.dtype)
    y = torch.addcdiv(rounding, x, length.clamp_(min=torch.finfo(rounding.dtype).tiny))
    y = y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    for step in range(passes):
        gram = y @ y.mT
        if not step:
            gram.diagonal(dim1=-2, dim2=-1).add_(_SHIFT * x.shape[-2])
        factor = torch.linalg.cholesky_ex(gram).L
        y = torch.linalg.solve_triangular(factor, y, upper=False)
    return y


def orthonormal_rows(x: Tensor) -> Tensor:
    """Return orthonormal rows with the span of x, arbitrary rows in place of dependent rows."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # Several times faster than reflections, and as exact if no row depends on the others.
        unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=0)
        factor, failed = torch.linalg.cholesky_ex(unit @ unit.mT)
        if not failed.any() and bool((factor.diagonal(dim1=-2, dim2=-1) > _PIVOT).all()):
            return (torch.linalg.inv_ex(factor).inverse @ unit).to(x.dtype)
    return gram_schmidt(x)


def orthonormal_shards(
    x: Tensor, own: slice, total: int, add: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return this rank's entries of orthonormal rows with the span of rows that lie on several.

    The first n of them span the first n of these rows, for every n. By two Cholesky factorisations
    of Gram matrices, as ``cholesky_rows``; fixed vectors replace dependent rows.

    This rank's entries x, (..., count, entries) in float32, stand at the places ``own`` of rows of
    ``total`` entries; ``add`` sums a tensor over the ranks. The second result is 0, or NaN where
    the rows are not finite, (..., 1, 1).
    """
    y, count = x.double(), x.shape[-2]
    gram = add(y @ y.mT)
    broken = largest_entry(gram) * 0
    nothing = broken.isnan()
    factor, length = _scaled_factor(gram.masked_fill_(nothing, 0), _SHIFT * count)
    pivot = factor.diagonal(dim1=-2, dim2=-1)
    lost = (pivot <= 4 * (_SHIFT * count) ** 0.5).unsqueeze(-1)
    # Later rows keep what the shift has made of dependent ones, which are replaced.
    factor = factor.tril(-1).masked_fill_(lost.mT, 0) + pivot.diag_embed()
    y = torch.linalg.solve_triangular(factor, y.masked_fill_(nothing, 0) / length, upper=False)
    fixed = scattered_rows(count, total, x.new_empty(0, dtype=torch.float64))[..., own]
    y = torch.where(lost, fixed, y)
    factor, length = _scaled_factor(add(y @ y.mT), 0.0)
    y = torch.linalg.solve_triangular(factor, y / length, upper=False)
    return y.to(x.dtype), broken.to(x.dtype)


def _scaled_factor(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of the Gram matrix of rows over their lengths, and the lengths.

    ``gram`` is the Gram matrix of the rows; ``shift`` is added to the diagonal of the other one.
    """
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_(min=torch.finfo(gram.dtype).tiny)
    length = length.unsqueeze(-1)
    scaled = gram / length / length.mT
    scaled.diagonal(dim1=-2, dim2=-1).add_(shift)
    return torch.linalg.cholesky_ex(scaled).L, length


def rows_outside(z: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows outside the basis that, with it, span the rows of z.

    A row whose part outside the basis is within its rounding error is replaced by a random row,
    because such a part lies inside the basis as well.

    Returns:
        Rows, (..., count, cols), and r, (..., count, count): z's part outside the basis is
        r^T rows. For a replaced row, r has the bound below which its part was lost.
    """
    part = z - z @ basis.mT @ basis
    bound = 64 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z, dim=-1)
    if not by_reflections(z):
        return _outside_on_device(part, basis, bound)
    q, r = torch.linalg.qr(part.mT)
    lost = r.diagonal(dim1=-2, dim2=-1).abs() <= bound
    passes = 1
    if bool(lost.any()):
        generator = torch.Generator().manual_seed(basis.shape[-2])
        random = torch.randn(q.shape[-2:], generator=generator, dtype=q.dtype, device="cpu")
        random = random.to(q.device)
        q = torch.where(lost.unsqueeze(-2), random / q.shape[-2] ** 0.5, q)
        r = torch.where(lost.unsqueeze(-1), 0, r)
        passes = 2
    for _ in range(passes):  # for rounding
        q, again = torch.linalg.qr(q - basis.mT @ (basis @ q))
        r = again @ r
    return q.mT, torch.where(lost.unsqueeze(-1), bound.diag_embed(), r)


def _outside_on_device(part: Tensor, basis: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``rows_outside`` of the parts outside the basis, for which the host does not wait."""
    q = cholesky_rows(part)
    r = q @ part.mT
    lost = r.diagonal(dim1=-2, dim2=-1) <= bound
    count, length = part.shape[-2:]
    random = scattered_rows(count, length, part, index=basis.shape[-2])
    q = torch.where(lost.unsqueeze(-1), random, q)
    r = torch.where(lost.unsqueeze(-1), bound.diag_embed(), r)
    for _ in range(2):  # for rounding
        q = cholesky_rows(q - q @ basis.mT @ basis)
    return q, r


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return roots of the eigenvalues of positive semidefinite matrices, and the eigenvectors.

    The roots, (..., n), descend. On a GPU both are approximate, because torch's eigendecomposition
    would wait for the device. They are close for a nearly diagonal matrix of descending order, such
    as that of a warm-started block.
    """
    if gram.device.type == "cpu":
        squares, q = torch.linalg.eigh(gram)
        return squares.clamp(min=0).sqrt().flip(-1), q.flip(-1)
    return by_sweeps(gram)


def by_sweeps(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``principal`` by orthogonal iteration: matrix products and ``gram_schmidt`` alone."""
    squared = gram @ gram
    if by_reflections(gram):
        q = gram_schmidt(squared.mT).mT  # of the squared matrix times the identity
        for _ in range(_SWEEPS - 1):
            q = gram_schmidt((squared @ q).mT).mT
    else:
        q = _swept_by_cholesky(squared)
    squares, order = (q * (gram @ q)).sum(-2).sort(-1, descending=True)
    return squares.clamp(min=0).sqrt(), q.gather(-1, order.unsqueeze(-2).expand_as(q))


def _swept_by_cholesky(squared: Tensor) -> Tensor:
    """Return the columns of ``by_sweeps``, orthonormal after the last sweep only.

    One factorisation keeps the columns apart until the next sweep.
    """
    rounding = _rounding_rows(squared)
    rows = _cholesky_passes(squared.mT, rounding, 1)
    for sweep in range(1, _SWEEPS):
        passes = 1 if sweep + 1 < _SWEEPS else _CHOLESKY_PASSES
        rows = _cholesky_passes(rows @ squared, rounding, passes)
    return rows.mT


def principal_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values of a few rows, descending, and their left singular vectors.

    Both in float64 and as accurate as the rows: those of float32 by their Gram matrix in float64,
    those of float64 from the rows, because roots of its eigenvalues would have half the digits.
    On a GPU as approximate as ``principal``.
    """
    rows = wide(x)
    if x.dtype == torch.float64 and x.device.type == "cpu":
        q, s, _ = torch.linalg.svd(rows, full_matrices=False)
        return s, q
    s, q = principal(rows @ rows.mT)
    if x.dtype == torch.float64:
        s, order = torch.linalg.vector_norm(q.mT @ rows, dim=-1).sort(-1, descending=True)
        q = q.gather(-1, order.unsqueeze(-2).expand_as(q))
    return s, q


def noise(s: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bound below which singular values of a matrix of a dtype count as zero, (..., 1).

    The values, descending, must be as accurate as the dtype: roots of eigenvalues of a Gram matrix
    that was computed in the dtype are not.
    """
    return NOISE * torch.finfo(dtype).eps * s[..., :1]


def completed(rows: Tensor, s: Tensor) -> Tensor:
    """Normalise orthogonal rows of lengths s, which descend and are as accurate as the rows.

    Rows of (numerically) no length become arbitrary orthonormal rows.
    """
    # In float64 short rows are not as orthogonal as a division by their length would need.
    fast = rows.device.type == "cpu" and rows.dtype == torch.float32
    if fast and bool((s > noise(s, rows.dtype)).all()):
        return rows / s.unsqueeze(-1).to(rows.dtype)
    if not by_reflections(rows):
        return cholesky_rows(rows)
    q, r = torch.linalg.qr(rows.mT)
    return (q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).unsqueeze(-2)).mT

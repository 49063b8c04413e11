"""What the monitors measure of matrices: small functions of their singular values.

A matrix is looked at once, by ``measure``, and what is wanted of it (norms, ranks, quantiles) is a
function of the answer, whether that is exact or an estimate. Leading dimensions are a batch.
``docs/quantities.md`` explains each quantity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo.factorisations import wide
from lit_fanions.lmo.scaling import unit_frobenius
from lit_fanions.lmo.singular_triplets import start_block

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

# Matrices with a smaller side up to this are decomposed as a whole by the cheap mode too.
SMALL = 128
# Block width and number of blocks of the Krylov space that stands in for a larger one.
_SPECTRUM = (8, 8)
_LEADING = (4, 6)
# A Ritz value of a smaller residual, relative to it, is counted as one singular value,
_CONVERGED = 0.02
_NOTHING = 1e-12
_SEVERAL = 4.0  # not if the quadrature says that it stands for more
_ROUNDING = 1e-6


class Spectrum(NamedTuple):
    """The singular values of matrices, or a sample that stands for them.

    Attributes:
        values: (..., n) in float64, descending.
        weights: (..., n), how many singular values each of these stands for: 1 if exact. They add
            up to min(rows, cols).
        frobenius: The Frobenius norm, (...), never estimated.
        total: The nuclear norm, (...), where it is known better than as the weighted sum.
    """

    values: Tensor
    weights: Tensor
    frobenius: Tensor
    total: Tensor | None = None


def measure(
    x: Tensor, *, exact: bool = False, leading: bool = False, small: int = SMALL
) -> Spectrum:
    """The singular values of matrices.

    The estimate of a matrix whose smaller side is above 128 is a block Gauss quadrature (Golub &
    Meurant, Matrices, Moments and Quadrature, chapter 7): a Krylov space of eight random vectors
    and seven powers of the Gram matrix, sixteen products of the matrix with eight columns. Leading
    Ritz values that have converged count once each; the rest is made to have the right number of
    singular values and the right Frobenius norm. The nuclear norm is the middle of what the
    quadratures of Gauss, from above, and of Radau, from below, say. The errors, measured on
    Gaussian matrices, power laws from i^-.5 to i^-2, condition numbers up to 1e4 and low ranks, 140
    to 512 in size:

    - spectral norm: at most 1 % too small, never too large;
    - nuclear norm: 4 %; nuclear rank: 8 %;
    - Ky Fan norms: 10 %; energy in rank k: .05;
    - quantiles relative to the largest: .1, so that small ones may have any size.

    Of larger matrices, and where singular values fall exponentially, norms were up to 17 % off and
    nuclear ranks up to 20 %. Where dozens are equal, as in a projection, the space has only eight
    of them: the nuclear norm is then right to a third, and quantiles near the jump may be either
    side's.

    A smaller matrix is decomposed as a whole by either mode: the cheap one takes the eigenvalues of
    the float64 Gram matrix, and singular values are right to 1e-7 of the largest.

    Args:
        x: (..., rows, cols), of any float dtype and scale.
        exact: A singular value decomposition in float64 instead.
        leading: Only the largest value and the Frobenius norm matter: twelve products with four
            columns, the spectral norm at most 5 % too small.
        small: Up to which smaller side matrices are decomposed as a whole.

    Returns:
        The spectrum; all NaN for a matrix with a NaN or an infinity.
    """
    unit, norm = unit_frobenius(x.detach(), dtype=_dtype(x))
    finite = norm.isfinite()
    unit = torch.where(finite, unit, 0.0)
    unit = unit if x.shape[-2] >= x.shape[-1] else unit.mT
    total = None
    if exact:
        values = torch.linalg.svdvals(wide(unit))
        weights = torch.ones_like(values)
    elif unit.shape[-1] <= small:
        tall = wide(unit)
        values = torch.linalg.eigvalsh(tall.mT @ tall).clamp(min=0).sqrt().flip(-1)
        weights = torch.ones_like(values)
    else:
        values, weights, total = _quadrature(unit, *(_LEADING if leading else _SPECTRUM))
    norm = torch.where(finite, norm, torch.nan)[..., 0].to(values)
    total = None if total is None else total * norm[..., 0]
    return Spectrum(values * norm, weights, norm[..., 0], total)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _quadrature(x: Tensor, width: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, weights and total of ``Spectrum`` for matrices of Frobenius norm 1, rows >= cols."""
    cols = x.shape[-1]
    gram, coupling = _krylov(x, width, blocks)
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.clamp(min=0).flip(-1), vectors.flip(-1)
    weights = vectors[..., :width, :].square().sum(-2) * (cols / width) + _NOTHING
    # How much the rule gives too much for the square root, which is half of what it differs by
    # from Radau's with a node at zero: that one gives too little by about as much.
    excess = (weights * squares.sqrt()).sum(-1) - _radau(gram, coupling, width) * (cols / width)
    excess = excess.clamp(min=0) / 2
    # What A^T A makes of a Ritz vector beyond its multiple comes out of the last block alone.
    residuals = torch.linalg.vector_norm(coupling @ vectors[..., -width:, :], dim=-2)
    single = (residuals <= _CONVERGED * squares) & (weights < _SEVERAL)
    single[..., -1] = False  # the last stands for all that was not found
    counted = single.to(squares).cumprod(-1)
    # The rest: as many as there are, and of the Frobenius norm that there is.
    weights = weights * (1 - counted)
    surplus = excess / (weights * squares.sqrt()).sum(-1).clamp(min=_NOTHING)
    missing = cols - counted.sum(-1, keepdim=True)
    weights = weights * missing / weights.sum(-1, keepdim=True)
    left = (1 - (counted * squares).sum(-1, keepdim=True)).clamp(min=0)
    found = (weights * squares).sum(-1, keepdim=True)
    scaled = squares * left / torch.where(found > 0, found, 1.0)
    kept = counted.clone()
    kept[..., 0] = 1  # the largest is known better than by the sum
    limit = torch.where(kept > 0, squares, torch.inf).amin(-1, keepdim=True)
    values = torch.where(kept > 0, squares, torch.minimum(scaled, limit)).sqrt()
    total = (counted * values).sum(-1) + (weights * values).sum(-1) * (1 - surplus).clamp(min=0)
    return values, weights + counted, total


def _krylov(x: Tensor, width: int, blocks: int) -> tuple[Tensor, Tensor]:
    """A^T A in an orthonormal basis of random vectors and of its powers' products with them.

    Returns:
        The projection, (..., width * blocks, width * blocks), and what leads out of the basis: a
        factor R (..., width, width) of A^T A times the basis's last block, less its projection.
    """
    # The same for every matrix and at every step, which then differ by what they are alone.
    generator = torch.Generator().manual_seed(0)
    block, *fresh = (
        start_block(x.shape[-2:], width, device=x.device, oversampling=0, generator=generator)
        .to(x)
        .expand(*x.shape[:-2], x.shape[-1], width)
        .contiguous()
        for _ in range(blocks)
    )
    basis, images = block, []
    for step in range(blocks):
        image = x @ block
        images.append(image)
        rest = x.mT @ image
        rest = rest - basis @ (basis.mT @ rest)
        if step + 1 < blocks:
            # Of a matrix of low rank only rounding noise is left, which may lie anywhere: new
            # random directions take its place, and are projected once more.
            block = torch.linalg.qr(rest + _ROUNDING * fresh[step]).Q
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
            basis = torch.cat([basis, block], -1)
    products = wide(torch.cat(images, -1))
    return products.mT @ products, torch.linalg.qr(wide(rest)).R


def _radau(gram: Tensor, coupling: Tensor, width: int) -> Tensor:
    """The sum of z^T (A^T A)^(1/2) z over the first block, by a rule with a node at zero."""
    squares, vectors = torch.linalg.eigh(gram)
    reached = coupling @ vectors[..., -width:, :]
    corner = (reached / squares.clamp(min=_NOTHING).unsqueeze(-2)) @ reached.mT
    side = torch.zeros_like(gram[..., :width])
    side[..., -width:, :] = coupling.mT
    bordered = torch.cat([torch.cat([gram, side], -1), torch.cat([side.mT, corner], -1)], -2)
    squares, vectors = torch.linalg.eigh(bordered)
    weights = vectors[..., :width, :].square().sum(-2)
    return (weights * squares.clamp(min=0).sqrt()).sum(-1)


def spectral(s: Spectrum) -> Tensor:
    """The largest singular value: (...)."""
    return s.values[..., 0]


def nuclear(s: Spectrum) -> Tensor:
    """The sum of the singular values: (...)."""
    return (s.weights * s.values).sum(-1) if s.total is None else s.total


def ky_fan(s: Spectrum, k: int) -> Tensor:
    """The sum of the k largest singular values: (...)."""
    # Of an estimate the sum of all may be a little more than what is known of it.
    return torch.minimum((_leading(s, k) * s.values).sum(-1), nuclear(s))


def nuclear_rank(s: Spectrum) -> Tensor:
    """The squared nuclear over the squared Frobenius norm, (...): from 1 to the rank."""
    return (nuclear(s) / s.frobenius).square()


def stable_rank(s: Spectrum) -> Tensor:
    """The squared Frobenius over the squared spectral norm, (...): from 1 to the rank."""
    return (s.frobenius / spectral(s)).square()


def energy(s: Spectrum, k: int) -> Tensor:
    """The part of the squared Frobenius norm that the best rank-k approximation has: (...)."""
    relative = s.values / s.frobenius.unsqueeze(-1)
    return (_leading(s, k) * relative.square()).sum(-1)


def _leading(s: Spectrum, k: int) -> Tensor:
    """The weights of the k largest singular values alone."""
    before = s.weights.cumsum(-1) - s.weights
    return torch.minimum((k - before).clamp(min=0), s.weights)


def quantiles(s: Spectrum, fractions: Sequence[float] = QUANTILES) -> Tensor:
    """Quantiles of the singular values over the largest of them, interpolated linearly.

    Args:
        s: The spectrum.
        fractions: Of the quantiles, from 0 (the smallest value) to 1.

    Returns:
        (..., fractions).
    """
    values = (s.values / s.values[..., :1]).flip(-1)
    weights = s.weights.flip(-1)
    ends = weights.cumsum(-1)
    # The place of each value among all, counted from 0; that of several is their middle.
    places = (ends - (weights + 1) / 2).contiguous()
    wanted = torch.tensor(fractions, dtype=values.dtype, device=values.device)
    wanted = (wanted * (ends[..., -1:] - 1)).contiguous()
    last = values.shape[-1] - 1
    after = torch.searchsorted(places, wanted).clamp(max=last)
    before = (after - 1).clamp(min=0)
    low, high = places.gather(-1, before), places.gather(-1, after)
    part = ((wanted - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
    return values.gather(-1, before).lerp(values.gather(-1, after), part)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of matrices: (..., rows, cols), (..., rows, cols) -> (...)."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum((-2, -1))

"""Scale-free arithmetic that every oracle starts with: norms that neither under- nor overflow.

A gradient of 1e-20 has an fp32 square of 0, one of 1e+20 a square of infinity. Dividing by the
largest entry first costs one pass and removes both, so no oracle needs an absolute epsilon.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Other dtypes are converted to float32.
_EXACT = (torch.float32, torch.float64)
# A Frobenius norm between these has lost no squares to underflow or overflow in float32.
_TINY, _HUGE = 1e-12, 1e15


def largest_entry(m: Tensor) -> Tensor:
    """Return the largest absolute entry of each matrix, NaN or infinite where an entry is.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        (..., 1, 1), in the dtype of m.
    """
    dims = (-2, -1)
    if has_fast_maximum_norm(m.device):
        return torch.linalg.vector_norm(m, ord=torch.inf, dim=dims, keepdim=True)
    return torch.maximum(m.amax(dims, keepdim=True), -m.amin(dims, keepdim=True))


def has_fast_maximum_norm(device: torch.device) -> bool:
    """Return whether a norm of order infinity is one launch on a device and keeps NaN.

    It is ten times slower than ``amax`` and ``amin`` on CPUs, and not known to keep NaN on Apple
    GPUs.
    """
    return device.type not in ("cpu", "mps")


def unit_frobenius(
    m: Tensor, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Divide each matrix by its Frobenius norm; zero stays zero, a non-finite matrix becomes NaN.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype.
        dtype: Dtype of the result; None is float32, or float64 for float64.
        overwrite: Whether the memory of m may be used.

    Returns:
        The same shape, and the norms, (..., 1, 1), in float32 (float64 for float64).
    """
    x, norm, peak = _divided(m, dtype, overwrite)
    norm = norm.to(torch.promote_types(m.dtype, torch.float32))
    return x, norm if peak is None else peak * norm


def normalised(m: Tensor, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Tensor:
    """Return the matrices of ``unit_frobenius``, for products, without their norms.

    A NaN may stay in the place of a NaN or an infinity: products of the matrix spread it.
    """
    return _divided(m, dtype, overwrite, spread=False)[0]


def _divided(
    m: Tensor, dtype: torch.dtype | None, overwrite: bool, spread: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``unit_frobenius`` does; norms are divided by the third result if it is one."""
    given = m if overwrite else None
    if m.device.type == "cuda" and m.dtype != torch.float64:
        # In float64 squares of float32 neither under- nor overflow, which saves two passes. Other
        # accelerators may have no float64. The remainder of infinity by infinity is NaN.
        norm = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        norm.clamp_(min=torch.finfo(torch.float64).tiny)
        norm = norm.fmod_(math.inf) if spread else norm
        wanted = dtype or torch.float32
        kept = given if given is not None and given.dtype == wanted else None
        result = torch.empty_like(m, dtype=wanted) if kept is None else kept
        return torch.div(m, norm, out=result), norm, None
    overwrite = overwrite or m.dtype not in _EXACT
    m = m if m.dtype in _EXACT else m.float()
    on_cpu, peak = m.device.type == "cpu", None
    norm = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True) if on_cpu else None
    if norm is None or not _are_plain(norm):
        # Squares may under- or overflow: divide by the largest entry first. An infinite one makes
        # a NaN of its own place and so of the norm.
        tiny = torch.finfo(m.dtype).tiny  # in place of 0, so that a zero matrix stays zero
        peak = largest_entry(m).clamp_(min=tiny)
        m = torch.div(m, peak, out=m if overwrite else None)
        norm, overwrite = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True), True
        norm = norm.clamp_(min=tiny)
    reused = given if given is not None and given.dtype == dtype else None
    if dtype is None or dtype == m.dtype:
        return torch.div(m, norm, out=m if overwrite else None), norm, peak
    if on_cpu:
        x = torch.div(m, norm, out=m if overwrite else None)
        return (x.to(dtype) if reused is None else reused.copy_(x)), norm, peak
    # A single launch, which rounds to the dtype as it writes.
    result = torch.empty_like(m, dtype=dtype) if reused is None else reused
    return torch.div(m, norm, out=result), norm, peak


def has_plain_norm(m: Tensor) -> bool:
    """Return whether the norms of float32 or float64 matrices are far from 0 and infinity."""
    return _are_plain(torch.linalg.vector_norm(m, dim=(-2, -1)))


def _are_plain(norms: Tensor) -> bool:
    return bool(((norms > _TINY) & (norms < _HUGE)).all())


def multiplied(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return x times a factor, computed in the memory of x unless that is slower."""
    if x.device.type == "cpu" and x.dtype.itemsize < 4 and isinstance(factor, Tensor):
        # On CPUs a product of 16-bit and 32-bit numbers takes ten times as long.
        return x.float().mul_(factor).to(x.dtype)
    return x.mul_(factor)


def frobenius_norm(m: Tensor) -> Tensor:
    """Return the Frobenius norm of matrices of ordinary scale, such as weights and directions.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        (..., 1, 1), in float32, or float64 for float64.
    """
    dtype = torch.promote_types(m.dtype, torch.float32)
    return torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True, dtype=dtype)

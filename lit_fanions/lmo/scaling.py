"""Scale-free arithmetic that every oracle starts with: norms that neither under- nor overflow.

A gradient of 1e-20 has an fp32 square of 0, one of 1e+20 a square of infinity. Dividing by the
largest entry first costs one pass and removes both, so no oracle needs an absolute epsilon.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Other dtypes are converted to float32.
_EXACT = (torch.float32, torch.float64)
# A Frobenius norm between these has lost no squares to underflow or overflow in float32.
_TINY, _HUGE = 1e-12, 1e15


def check_matrices(m: Tensor) -> None:
    """Refuse what is no batch of matrices of floating-point numbers.

    Raises:
        ValueError: With the dtype and shape given.
    """
    if m.ndim < 2 or not m.is_floating_point() or 0 in m.shape[-2:]:
        raise ValueError(
            "expected floating-point matrices of shape (..., rows, cols) with at least one entry, "
            f"got {m.dtype} {tuple(m.shape)}"
        )


def largest_entry(m: Tensor) -> Tensor:
    """Return the largest absolute entry of each matrix, NaN or infinite where an entry is.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        (..., 1, 1), in the dtype of m.
    """
    # vector_norm(ord=inf) means the same and is ten times slower on CPUs.
    dims = (-2, -1)
    return torch.maximum(m.amax(dims, keepdim=True), -m.amin(dims, keepdim=True))


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
    given = m if overwrite else None
    overwrite = overwrite or m.dtype not in _EXACT
    m = m if m.dtype in _EXACT else m.float()
    norm = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True)
    if m.device.type != "cpu" or not bool(((norm > _TINY) & (norm < _HUGE)).all()):
        # Squares may have under- or overflowed: divide by the largest entry first.
        peak = largest_entry(m)
        peak = torch.where(peak.isfinite(), peak, torch.nan)
        m = m / torch.where(peak == 0, 1.0, peak)
        norm, overwrite = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True), True
        whole = peak * norm
    else:
        whole = norm
    x = torch.div(m, torch.where(norm == 0, 1.0, norm), out=m if overwrite else None)
    if dtype is None or dtype == x.dtype:
        return x, whole
    return (x.to(dtype) if given is None or given.dtype != dtype else given.copy_(x)), whole


def frobenius_norm(m: Tensor) -> Tensor:
    """Return the Frobenius norm of matrices of ordinary scale, such as weights and directions.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        (..., 1, 1), in float32, or float64 for float64.
    """
    dtype = torch.promote_types(m.dtype, torch.float32)
    return torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True, dtype=dtype)

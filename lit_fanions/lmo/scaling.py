"""Scale-free arithmetic that every oracle starts with: norms that neither under- nor overflow.

A gradient of 1e-20 has an fp32 square of 0, one of 1e+20 a square of infinity. Dividing by the
largest entry first costs one pass and removes both, so no oracle needs an absolute epsilon.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Inputs of fewer digits than these are raised to float32.
_EXACT = (torch.float32, torch.float64)


def largest_entry(m: Tensor) -> Tensor:
    """The largest absolute entry of each matrix, NaN or infinite where an entry is.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        (..., 1, 1), in the dtype of m.
    """
    # vector_norm(ord=inf) means the same and is ten times slower on CPUs.
    dims = (-2, -1)
    return torch.maximum(m.amax(dims, keepdim=True), -m.amin(dims, keepdim=True))


def unit_frobenius(m: Tensor) -> tuple[Tensor, Tensor]:
    """Each matrix over its Frobenius norm; zero stays zero, a non-finite matrix becomes NaN.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype.

    Returns:
        The same shape and the norms, (..., 1, 1); both float32 (float64 for float64).
    """
    m = m if m.dtype in _EXACT else m.float()
    peak = largest_entry(m)
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    m = m / torch.where(peak == 0, 1.0, peak)
    norm = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True)
    return m.div_(torch.where(norm == 0, 1.0, norm)), peak * norm


def frobenius_norm(m: Tensor) -> Tensor:
    """The Frobenius norm of matrices of ordinary scale, such as weights and directions.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        (..., 1, 1), in float32, or float64 for float64.
    """
    dtype = torch.promote_types(m.dtype, torch.float32)
    return torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True, dtype=dtype)

"""Rank k on an NVIDIA GPU by CuPy's thick-restart Lanczos, the solver of the paper's section 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo.block_power import subspace
from lit_fanions.lmo.factorisations import scattered_rows

# CuPy's solver needs that many dimensions beyond the k that it is asked for.
BEYOND = 3
# Block iterations that estimate the singular values, and their columns beyond k.
_ESTIMATE = 2
_OVERSAMPLING = 8
# Residuals of m^T m below so many units of rounding of s_1^2 are out of reach.
_ROUNDING = 16


def svds(
    m: Tensor, k: int, *, tol: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k leading singular triplets, found by cupyx.scipy.sparse.linalg.svds.

    Tensors are handed over and back through DLPack without a copy. The matrices of a batch are
    solved one after the other.

    CuPy works on m^T m and counts singular values as zero that are below some s_1 / 90 in float32
    and s_1 / 67000 in float64, with arbitrary vectors: for such spectra choose "lanczos".

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64, on a CUDA device, of ordinary scale.
        k: Number of triplets, at most min(rows, cols) - 3.
        tol: Largest accepted residual |m^T u - s v|, relative to each singular value. In float32
            residuals below some 2e-6 (s_1 / s_k)^2 are out of reach; the search stops there.
        generator: CPU generator of the random starts; None is a fresh one of seed 0.

    Returns:
        U (batch, rows, k), S (batch, k) descending, Vh (batch, k, cols). For a zero matrix S is 0
        and the vectors are arbitrary but orthonormal; for one with a NaN or an infinity all is NaN.

    Raises:
        RuntimeError: Without a CUDA tensor or without CuPy, with what to do.
    """
    if m.device.type != "cuda":
        raise RuntimeError(
            f'solver "cupy" needs a CUDA tensor, got one on {m.device}; choose "lanczos"'
        )
    cupy, linalg = _import_cupy()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**31, (), generator=generator))
    m = m.detach()
    entries = m.flatten(1)
    solvable = (entries.isfinite().all(1) & entries.any(1)).tolist()
    tolerances = _absolute_tolerances(m, k, tol)
    triplets = []
    with (
        cupy.cuda.Device(m.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(m.device).cuda_stream),
    ):
        # It takes no start vector, but draws one from the random state of the device.
        others = cupy.random.get_random_state()
        cupy.random.set_random_state(cupy.random.RandomState(seed))
        try:
            for matrix, solves, tolerance in zip(m, solvable, tolerances, strict=True):
                if solves:
                    found = linalg.svds(cupy.from_dlpack(matrix), k=k, tol=tolerance)
                    triplets.append([torch.from_dlpack(x) for x in found])
                else:
                    triplets.append(_unsolved(matrix, k))
        finally:
            cupy.random.set_random_state(others)
    return _descending(*(torch.stack(parts) for parts in zip(*triplets, strict=True)))


def _import_cupy() -> tuple[Any, Any]:
    """Return CuPy and its module of sparse linear algebra.

    Raises:
        RuntimeError: Without CuPy, with how to install it.
    """
    try:
        import cupy
        from cupyx.scipy.sparse import linalg
    except ImportError as error:
        cuda = "12" if (torch.version.cuda or "").startswith("12") else "13"
        raise RuntimeError(
            f'solver "cupy" needs CuPy: pip install "lit-fanions[cuda{cuda}]", '
            'or choose solver "lanczos"'
        ) from error
    return cupy, linalg


def _absolute_tolerances(m: Tensor, k: int, tol: float) -> list[float]:
    """Return for each matrix the tolerance of CuPy that means the relative tolerance tol.

    CuPy stops when the residuals |m^T m v - s^2 v| = s |m^T u - s v| of all triplets together are
    below an absolute tolerance. So it gets tol s_k^2, with a Ritz value for s_k, which never
    exceeds it.
    """
    width = min(k + _OVERSAMPLING, *m.shape[-2:])
    start = scattered_rows(m.shape[-1], width, m, index=1)
    _, s, _ = subspace(m, start.expand(len(m), -1, -1), iterations=_ESTIMATE)
    reachable = _ROUNDING * torch.finfo(m.dtype).eps * s[:, 0] ** 2
    return torch.maximum(tol * s[:, k - 1] ** 2, reachable).tolist()


def _descending(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort triplets, which CuPy like SciPy gives in ascending order."""
    s, order = s.sort(-1, descending=True)
    u = u.gather(-1, order[:, None, :].expand_as(u))
    return u, s, vh.gather(-2, order[:, :, None].expand_as(vh))


def _unsolved(m: Tensor, k: int) -> list[Tensor]:
    """Return the triplets of a zero matrix, or NaN."""
    nothing = m.sum() * 0  # NaN if an entry is NaN or infinite
    u, s, vh = (m.new_zeros(shape) for shape in ((m.shape[0], k), (k,), (k, m.shape[1])))
    u.fill_diagonal_(1)
    vh.fill_diagonal_(1)
    return [x + nothing for x in (u, s, vh)]

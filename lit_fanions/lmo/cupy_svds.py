"""Rank k on an NVIDIA GPU by CuPy's thick-restart Lanczos, the solver of the paper's section 3."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo.block_power import subspace
from lit_fanions.lmo.convergence import ROUNDING, Goal, direction_error
from lit_fanions.lmo.factorisations import scattered_rows

# By this much the smaller side must exceed k, as CuPy's solver needs more dimensions than triplets.
BEYOND = 4
# Block iterations that estimate the singular values, and their columns beyond k.
_ESTIMATE = 2
_OVERSAMPLING = 8
# Searches, each to smaller residuals, until the error of U_k V_k^T is as small as asked for.
_SEARCHES = 4


def svds(
    m: Tensor, k: int, *, goal: Goal, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k leading singular triplets, found by cupyx.scipy.sparse.linalg.svds.

    Tensors are handed over and back through DLPack without a copy. The matrices of a batch, float32
    or float64 of ordinary scale, are solved one after the other; k is at most min(rows, cols) - 4.

    CuPy works on m^T m. Singular values below some s_1 / 90 in float32, or s_1 / 67000 in float64,
    count as zero there and get arbitrary vectors: for such spectra choose "lanczos".

    It stops by residuals alone, and takes no start. If the goal has an error, which also depends on
    the gap between s_k and s_(k+1), searches to smaller residuals follow until the goal is met.

    In float32 residuals below some 2e-6 (s_1 / s_k)^2 are out of reach; the search stops there. For
    a zero matrix S is 0 and the vectors are arbitrary but orthonormal; for one with a NaN or an
    infinity all is NaN.

    Raises:
        RuntimeError: Without a CUDA tensor or without CuPy, with what to do.
    """
    if m.device.type != "cuda":
        raise RuntimeError(
            f'solver "cupy" needs a CUDA tensor, got one on {m.device}; choose "lanczos"'
        )
    cupy, linalg = _import_cupy()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
    m = m.detach()
    entries = m.flatten(1)
    solvable = (entries.isfinite().all(1) & entries.any(1)).tolist()
    largest, least = _ends(m, k)
    triplets = []
    with (
        cupy.cuda.Device(m.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(m.device).cuda_stream),
    ):
        # It takes no start vector, but draws one from the random state of the device.
        others = cupy.random.get_random_state()
        cupy.random.set_random_state(cupy.random.RandomState(seed))
        try:
            for i, matrix in enumerate(m):
                if solvable[i]:
                    search = functools.partial(linalg.svds, cupy.from_dlpack(matrix))
                    triplets.append(_search(search, matrix, k, goal, (largest[i], least[i])))
                else:
                    triplets.append(_unsolved(matrix, k))
        finally:
            cupy.random.set_random_state(others)
    u, s, vh = map(torch.stack, zip(*triplets, strict=True))
    return u, s, vh


def _import_cupy() -> tuple[Any, Any]:
    """Return CuPy and its module of sparse linear algebra, or say how to install it."""
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


def _ends(m: Tensor, k: int) -> tuple[list[float], list[float]]:
    """Return Ritz values for s_1 and s_k of each matrix, which never exceed them."""
    width = min(k + _OVERSAMPLING, *m.shape[-2:])
    start = scattered_rows(m.shape[-1], width, m, index=1)
    _, s, _ = subspace(m, start.expand(len(m), -1, -1), iterations=_ESTIMATE)
    return s[:, 0].tolist(), s[:, k - 1].tolist()


def _search(
    search: Callable[..., Any], m: Tensor, k: int, goal: Goal, ends: tuple[float, float]
) -> list[Tensor]:
    """Return triplets of a matrix that meet the goal.

    CuPy stops when the residuals |m^T m v - s^2 v| = s |m^T u - s v| of all triplets together are
    below an absolute tolerance. So it gets the relative one times s_k^2. ``search`` is its svds of
    the matrix, ``ends`` are estimates of s_1 and s_k.
    """
    residual = goal.residual
    reachable = ROUNDING * torch.finfo(m.dtype).eps * ends[0] ** 2
    count = k if goal.error is None else k + 1
    for _ in range(_SEARCHES):
        tol = residual * ends[1] ** 2
        u, s, vh = (torch.from_dlpack(x) for x in search(k=count, tol=max(tol, reachable)))
        s, order = s.sort(-1, descending=True)  # CuPy's are in ascending order
        u, vh = u[:, order], vh[order]
        if goal.error is None:
            break
        right = u[:, :k].mT @ m - s[:k, None] * vh[:k]
        rest = torch.linalg.vector_norm(right, dim=-1)
        spread = ((right @ m.mT).square().sum() / rest.square().sum()).nan_to_num(0.0)
        error = float(direction_error((rest / s[:k]).nan_to_num(0.0), s, spread))
        if error <= goal.error or tol <= reachable:
            break
        residual *= min(0.3, max(0.01, goal.error / error))
    return [u[:, :k], s[:k], vh[:k]]


def _unsolved(m: Tensor, k: int) -> list[Tensor]:
    """Return the triplets of a zero matrix, or NaN."""
    nothing = m.sum() * 0  # NaN if an entry is NaN or infinite
    u, s, vh = (m.new_zeros(shape) for shape in ((m.shape[0], k), (k,), (k, m.shape[1])))
    u.fill_diagonal_(1)
    vh.fill_diagonal_(1)
    return [x + nothing for x in (u, s, vh)]

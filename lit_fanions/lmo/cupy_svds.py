"""Rank k on an NVIDIA GPU by CuPy's thick-restart Lanczos, the solver of the paper's section 3."""

from __future__ import annotations

import torch
from torch import Tensor


def cupy_svds(m: Tensor, k: int, *, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triplets of each matrix, by cupyx.scipy.sparse.linalg.svds.

    Tensors are handed over and back through DLPack without a copy. The matrices of a batch are
    solved one after the other.

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64, on a CUDA device.
        k: Number of triplets, less than min(rows, cols).
        tol: Relative tolerance of CuPy's Lanczos.

    Returns:
        U (batch, rows, k), S (batch, k) descending, Vh (batch, k, cols).

    Raises:
        RuntimeError: Without a CUDA tensor or without CuPy, with what to do.
    """
    if m.device.type != "cuda":
        raise RuntimeError(
            f'solver "cupy" needs a CUDA tensor, got one on {m.device}; choose "lanczos"'
        )
    try:
        import cupy
        from cupyx.scipy.sparse.linalg import svds
    except ImportError as error:
        raise RuntimeError(
            'solver "cupy" needs CuPy: pip install "lit-fanions[cuda12]" (or cuda13), '
            'or choose solver "lanczos"'
        ) from error
    triplets = []
    with (
        cupy.cuda.Device(m.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(m.device).cuda_stream),
    ):
        for matrix in m:
            u, s, vh = svds(cupy.from_dlpack(matrix.detach()), k=k, tol=tol)
            triplets.append([torch.from_dlpack(x) for x in (u, s, vh)])
    u, s, vh = (torch.stack(parts) for parts in zip(*triplets, strict=True))
    s, order = s.sort(-1, descending=True)  # CuPy, like SciPy, answers in ascending order
    return (
        u.gather(-1, order[:, None, :].expand_as(u)),
        s,
        vh.gather(-2, order[:, :, None].expand_as(vh)),
    )

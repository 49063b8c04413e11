"""Rank k on an NVIDIA GPU by CuPy's thick-restart Lanczos, the solver of the paper's section 3."""

from __future__ import annotations

import torch
from torch import Tensor

# CuPy's solver needs that many dimensions beyond the k that it is asked for.
BEYOND = 3


def svds(
    m: Tensor, k: int, *, tol: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triplets of each matrix, by cupyx.scipy.sparse.linalg.svds.

    Tensors are handed over and back through DLPack without a copy. The matrices of a batch are
    solved one after the other.

    Args:
        m: Matrices, (batch, rows, cols), float32 or float64, on a CUDA device.
        k: Number of triplets, at most min(rows, cols) - 3.
        tol: Relative tolerance of CuPy's Lanczos.
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
    try:
        import cupy
        from cupyx.scipy.sparse import linalg
    except ImportError as error:
        raise RuntimeError(
            'solver "cupy" needs CuPy: pip install "lit-fanions[cuda12]" (or cuda13), '
            'or choose solver "lanczos"'
        ) from error
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**31, (), generator=generator))
    entries = m.detach().flatten(1)
    solvable = (entries.isfinite().all(1) & entries.any(1)).tolist()
    triplets = []
    with (
        cupy.cuda.Device(m.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(m.device).cuda_stream),
    ):
        # It takes no start vector, but draws one from the random state of the device.
        others = cupy.random.get_random_state()
        cupy.random.set_random_state(cupy.random.RandomState(seed))
        try:
            for matrix, solves in zip(m, solvable, strict=True):
                if solves:
                    found = linalg.svds(cupy.from_dlpack(matrix.detach()), k=k, tol=tol)
                    triplets.append([torch.from_dlpack(x) for x in found])
                else:
                    triplets.append(_unsolved(matrix, k))
        finally:
            cupy.random.set_random_state(others)
    u, s, vh = (torch.stack(parts) for parts in zip(*triplets, strict=True))
    s, order = s.sort(-1, descending=True)  # CuPy, like SciPy, answers in ascending order
    return (
        u.gather(-1, order[:, None, :].expand_as(u)),
        s,
        vh.gather(-2, order[:, :, None].expand_as(vh)),
    )


def _unsolved(m: Tensor, k: int) -> list[Tensor]:
    """The triplets of a zero matrix, or NaN."""
    nothing = m.sum() * 0  # of a NaN or an infinity NaN
    u, s, vh = (m.new_zeros(shape) for shape in ((m.shape[0], k), (k,), (k, m.shape[1])))
    u.fill_diagonal_(1)
    vh.fill_diagonal_(1)
    return [x + nothing for x in (u, s, vh)]

"""Fast oracles of norm balls on batches of matrices: what the optimizer steps along.

``direction`` is the whole family of the paper in three numbers (rank, alpha, blend); ``polar`` and
``top_singular`` are its two engines, full rank and rank k. The exact counterparts are in
``lit_fanions.norms``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_fanions.lmo.cupy_svds import cupy_svds
from lit_fanions.lmo.lanczos import lanczos
from lit_fanions.lmo.polar import PolarMethod, check_polar, polar
from lit_fanions.lmo.scaling import frobenius_norm, largest_entry, unit_frobenius
from lit_fanions.lmo.subspace import dion, subspace

__all__ = [
    "Ball",
    "BlendName",
    "PolarMethod",
    "Solver",
    "Triplets",
    "blend_with",
    "check_polar",
    "coordinate",
    "dion",
    "direction",
    "frobenius_norm",
    "kyfan",
    "largest_entry",
    "oracle",
    "polar",
    "start_block",
    "top_singular",
    "unit_frobenius",
    "warmed",
]

Solver = Literal["auto", "lanczos", "subspace", "randomized", "power", "exact", "cupy"]
BlendName = Literal["frobenius", "sign"]
Ball = Literal["fanion", "kyfan", "coordinate"]

# Columns beyond k in a block iteration: the cut at k then lies inside the block, where the
# singular values are better separated from those outside.
OVERSAMPLING = 8
_COLD_ITERATIONS = 8
_WARM_ITERATIONS = 2
_POWER_ITERATIONS = 64
_LANCZOS_CYCLES = 50


class Triplets(NamedTuple):
    """Singular triplets of a batch of matrices, in descending order.

    Attributes:
        U: (..., rows, k).
        S: (..., k).
        Vh: (..., k, cols).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def start_block(
    shape: tuple[int, ...],
    k: int,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random orthonormal start for the rank-k solvers.

    Args:
        shape: Shape of the matrices, (..., rows, cols).
        k: Rank wanted.
        device: Where the block goes. It is drawn on the CPU, so that every device gets the same.
        generator: A CPU generator; None is a fresh one of seed 0.

    Returns:
        (..., cols, width) in float32, width = min(k + 8, rows, cols).
    """
    *batch, rows, cols = shape
    width = min(k + OVERSAMPLING, rows, cols)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.linalg.qr(torch.randn(*batch, cols, width, generator=generator)).Q.to(device)


def warmed(m: Tensor, block: Tensor) -> Tensor:
    """A start block turned towards the leading right singular vectors of a matrix.

    Args:
        m: Matrices, (..., rows, cols).
        block: ``start_block`` for them, (..., cols, width).

    Returns:
        The same shape as block; where m is zero or not finite, the block as it is.
    """
    x, norm = unit_frobenius(m)
    usable = (norm > 0) & norm.isfinite()
    x = torch.where(usable, x, 0.0)
    _, _, vh = subspace(x, block.to(x.dtype), iterations=_COLD_ITERATIONS)
    return torch.where(usable, vh.mT, block)


def top_singular(
    m: Tensor,
    k: int,
    *,
    solver: Solver = "lanczos",
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Triplets:
    """The k leading singular triplets of each matrix.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype and scale; computed in float32, or in
            float64 for float64.
        k: Number of triplets; clamped to min(rows, cols).
        solver: ``lanczos``: to the tolerance. ``subspace``: 2 block iterations from a warm start,
            8 from a cold one. ``randomized``: 8 block iterations, always cold. ``power``: 64
            iterations without oversampling. ``exact``: SVD in float64. ``cupy``: CuPy's Lanczos.
            ``auto``: subspace with a warm start, else Lanczos; exact where k is a large part.
        tol: Residual |m^T u - s v| relative to s at which Lanczos stops. On a GPU it does not
            look, since that would wait for the device, and runs all of its 50 cycles.
        warm_start: Right singular vectors of a matrix close to m, (..., cols, width): the Vh.mT
            of an earlier answer, or ``start_block``.
        generator: CPU generator of the random starts; None is a fresh one of seed 0, so that
            equal calls give equal answers.

    Returns:
        U (..., rows, k), S (..., k) descending, Vh (..., k, cols), in the dtype of computation.
        For a zero matrix S is 0 and the vectors are arbitrary but orthonormal; for one with a NaN
        or an infinity everything is NaN.

    Raises:
        ValueError: If k or the solver is not possible.
        RuntimeError: If the solver is cupy and there is no CUDA or no CuPy.
    """
    block = _leading_block(m, k, solver=solver, tol=tol, warm_start=warm_start, generator=generator)
    k = min(k, *m.shape[-2:])
    return Triplets(block.U[..., :k], block.S[..., :k], block.Vh[..., :k, :])


def _leading_block(
    m: Tensor,
    k: int,
    *,
    solver: str,
    tol: float,
    warm_start: Tensor | None,
    generator: torch.Generator | None,
) -> Triplets:
    """``top_singular`` with what a block solver knows beyond k, for the next warm start."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver {solver!r} is none of {', '.join(get_args(Solver))}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    *batch, rows, cols = m.shape
    k = min(k, rows, cols)
    if solver == "auto":
        solver = _choose_solver(rows, cols, k, warm=warm_start is not None)
    x, norm = unit_frobenius(m.reshape(-1, rows, cols))
    broken = norm.isnan()
    x = torch.where(broken, 0.0, x)
    if solver == "exact":
        host = x.cpu() if x.device.type == "mps" else x  # Apple's GPUs have no float64
        u, s, vh = (t.to(x) for t in torch.linalg.svd(host.double(), full_matrices=False))
    elif solver == "cupy":
        u, s, vh = cupy_svds(x, k, tol=tol)
    else:
        cold = warm_start is None or solver in ("randomized", "power")
        if cold:
            start = start_block(x.shape, k, device=x.device, generator=generator)
        else:
            assert warm_start is not None
            start = warm_start.reshape(-1, cols, warm_start.shape[-1])
        start = start.to(x.dtype)
        if solver == "lanczos":
            refill = torch.Generator(x.device).manual_seed(0)
            u, s, vh = lanczos(
                x, start.sum(-1), k,
                tol=tol, basis=2 * k + 16, cycles=_LANCZOS_CYCLES, generator=refill,
            )  # fmt: skip
        elif solver == "power":
            u, s, vh = subspace(x, start[..., :k], iterations=_POWER_ITERATIONS)
        else:
            iterations = _COLD_ITERATIONS if cold else _WARM_ITERATIONS
            u, s, vh = subspace(x, start, iterations=iterations)
    nan = torch.where(broken, torch.nan, 0.0)
    u, s, vh = u + nan, s * norm[..., 0], vh + nan
    return Triplets(*(t.reshape(*batch, *t.shape[1:]) for t in (u, s, vh)))


def _choose_solver(rows: int, cols: int, k: int, *, warm: bool) -> str:
    limit = min(rows, cols)
    if limit <= 32 or 2 * k + 16 >= limit:
        return "exact"
    return "subspace" if warm else "lanczos"


def blend_with(
    d: Tensor | None, m: Tensor, alpha: float, blend: str = "frobenius", sign_scale: float = 1.0
) -> Tensor:
    """alpha * d + (1 - alpha) * (m / |m|_F, or sign_scale * sign(m)).

    Args:
        d: The direction to blend, (..., rows, cols); None with alpha 0, where it is not needed.
        m: The matrices, the same shape.
        alpha: Weight of d.
        blend: frobenius | sign.
        sign_scale: Size of the sign part's entries.

    Returns:
        The same shape, in the dtype of m.
    """
    if alpha == 1:
        assert d is not None
        return d.to(m.dtype)
    other = m.sign() * sign_scale if blend == "sign" else unit_frobenius(m)[0].to(m.dtype)
    if d is None:
        return other + _nan_where_broken(m) if blend == "sign" else other
    return other.mul_(1 - alpha).add_(d, alpha=alpha)


def _nan_where_broken(m: Tensor) -> Tensor:
    """0, and NaN for a matrix with a NaN or an infinity: torch.sign forgets these."""
    return largest_entry(m) * 0


def kyfan(
    m: Tensor,
    k: int,
    *,
    polar_method: str = "auto",
    polar_steps: int | None = None,
    triplet: Triplets | None = None,
) -> Tensor:
    """The oracle of the Ky Fan k-ball: u_1 v_1^T if s_1 >= |m|_* / k, else U V^T / k.

    Args:
        m: Matrices, (..., rows, cols).
        k: Of the norm.
        polar_method: Solver of the full-rank part, as in ``polar``.
        polar_steps: Its steps.
        triplet: The leading triplet where it is known already.

    Returns:
        The same shape and dtype.
    """
    full = polar(m, method=polar_method, steps=polar_steps)
    u, s, vh = top_singular(m, 1, solver="auto") if triplet is None else triplet
    unit, norm = unit_frobenius(m)
    nuclear = (unit * full).sum((-2, -1), keepdim=True) * norm
    concentrated = (s[..., :1, None] >= nuclear / k) & (norm > 0)
    return torch.where(concentrated, (u[..., :1] @ vh[..., :1, :]).to(m.dtype), full / k)


def coordinate(m: Tensor) -> Tensor:
    """The oracle of the entrywise-sum ball: the sign of the largest entry, 0 elsewhere.

    Args:
        m: Matrices, (..., rows, cols).

    Returns:
        The same shape and dtype. Of several largest entries, the first.
    """
    flat = m.flatten(-2)
    index = flat.abs().argmax(-1, keepdim=True)
    d = torch.zeros_like(flat).scatter_(-1, index, flat.gather(-1, index).sign())
    return d.unflatten(-1, m.shape[-2:]) + _nan_where_broken(m)


def direction(
    m: Tensor,
    *,
    rank: int | None = None,
    alpha: float = 1.0,
    blend: BlendName = "frobenius",
    sign_scale: float = 1.0,
    ball: Ball = "fanion",
    polar: PolarMethod = "auto",
    polar_steps: int | None = None,
    solver: Solver = "auto",
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The direction of steepest descent D(m) = argmax {<m, d> : |d| <= 1} of the family.

    ``rank=None`` is Muon, ``rank=1`` Neon, ``rank=k`` a k-Fanion; ``alpha < 1`` blends it with
    normalised SGD (F-) or sign descent (S-); ``alpha=0`` leaves only these.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype and scale. Leading dimensions are a
            batch of separate matrices.
        rank: Rank k of the direction; None, or at least min(rows, cols), is full.
        alpha: Weight of the low-rank or orthogonal part. Any finite number.
        blend: What gets the weight 1 - alpha: frobenius (m / |m|_F) | sign (sign_scale * sign(m)).
        sign_scale: Size of the sign part's entries.
        ball: fanion | kyfan (the Ky Fan ball of k = rank) | coordinate.
        polar: Full-rank method, see ``polar``.
        polar_steps: Its steps; None is the method's own number.
        solver: Rank-k solver, see ``top_singular``.
        tol: Its tolerance.
        warm_start: Its start block, (..., cols, width).
        generator: Its source of random starts.

    Returns:
        The same shape and dtype as m. Zero for a zero matrix; NaN for one with a NaN or an
        infinity.

    Raises:
        ValueError: If an option is not possible.
    """
    if m.ndim < 2 or not m.is_floating_point():
        raise ValueError(
            f"expected float matrices of shape (..., rows, cols), got {m.dtype} {tuple(m.shape)}"
        )
    for name, value, allowed in (("blend", blend, BlendName), ("ball", ball, Ball)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(allowed))}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be None or a whole number of at least 1, got {rank!r}")
    d, _ = oracle(
        m, rank=rank, alpha=alpha, ball=ball, polar_method=polar, polar_steps=polar_steps,
        solver=solver, tol=tol, warm_start=warm_start, generator=generator,
    )  # fmt: skip
    return blend_with(d, m, alpha, blend, sign_scale)


def oracle(
    m: Tensor,
    *,
    rank: int | None,
    alpha: float = 1.0,
    ball: str = "fanion",
    polar_method: str = "auto",
    polar_steps: int | None = None,
    solver: str = "auto",
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor | None, Triplets | None]:
    """The part of ``direction`` before the blend, and the triplets that a rank-k solver found.

    The triplets may be more than rank: their Vh.mT is the next warm start.
    """
    if alpha == 0:
        return None, None
    if ball == "coordinate":
        return coordinate(m), None
    rows, cols = m.shape[-2:]
    if ball == "fanion" and (rank is None or rank >= min(rows, cols)):
        return polar(m, method=polar_method, steps=polar_steps), None
    k = 1 if ball == "kyfan" else rank
    assert k is not None
    block = _leading_block(m, k, solver=solver, tol=tol, warm_start=warm_start, generator=generator)
    if ball == "kyfan":
        full = min(rows, cols) if rank is None else rank
        d = kyfan(m, full, polar_method=polar_method, polar_steps=polar_steps, triplet=block)
        return d, block
    # Directions of a zero singular value are noise: D(0) = 0, and rank-deficient m the same.
    noise = block.S[..., :1] * max(rows, cols) * torch.finfo(block.S.dtype).eps
    kept = (block.S[..., :k] > noise) | block.S[..., :k].isnan()
    u = block.U[..., :k] * kept.unsqueeze(-2)
    return (u @ block.Vh[..., :k, :]).to(m.dtype), block

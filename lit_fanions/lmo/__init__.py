"""Fast oracles of norm balls on batches of matrices: what the optimizer steps along.

``direction`` is the whole family of the paper in three numbers (rank, alpha, blend); ``polar`` and
``top_singular`` are its two engines, full rank and rank k. The exact counterparts are in
``lit_fanions.norms``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_fanions.lmo.block_power import dion, subspace
from lit_fanions.lmo.cupy_svds import BEYOND
from lit_fanions.lmo.cupy_svds import svds as cupy_svds
from lit_fanions.lmo.factorisations import noise, wide
from lit_fanions.lmo.krylov import Lanczos, block_width, lanczos
from lit_fanions.lmo.newton_schulz import (
    AUTO,
    GRAM_ASPECT,
    PolarMethod,
    check_polar,
    coefficients,
    fast_dtype,
    polar,
    polar_dtype,
    unit_polar,
)
from lit_fanions.lmo.scaling import blend_part, frobenius_norm, largest_entry, unit_frobenius

__all__ = [
    "Ball",
    "BlendName",
    "Lanczos",
    "PolarMethod",
    "Solver",
    "Triplets",
    "blend_part",
    "check_polar",
    "check_solver",
    "coordinate",
    "dion",
    "direction",
    "frobenius_norm",
    "lanczos",
    "largest_entry",
    "polar",
    "polar_dtype",
    "residuals",
    "rules",
    "solve",
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
# Block iterations, or restarts of Lanczos at most, from a cold and from a warm start.
_STEPS = {
    "lanczos": (50, 50),
    "subspace": (8, 1),
    "randomized": (8, 8),
    "power": (64, 64),
}
# From this size on Lanczos does its search in bfloat16 where that is fast.
_COARSE_SIZE = 2048
# A CPU takes the whole SVD of matrices up to this size, from a cold and from a warm start, and
# where, cold, k is more than this part of it.
_EXACT_SIZE = (192, 32)
_EXACT_PART = 4


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
    oversampling: int = OVERSAMPLING,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random orthonormal start for the rank-k solvers.

    Args:
        shape: Shape of the matrices, (..., rows, cols).
        k: Rank wanted.
        device: Where the block goes. It is drawn on the CPU, so that every device gets the same.
        oversampling: Columns beyond k.
        generator: A CPU generator; None is a fresh one of seed 0.

    Returns:
        (..., cols, width) in float32, width = min(k + oversampling, rows, cols).
    """
    *batch, rows, cols = shape
    width = min(k + oversampling, rows, cols)
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
    _, _, vh = subspace(x, block.to(x.dtype), iterations=_STEPS["subspace"][0])
    return torch.where(usable, vh.mT, block)


def top_singular(
    m: Tensor,
    k: int,
    *,
    solver: Solver = "lanczos",
    solver_steps: int | None = None,
    oversampling: int = OVERSAMPLING,
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Triplets:
    """The k leading singular triplets of each matrix.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype, of entries from 1e-30 to 1e30;
            computed in float32, or in float64 for float64.
        k: Number of triplets; clamped to min(rows, cols).
        solver: ``lanczos``: thick-restart block Lanczos, to the tolerance. ``subspace``: block
            power iterations, from the warm start where there is one. ``randomized``: the same,
            always cold. ``power``: the same without oversampling. ``exact``: SVD in float64.
            ``cupy``: CuPy's Lanczos, to the tolerance. ``auto``: what ``rules`` says.
        solver_steps: Block iterations, or restarts of Lanczos at most. None: subspace 8 from a
            cold start and 1 from a warm one, randomized 8, power 64, lanczos 50.
        oversampling: Columns beyond k of a block that is made here.
        tol: Residual |m^T u - s v| relative to s at which Lanczos stops.
        warm_start: Right singular vectors of a matrix close to m, (..., cols, width): the Vh.mT
            of an earlier answer, or ``start_block``.
        generator: CPU generator of the random starts; None is a fresh one of seed 0, so that
            equal calls give equal answers.

    Returns:
        U (..., rows, k), S (..., k) descending, Vh (..., k, cols), in the dtype of computation.
        Where S is 0 the vectors are arbitrary but orthonormal; for a matrix with a NaN or an
        infinity everything is NaN.

    Raises:
        ValueError: If k, the solver or its steps are not possible.
        RuntimeError: If the solver is cupy and there is no CUDA or no CuPy.
    """
    block = _leading_block(
        m.detach(), k, solver=solver, solver_steps=solver_steps, oversampling=oversampling,
        tol=tol, warm_start=warm_start, generator=generator,
    )  # fmt: skip
    k = min(k, *m.shape[-2:])
    return Triplets(block.U[..., :k], block.S[..., :k], block.Vh[..., :k, :])


def residuals(m: Tensor, triplets: Triplets) -> Tensor:
    """How far triplets are from being singular: the larger of |m^T u - s v| and |m v - s u| over s.

    Args:
        m: Matrices, (..., rows, cols), of ordinary scale.
        triplets: Of ``top_singular`` or ``lanczos``, n of each.

    Returns:
        (..., n); where s is 0, not divided.
    """
    u, s, vh = triplets
    m, s_columns = m.to(u.dtype), s.unsqueeze(-2)
    left = torch.linalg.vector_norm(m @ vh.mT - u * s_columns, dim=-2)
    right = torch.linalg.vector_norm(m.mT @ u - vh.mT * s_columns, dim=-2)
    return torch.maximum(left, right) / torch.where(s == 0, 1, s)


def check_solver(solver: str, steps: int | None = None, oversampling: int = OVERSAMPLING) -> None:
    """Reject a rank-k solver that does not exist, or steps and oversampling it cannot have.

    Raises:
        ValueError: With what is allowed.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver {solver!r} is none of {', '.join(get_args(Solver))}")
    if steps is not None:
        if solver not in _STEPS:
            raise ValueError(
                f"solver {solver!r} takes no steps, got {steps}: leave them out, or choose one of "
                f"{', '.join(_STEPS)}"
            )
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"solver_steps must be a whole number of at least 1, got {steps!r}")
    if not isinstance(oversampling, int) or isinstance(oversampling, bool) or oversampling < 0:
        raise ValueError(f"oversampling must be a whole number of at least 0, got {oversampling!r}")


def _leading_block(
    m: Tensor,
    k: int,
    *,
    solver: str,
    solver_steps: int | None,
    oversampling: int,
    tol: float,
    warm_start: Tensor | None,
    generator: torch.Generator | None,
) -> Triplets:
    """``top_singular`` with what a block solver knows beyond k, for the next warm start."""
    check_solver(solver, solver_steps, oversampling)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    *batch, rows, cols = m.shape
    k = min(k, rows, cols)
    cold = warm_start is None or solver in ("randomized", "power")
    if solver == "auto":
        solver = _choose_solver(m, k, warm=not cold)
    elif solver == "cupy" and k + BEYOND > min(rows, cols):
        solver = "exact"
    x = m.reshape(-1, rows, cols)
    if solver in ("exact", "cupy"):
        x, norm = unit_frobenius(x)
        broken = torch.where(norm.isnan(), torch.nan, 0.0)
        x = x.masked_fill_(norm.isnan(), 0.0)
    elif x.dtype != torch.float64:
        x = x.float()
    if solver == "exact":
        u, s, vh = (t.to(x) for t in torch.linalg.svd(wide(x), full_matrices=False))
    elif solver == "cupy":
        u, s, vh = cupy_svds(x, k, tol=tol, generator=generator)
    else:
        steps = solver_steps or _STEPS[solver][not cold]
        if cold:
            special = {"lanczos": block_width(k, min(rows, cols)) - k, "power": 0}
            start = start_block(
                x.shape, k, device=x.device, generator=generator,
                oversampling=special.get(solver, oversampling),
            )  # fmt: skip
        else:
            assert warm_start is not None
            if not k <= warm_start.shape[-1] <= min(rows, cols):
                raise ValueError(
                    f"a warm start of {warm_start.shape[-1]} columns for rank {k} of a "
                    f"{rows} x {cols} matrix: have between {k} and {min(rows, cols)} of them"
                )
            start = warm_start.reshape(-1, cols, warm_start.shape[-1])
        start = start.to(x.dtype)
        if solver == "lanczos":
            fast = fast_dtype(x.device, x.dtype)
            coarse = fast if fast != x.dtype and min(rows, cols) >= _COARSE_SIZE else None
            u, s, vh, *_ = lanczos(x, k, start, tol=tol, cycles=steps, coarse=coarse)
        else:
            u, s, vh = subspace(x, start, iterations=steps)
    if solver in ("exact", "cupy"):
        u, s, vh = u + broken, s * norm[..., 0] + broken[..., 0], vh + broken
    return Triplets(*(t.reshape(*batch, *t.shape[1:]) for t in (u, s, vh)))


def _choose_solver(m: Tensor, k: int, *, warm: bool) -> str:
    limit = min(m.shape[-2:])
    large_part = not warm and k * _EXACT_PART > limit
    if m.device.type == "cpu" and (limit <= _EXACT_SIZE[warm] or large_part):
        return "exact"
    return "subspace" if warm else "lanczos"


def rules() -> list[tuple[str, str]]:
    """What "auto" chooses, in order: (condition, choice) of solvers, then of polar methods."""
    return [
        (f"rank k on a CPU, min(rows, cols) <= {_EXACT_SIZE[True]}", "solver exact"),
        (
            f"rank k on a CPU, cold, min(rows, cols) <= {_EXACT_SIZE[False]} or < {_EXACT_PART} k",
            "solver exact",
        ),
        ("rank k, warm start", f"solver subspace, {_STEPS['subspace'][1]} iteration"),
        ("rank k, cold", "solver lanczos"),
        (
            f"the same, min(rows, cols) >= {_COARSE_SIZE}, with bfloat16 hardware",
            "searched in bfloat16, improved in float32",
        ),
        ("full rank", f"polar {AUTO}, {len(coefficients('auto'))} steps"),
        (
            f"the same in float32 or float64, one side at least {GRAM_ASPECT:g} times the other",
            "its Gram form",
        ),
    ]


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
    return d.unflatten(-1, m.shape[-2:]) + largest_entry(m) * 0  # NaN stays NaN


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
    solver_steps: int | None = None,
    oversampling: int = OVERSAMPLING,
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The direction of steepest descent D(m) = argmax {<m, d> : |d| <= 1} of the family.

    ``rank=None`` is Muon, ``rank=1`` Neon, ``rank=k`` a k-Fanion; ``alpha < 1`` blends it with
    normalised SGD (F-) or sign descent (S-); ``alpha=0`` leaves only these.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype; for rank k of entries from
            1e-30 to 1e30, else of any scale. Leading dimensions are a
            batch of separate matrices.
        rank: Rank k of the direction; None, or at least min(rows, cols), is full.
        alpha: Weight of the low-rank or orthogonal part. Any finite number.
        blend: What gets the weight 1 - alpha: frobenius (m / |m|_F) | sign (sign_scale * sign(m)).
        sign_scale: Size of the sign part's entries.
        ball: fanion | kyfan (the Ky Fan ball of k = rank) | coordinate.
        polar: Full-rank method, see ``polar``.
        polar_steps: Its steps; None is the method's own number.
        solver: Rank-k solver, see ``top_singular``.
        solver_steps: Its steps.
        oversampling: Its columns beyond k.
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
    check_polar(polar, polar_steps)
    d, _ = solve(
        m.detach(), rank=rank, alpha=alpha, blend=blend, sign_scale=sign_scale, ball=ball,
        polar_method=polar, polar_steps=polar_steps, solver=solver, solver_steps=solver_steps,
        oversampling=oversampling, tol=tol, warm_start=warm_start, generator=generator,
    )  # fmt: skip
    return d.to(m.dtype)


def solve(
    m: Tensor,
    *,
    rank: int | None,
    alpha: float = 1.0,
    blend: str = "frobenius",
    sign_scale: float = 1.0,
    ball: str = "fanion",
    polar_method: str = "auto",
    polar_steps: int | None = None,
    solver: str = "auto",
    solver_steps: int | None = None,
    oversampling: int = OVERSAMPLING,
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
    unit: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Triplets | None]:
    """``direction`` without its checks and casts, for the optimizer.

    Its arguments are those of ``direction``. ``unit`` says that the matrices have Frobenius norm 1
    and ``polar_dtype`` already, ``overwrite`` that their memory may be used.

    Returns:
        The direction, in the dtype it was computed in, and the triplets that a rank-k solver
        found. They may be more than rank: their Vh.mT is the next warm start.
    """
    limit = min(m.shape[-2:])
    full = ball == "fanion" and (rank is None or rank >= limit)
    d: Tensor | None = None
    triplets: Triplets | None = None
    if alpha and ball == "coordinate":
        d = coordinate(m)
    elif alpha and not full:
        k = 1 if ball == "kyfan" else rank
        assert k is not None
        triplets = _leading_block(
            m, k, solver=solver, solver_steps=solver_steps, oversampling=oversampling, tol=tol,
            warm_start=warm_start, generator=generator,
        )  # fmt: skip
        if ball == "fanion":
            d = _rank_k(triplets, k)
    if d is not None and alpha == 1:
        return d, triplets
    orthogonal = bool(alpha) and d is None
    x, norm = m, None
    if not unit:
        dtype = polar_dtype(m, polar_method) if orthogonal else None
        if dtype is not None and ball == "kyfan":
            dtype = torch.promote_types(m.dtype, dtype)  # it is needed again after the products
        x, norm = unit_frobenius(m, dtype=dtype, overwrite=overwrite)
    elif alpha != 1 and not overwrite:
        x = x.clone()
    if orthogonal and ball == "fanion":
        return unit_polar(
            x,
            polar_method,
            polar_steps,
            alpha=alpha,
            blend=blend,
            sign_scale=sign_scale,
            overwrite=overwrite or not unit,
        ), None
    if orthogonal:
        assert triplets is not None
        assert norm is not None
        k = limit if rank is None else rank
        y = x.to(polar_dtype(m, polar_method))
        full_rank = unit_polar(y, polar_method, polar_steps, overwrite=y is not x)
        del y
        d = _kyfan(full_rank, x, norm, triplets, k)
    if alpha == 1:
        assert d is not None
        return d, triplets
    if d is None and blend == "sign":
        broken = largest_entry(x) * 0  # torch.sign forgets NaN
        return blend_part(x, blend, sign_scale).add_(broken), triplets
    part = blend_part(x, blend, sign_scale)
    return part if d is None else part.lerp_(d.to(part.dtype), alpha), triplets


def _rank_k(block: Triplets, k: int) -> Tensor:
    """U_k V_k^T. Vectors of a zero singular value are arbitrary: D(0) = 0."""
    s = block.S[..., :k]
    u = block.U[..., :k] * ((s > noise(s, s.dtype)) | s.isnan()).unsqueeze(-2)
    return u @ block.Vh[..., :k, :]


def _kyfan(full: Tensor, x: Tensor, norm: Tensor, triplet: Triplets, k: int) -> Tensor:
    """The oracle of the Ky Fan k-ball: u_1 v_1^T if s_1 >= |m|_* / k, else U V^T / k."""
    product = full.to(x, copy=True).mul_(x)
    nuclear = product.sum((-2, -1), keepdim=True, dtype=norm.dtype) * norm
    del product
    concentrated = (triplet.S[..., :1, None] >= nuclear / k) & (norm > 0)
    # In the memory of the polar factor; one of the two weights is 0, and NaN stays NaN.
    full.div_(k).mul_((~concentrated).to(full))
    left = triplet.U[..., :1] * concentrated
    return full.addcmul_(left.to(full), triplet.Vh[..., :1, :].to(full))

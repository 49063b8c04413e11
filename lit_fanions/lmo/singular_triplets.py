"""Rank k: the leading singular triplets of matrices, by a solver of the table ``SOLVERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from lit_fanions.checks import check_choice, real_number, whole_number
from lit_fanions.lmo.block_power import subspace
from lit_fanions.lmo.cupy_svds import BEYOND, svds
from lit_fanions.lmo.factorisations import wide
from lit_fanions.lmo.krylov import block_width, lanczos
from lit_fanions.lmo.newton_schulz import AUTO, GRAM_ASPECT, coefficients, fast_dtype
from lit_fanions.lmo.problems import OVERSAMPLING, Settings, Triplets
from lit_fanions.lmo.scaling import check_matrices, unit_frobenius

# From this size on Lanczos does its search in bfloat16 where that is fast.
_COARSE_SIZE = 2048
# On a CPU auto takes the SVD up to these sizes (cold, warm), and cold also if k > size / 4.
_EXACT_SIZE = (192, 32)
_EXACT_PART = 4
# Block iterations that turn a random block towards the leading singular vectors.
_WARMING = 8


class _Task(NamedTuple):
    """What a solver is asked for.

    Attributes:
        k: Number of triplets.
        start: Start block, (batch, cols, width); None for solvers that take none.
        cold: Whether the start is random.
        steps: Block iterations, or restarts at most.
        tol: Residual to stop at.
        generator: CPU generator of random starts.
    """

    k: int
    start: Tensor | None
    cold: bool
    steps: int
    tol: float
    generator: torch.Generator | None


@dataclass(frozen=True)
class SolverEntry:
    """A rank-k solver.

    Attributes:
        solve: Maps matrices (batch, rows, cols) and a task to U, S and Vh.
        steps: Default steps from a cold and from a warm start; None if it takes none.
        width: Maps k, min(rows, cols) and the oversampling to the columns of a cold start; None
            if it takes no start.
        warm: Whether it can start from the singular vectors of a similar matrix.
        unit: Whether it takes finite matrices of Frobenius norm 1 alone.
    """

    solve: Callable[[Tensor, _Task], tuple[Tensor, Tensor, Tensor]]
    steps: tuple[int, int] | None = None
    width: Callable[[int, int, int], int] | None = None
    warm: bool = False
    unit: bool = False


def _solve_exactly(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = (t.to(x) for t in torch.linalg.svd(wide(x), full_matrices=False))
    return u, s, vh


def _solve_by_cupy(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    if task.k + BEYOND > min(x.shape[-2:]):
        return _solve_exactly(x, task)
    return svds(x, task.k, tol=task.tol, generator=task.generator)


def _solve_by_lanczos(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    assert task.start is not None
    fast = fast_dtype(x.device, x.dtype)
    coarse = fast if fast != x.dtype and min(x.shape[-2:]) >= _COARSE_SIZE else None
    found = lanczos(
        x, task.k, task.start, tol=task.tol, cycles=task.steps, coarse=coarse,
        random_start=task.cold,
    )  # fmt: skip
    return found.U, found.S, found.Vh


def _solve_by_power(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    assert task.start is not None
    return subspace(x, task.start, iterations=task.steps)


def _oversampled(k: int, limit: int, oversampling: int) -> int:
    return min(k + oversampling, limit)


SOLVERS: dict[str, SolverEntry] = {
    "lanczos": SolverEntry(
        _solve_by_lanczos,
        (50, 50),
        lambda k, limit, oversampling: block_width(k, limit),
        warm=True,
    ),
    "subspace": SolverEntry(_solve_by_power, (8, 1), _oversampled, warm=True),
    "randomized": SolverEntry(_solve_by_power, (8, 8), _oversampled),
    "power": SolverEntry(_solve_by_power, (64, 64), lambda k, limit, oversampling: k),
    "exact": SolverEntry(_solve_exactly, unit=True),
    "cupy": SolverEntry(_solve_by_cupy, unit=True),
}
SOLVER_NAMES = ("auto", *SOLVERS)
if TYPE_CHECKING:
    Solver = str
else:
    Solver = Literal[SOLVER_NAMES]


def check_solver(solver: str, steps: int | None = None, oversampling: int = OVERSAMPLING) -> None:
    """Refuse a rank-k solver that does not exist, and steps or oversampling it cannot have.

    Raises:
        ValueError: With what is allowed.
    """
    check_choice("solver", solver, SOLVER_NAMES)
    if steps is not None:
        stepping = [name for name, entry in SOLVERS.items() if entry.steps]
        if solver not in stepping:
            raise ValueError(
                f"solver {solver!r} takes no solver_steps, got {steps}: leave them out, or choose "
                f"one of {', '.join(stepping)}"
            )
        whole_number("solver_steps", steps)
    whole_number("oversampling", oversampling, 0)


def keeps_basis(solver: str) -> bool:
    """Return whether a solver starts from the basis of an earlier answer."""
    return solver == "auto" or SOLVERS[solver].warm


def start_block(
    shape: tuple[int, ...],
    k: int,
    *,
    device: torch.device,
    oversampling: int = OVERSAMPLING,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a random orthonormal start for the rank-k solvers.

    Args:
        shape: Shape of the matrices, (..., rows, cols).
        k: Rank wanted.
        device: Device of the block. It is drawn on the CPU, so that every device gets the same.
        oversampling: Columns beyond k.
        generator: A CPU generator; None is a fresh one of seed 0.

    Returns:
        (..., cols, width) in float32, width = min(k + oversampling, rows, cols).
    """
    *batch, rows, cols = shape
    width = min(k + oversampling, rows, cols)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    block = torch.randn(*batch, cols, width, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(block).Q.to(device)


def warmed(m: Tensor, block: Tensor) -> Tensor:
    """Return a start block turned towards the leading right singular vectors of a matrix.

    Args:
        m: Matrices, (..., rows, cols).
        block: ``start_block`` for them, (..., cols, width).

    Returns:
        The same shape as block; where m is zero or not finite, the block as it is.
    """
    x, norm = unit_frobenius(m)
    usable = (norm > 0) & norm.isfinite()
    x = torch.where(usable, x, 0.0)
    _, _, vh = subspace(x, block.to(x.dtype), iterations=_WARMING)
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
    """Return the k leading singular triplets of each matrix.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype, with entries from 1e-30 to 1e30.
            Computed in float32, or in float64 for float64.
        k: Number of triplets; clamped to min(rows, cols).
        solver: ``lanczos``: thick-restart block Lanczos, to the tolerance. ``subspace``: block
            power iterations, from the warm start where there is one. ``randomized``: the same,
            always cold. ``power``: the same without oversampling. ``exact``: SVD in float64.
            ``cupy``: CuPy's Lanczos, to the tolerance. ``auto``: by the list of ``rules``.
        solver_steps: Block iterations, or restarts of Lanczos at most. None: subspace 8 from a
            cold start and 1 from a warm one, randomized 8, power 64, lanczos 50.
        oversampling: Columns beyond k of a block that starts cold.
        tol: Residual |m^T u - s v| relative to s at which Lanczos stops, at least 0.
        warm_start: Right singular vectors of a matrix close to m, (..., cols, width): the Vh.mT
            of an earlier answer, or ``start_block``.
        generator: CPU generator of the random starts; None is a fresh one of seed 0, so that
            equal calls give equal answers.

    Returns:
        U (..., rows, k), S (..., k) descending, Vh (..., k, cols), in the dtype of computation.
        Where S is 0 the vectors are arbitrary but orthonormal; for a matrix with a NaN or an
        infinity everything is NaN.

    Raises:
        ValueError: If m is no batch of float matrices, or an option is not possible.
        RuntimeError: If the solver is cupy and there is no CUDA or no CuPy.
    """
    check_matrices(m)
    check_solver(solver, solver_steps, oversampling)
    settings = Settings(
        solver=solver,
        solver_steps=solver_steps,
        oversampling=oversampling,
        tol=real_number("tol", tol, 0.0),
    )
    k = min(whole_number("k", k), *m.shape[-2:])
    block = leading_triplets(m.detach(), k, settings, warm_start, generator)
    return Triplets(block.U[..., :k], block.S[..., :k], block.Vh[..., :k, :])


def leading_triplets(
    m: Tensor,
    k: int,
    settings: Settings,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Triplets:
    """Return the k leading triplets, and what a block solver found beyond them.

    The columns beyond k are less accurate; their Vh.mT belongs to the next warm start.

    Args:
        m: Matrices, (..., rows, cols).
        k: Number of triplets, at most min(rows, cols).
        settings: The solver and its options.
        warm_start: Right singular vectors, (..., cols, width).
        generator: CPU generator of the random starts.

    Raises:
        ValueError: If the warm start does not fit.
    """
    *batch, rows, cols = m.shape
    name = settings.solver
    if name == "auto":
        name = _choose_solver(m, k, warm=warm_start is not None)
    entry = SOLVERS[name]
    cold = warm_start is None or not entry.warm
    x = m.reshape(-1, rows, cols)
    norm = broken = None
    if entry.unit:
        x, norm = unit_frobenius(x)
        broken = torch.where(norm.isnan(), torch.nan, 0.0)
        x = x.masked_fill_(norm.isnan(), 0.0)
    elif x.dtype != torch.float64:
        x = x.float()
    start = None
    if entry.width is not None:
        if cold:
            width = entry.width(k, min(rows, cols), settings.oversampling)
            start = start_block(
                x.shape, width, device=x.device, oversampling=0, generator=generator
            )
        else:
            assert warm_start is not None
            start = _checked_start(warm_start, k, rows, cols)
        start = start.to(x.dtype)
    steps = settings.solver_steps or (entry.steps[not cold] if entry.steps else 0)
    u, s, vh = entry.solve(x, _Task(k, start, cold, steps, settings.tol, generator))
    if norm is not None and broken is not None:
        u, s, vh = u + broken, s * norm[..., 0] + broken[..., 0], vh + broken
    return Triplets(*(t.reshape(*batch, *t.shape[1:]) for t in (u, s, vh)))


def _checked_start(warm_start: Tensor, k: int, rows: int, cols: int) -> Tensor:
    width = warm_start.shape[-1]
    if warm_start.shape[-2] != cols or not k <= width <= min(rows, cols):
        raise ValueError(
            f"warm_start of shape {tuple(warm_start.shape)} for rank {k} of {rows} x {cols} "
            f"matrices: it must be (..., {cols}, width) with {k} <= width <= {min(rows, cols)}"
        )
    return warm_start.reshape(-1, cols, width)


def _choose_solver(m: Tensor, k: int, *, warm: bool) -> str:
    limit = min(m.shape[-2:])
    large_part = not warm and k * _EXACT_PART > limit
    if m.device.type == "cpu" and (limit <= _EXACT_SIZE[warm] or large_part):
        return "exact"
    return "subspace" if warm else "lanczos"


def rules() -> list[tuple[str, str]]:
    """Return what "auto" chooses, in order: (condition, choice) of solvers, then of methods."""
    subspace_steps = SOLVERS["subspace"].steps
    assert subspace_steps is not None
    warm, cold = _EXACT_SIZE[True], _EXACT_SIZE[False]
    return [
        (f"rank k on a CPU, min(rows, cols) <= {warm}", "solver exact"),
        (
            f"rank k on a CPU, cold, min(rows, cols) <= {cold} or < {_EXACT_PART} k",
            "solver exact",
        ),
        ("rank k, warm start", f"solver subspace, {subspace_steps[1]} iteration"),
        ("rank k, cold", "solver lanczos"),
        (
            f"the same, min(rows, cols) >= {_COARSE_SIZE}, with bfloat16 hardware",
            "searched in bfloat16, improved in float32",
        ),
        ("full rank", f"polar {AUTO}, {len(coefficients(AUTO))} steps"),
        (
            f"the same in float32 or float64, one side at least {GRAM_ASPECT:g} times the other",
            "its Gram form",
        ),
    ]

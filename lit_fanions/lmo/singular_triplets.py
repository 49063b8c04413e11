"""Rank k: the leading singular triplets of matrices, by a solver of the table ``SOLVERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.checks import check_choice, real_number, whole_number
from lit_fanions.lmo.block_power import polar_block, start_block, subspace
from lit_fanions.lmo.convergence import Goal
from lit_fanions.lmo.cupy_svds import BEYOND, svds
from lit_fanions.lmo.factorisations import wide
from lit_fanions.lmo.krylov import Lanczos, block_width, lanczos
from lit_fanions.lmo.newton_schulz import GRAM_ASPECT, fast_dtype
from lit_fanions.lmo.presets import AUTO, coefficients
from lit_fanions.lmo.problems import OVERSAMPLING, Settings, Triplets
from lit_fanions.lmo.scaling import has_plain_norm, unit_frobenius

# From this size on Lanczos does its search in bfloat16 where that is fast.
_COARSE_SIZE = 2048
# On a CPU auto takes the SVD up to these sizes (cold, warm), and cold also if k > size / 4.
_EXACT_SIZE = (192, 32)
_EXACT_PART = 4


class _Task(NamedTuple):
    """What a solver is asked for: k triplets, from a block (batch, cols, width) if it starts so.

    ``cold``: whether the block is random; ``steps``: block iterations, or most restarts.
    """

    k: int
    start: Tensor
    cold: bool
    steps: int
    goal: Goal
    generator: torch.Generator | None


@dataclass(frozen=True)
class SolverEntry:
    """A rank-k solver."""

    # Maps matrices (batch, rows, cols) and a task to U, S and Vh.
    solve: Callable[[Tensor, _Task], tuple[Tensor, Tensor, Tensor] | Lanczos]
    # Default steps from a cold and from a warm start; None if it takes none.
    steps: tuple[int, int] | None = None
    # Maps k, min(rows, cols) and the oversampling to the columns of a cold start; None if it takes
    # no start.
    width: Callable[[int, int, int], int] | None = None
    warm: bool = False  # whether it can start from the singular vectors of a similar matrix
    unit: bool = False  # whether it takes finite matrices of Frobenius norm 1 alone
    # Whether U and Vh are singular vectors. Otherwise their product alone is U_k V_k^T, and a block
    # must not be wider than k.
    triplets: bool = True
    by_products: bool = False  # whether a warm start takes nothing but ``block_iteration``


def _solve_exactly(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = (t.to(x) for t in torch.linalg.svd(wide(x), full_matrices=False))
    return u, s, vh


def _solve_by_cupy(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    if task.k + BEYOND > min(x.shape[-2:]):
        return _solve_exactly(x, task)
    return svds(x, task.k, goal=task.goal, generator=task.generator)


def _solve_by_lanczos(x: Tensor, task: _Task) -> Lanczos:
    fast = fast_dtype(x.device, x.dtype)
    coarse = fast if fast != x.dtype and min(x.shape[-2:]) >= _COARSE_SIZE else None
    return lanczos(
        x, task.k, task.start, goal=task.goal, cycles=task.steps, coarse=coarse,
        random_start=task.cold,
    )  # fmt: skip


def _solve_by_power(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    return subspace(x, task.start, iterations=task.steps)


def _solve_by_polar(x: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
    return polar_block(x, task.start[..., : task.k], iterations=task.steps)


def _oversampled(k: int, limit: int, oversampling: int) -> int:
    return min(k + oversampling, limit)


SOLVERS: dict[str, SolverEntry] = {
    "lanczos": SolverEntry(
        _solve_by_lanczos, (50, 50), lambda k, limit, oversampling: block_width(k, limit), warm=True
    ),
    "subspace": SolverEntry(_solve_by_power, (8, 1), _oversampled, warm=True, by_products=True),
    "randomized": SolverEntry(_solve_by_power, (8, 8), _oversampled),
    "power": SolverEntry(_solve_by_power, (64, 64), lambda k, limit, oversampling: k),
    "polar": SolverEntry(
        _solve_by_polar, (8, 1), lambda k, limit, oversampling: k, warm=True, triplets=False
    ),
    "exact": SolverEntry(_solve_exactly, unit=True),
    "cupy": SolverEntry(_solve_by_cupy, unit=True),
}
SOLVER_NAMES = ("auto", *SOLVERS)
if TYPE_CHECKING:
    Solver = str
else:
    Solver = Literal[SOLVER_NAMES]


def check_solver(solver: str, steps: int | None = None, oversampling: int = OVERSAMPLING) -> None:
    """Refuse a rank-k solver that does not exist, and steps or oversampling it cannot have."""
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


def basis_columns(k: int, limit: int, settings: Settings) -> int | None:
    """Return the columns of the basis that the solver starts from; None if it keeps no basis."""
    entry = None if settings.solver == "auto" else SOLVERS[settings.solver]
    if entry is not None and not entry.warm:
        return None
    beyond = settings.oversampling if entry is None or entry.triplets else 0
    return min(k + beyond, limit)


def top_singular(
    m: Tensor,
    k: int,
    *,
    solver: Solver = "lanczos",
    solver_steps: int | None = None,
    oversampling: int = OVERSAMPLING,
    tol: float = 1e-2,
    residual_tol: float | None = None,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Triplets:
    """Return the k leading singular triplets of each matrix.

    Args:
        m: Matrices, (..., rows, cols), of any float dtype; from a warm start, or on a GPU, with
            entries from 1e-30 to 1e30. Computed in float32, or in float64 for float64.
        k: Number of triplets; clamped to min(rows, cols).
        solver: ``lanczos``: thick-restart block Lanczos, to the tolerance. ``subspace``: block
            power iterations, from the warm start where there is one. ``randomized``: the same,
            always cold. ``power``: the same without oversampling. ``exact``: SVD in float64.
            ``cupy``: CuPy's Lanczos, to the tolerance. ``auto``: by the list of ``rules``. Not
            ``polar``, which finds directions alone.
        solver_steps: Block iterations, or restarts of Lanczos at most. None: subspace 8 from a
            cold start and 1 from a warm one, randomized 8, power 64, lanczos 50.
        oversampling: Columns beyond k of a block that starts cold.
        tol: Relative Frobenius error of U_k V_k^T, |U_k V_k^T - exact| / sqrt(k), at which lanczos
            and cupy stop, at least 0. It is estimated (``Search.error``). Where s_k = s_(k+1),
            U_k V_k^T is not determined: see ``Search.determined``.
        residual_tol: Stop instead when every |m^T u - s v| <= residual_tol * s. The optimizer does
            so: it needs ``<m, U_k V_k^T>`` alone, which is then accurate to residual_tol.
        warm_start: Right singular vectors of a matrix close to m, (..., cols, width): the Vh.mT
            of an earlier answer, or ``start_block``.
        generator: CPU generator of the random starts; None is a fresh one of seed 0, so that
            equal calls give equal answers.

    Returns:
        U (..., rows, k), S (..., k) descending, Vh (..., k, cols), in the dtype of computation.
        Where S is 0 the vectors are arbitrary but orthonormal; for a matrix with a NaN or an
        infinity everything is NaN. S is at most the largest number of its dtype.

    Raises:
        ValueError: If m is no batch of float matrices, or an option is not possible.
        RuntimeError: If the solver is cupy and there is no CUDA or no CuPy.
    """
    norms.check_matrices(m, "floating-point")
    check_solver(solver, solver_steps, oversampling)
    if solver in SOLVERS and not SOLVERS[solver].triplets:
        raise ValueError(f"solver {solver!r} finds directions, no triplets: choose another one")
    settings = Settings(
        solver=solver,
        solver_steps=solver_steps,
        oversampling=oversampling,
        **_tolerances(tol, residual_tol),
    )
    k = min(whole_number("k", k), *m.shape[-2:])
    block = leading_triplets(m.detach(), k, settings, warm_start, generator)
    return Triplets(block.U[..., :k], block.S[..., :k], block.Vh[..., :k, :])


def _tolerances(tol: float | None, residual_tol: float | None) -> dict[str, Any]:
    """Return the checked tolerances as ``Settings`` has them."""
    if residual_tol is not None:
        return {"residual_tol": real_number("residual_tol", residual_tol, 0.0)}
    return {} if tol is None else {"tol": real_number("tol", tol, 0.0)}


class Search(NamedTuple):
    """What a search for the leading singular triplets found, and how accurate it is.

    Attributes:
        triplets: U (..., rows, k), S (..., k), Vh (..., k, cols).
        error: Estimate of |U_k V_k^T - exact| / sqrt(k), (...): between the bound from the
            residuals and the gap of the singular values at the cut, and the same with the mean of
            the remaining singular values in place of the next one. It was .8 to 6 times the error.
        determined: Whether the error is within the tolerance, (...). Where it is not, s_k and
            s_(k+1) are copies of one singular value, or the search ended at its limits; then the
            residuals alone bound ``<m, U_k V_k^T>``, which is within max(residuals) of the Ky Fan
            norm relative to it.
        residuals: The larger of |m^T u - s v| and |m v - s u| over s, (..., k).
        products: Columns that m or m^T was multiplied by, summed over the batch.
    """

    triplets: Triplets
    error: Tensor
    determined: Tensor
    residuals: Tensor
    products: int


def lanczos_search(
    m: Tensor,
    k: int,
    *,
    tol: float = 1e-2,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Search:
    """Return ``top_singular`` by Lanczos with what is known of its accuracy and cost.

    Args:
        m: Matrices, (..., rows, cols), as in ``top_singular``.
        k: Number of triplets; clamped to min(rows, cols).
        tol: Relative Frobenius error of U_k V_k^T at which the search stops.
        warm_start: Start block, (..., cols, width).
        generator: CPU generator of the random start.

    Raises:
        ValueError: If m is no batch of float matrices, or an argument is not possible.
    """
    norms.check_matrices(m, "floating-point")
    settings = Settings(solver="lanczos", **_tolerances(tol, None))
    k = min(whole_number("k", k), *m.shape[-2:])
    x, norm, task = _task(m.detach(), k, "lanczos", settings, warm_start, generator)
    found, batch = _solve_by_lanczos(x, task), m.shape[:-2]
    u, s, vh = found.U[..., :k], found.S[..., :k], found.Vh[..., :k, :]
    s = s if norm is None else rescaled(s, norm)
    triplets = Triplets(*(t.reshape(*batch, *t.shape[1:]) for t in (u, s, vh)))
    error = found.error.reshape(batch)
    residuals = found.residuals.reshape(*batch, k)
    return Search(triplets, error, error <= tol, residuals, found.products)


def leading_triplets(
    m: Tensor,
    k: int,
    settings: Settings,
    warm_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Triplets:
    """Return the k leading triplets, and what a block solver found beyond them.

    The columns beyond k are less accurate; their Vh.mT belongs to the next warm start. Arguments
    are those of ``top_singular``, with k at most min(rows, cols).
    """
    name = settings.solver
    if name == "auto":
        name = choose_solver(min(m.shape[-2:]), k, m.device, warm=warm_start is not None)
    x, norm, task = _task(m, k, name, settings, warm_start, generator)
    if norm is None:
        u, s, vh = SOLVERS[name].solve(x, task)[:3]
    else:
        broken = norm.isnan()
        u, s, vh = SOLVERS[name].solve(x.masked_fill_(broken, 0.0), task)[:3]
        nan = torch.where(broken, torch.nan, 0.0).to(u)
        u, s, vh = u + nan, rescaled(s, norm) + nan[..., 0], vh + nan
    return Triplets(*(t.reshape(*m.shape[:-2], *t.shape[1:]) for t in (u, s, vh)))


def rescaled(s: Tensor, norm: Tensor) -> Tensor:
    """Return the singular values of matrices from those over their norms.

    Where the norm is beyond the range of the dtype they become its largest number.
    """
    return (s * norm[..., 0]).clamp_(max=torch.finfo(s.dtype).max).to(s.dtype)


def _task(
    m: Tensor,
    k: int,
    solver: str,
    settings: Settings,
    warm_start: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None, _Task]:
    """Return the matrices as one batch in the dtype of computation, and what to do with them.

    Some are divided by their norms, which then are the second result.
    """
    rows, cols = m.shape[-2:]
    entry = SOLVERS[solver]
    cold = warm_start is None or not entry.warm
    x = m.reshape(-1, rows, cols)
    x = x if x.dtype == torch.float64 else x.float()
    start = x.new_empty(0)
    if entry.width is not None:
        if warm_start is None or cold:
            width = entry.width(k, min(rows, cols), settings.oversampling)
            start = start_block(
                x.shape, width, device=x.device, oversampling=0, generator=generator
            )
        else:
            width = warm_start.shape[-1]
            if warm_start.shape[-2] != cols or not k <= width <= min(rows, cols):
                raise ValueError(
                    f"warm_start of shape {tuple(warm_start.shape)} for rank {k} of {rows} x "
                    f"{cols} matrices: it must be (..., {cols}, width) with {k} <= width <= "
                    f"{min(rows, cols)}"
                )
            start = warm_start.reshape(-1, cols, width)
        start = start.to(x.dtype)
    steps = settings.solver_steps or (entry.steps[not cold] if entry.steps else 0)
    residual = settings.residual_tol if settings.tol is None else settings.tol
    task = _Task(k, start, cold, steps, Goal(residual, settings.tol), generator)
    # One look at the norms is little beside a search from a cold start, and on a CPU no wait.
    if entry.unit or (cold and x.device.type == "cpu" and not has_plain_norm(x)):
        return *unit_frobenius(x), task
    return x, None, task


def choose_solver(limit: int, k: int, device: torch.device, *, warm: bool) -> str:
    """Return what "auto" chooses for rank k of matrices whose smaller side is ``limit``."""
    large_part = not warm and k * _EXACT_PART > limit
    if device.type == "cpu" and (limit <= _EXACT_SIZE[warm] or large_part):
        return "exact"
    return "subspace" if warm else "lanczos"


def rules() -> list[tuple[str, str]]:
    """Return what "auto" chooses, in order: (condition, choice) of solvers, then of methods."""
    subspace_steps = SOLVERS["subspace"].steps
    assert subspace_steps is not None
    warm, cold = _EXACT_SIZE[True], _EXACT_SIZE[False]
    return [
        (f"rank k on a CPU, min(rows, cols) <= {warm}", "solver exact"),
        (f"rank k on a CPU, cold, min(rows, cols) <= {cold} or < {_EXACT_PART} k", "solver exact"),
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

"""The table of balls: everything that anyone asks of a norm ball is asked of its entry here.

An oracle maps a ``Problem`` to an ``Answer``. A new ball is a class in ``lit_fanions.norms`` and a
row of ``BALLS`` (docs/extending.md has a worked example). Whatever is keyed by a ball's name looks
it up here; an unknown name raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_fanions import norms
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.costs import polar_flops, product_flops, triplets_flops
from lit_fanions.lmo.factorisations import wide
from lit_fanions.lmo.low_rank import (
    ProductsSolver,
    dion_step,
    dion_step_by_products,
    rank_k,
    rank_k_by_products,
)
from lit_fanions.lmo.newton_schulz import polar_dtype, unit_polar
from lit_fanions.lmo.powers import schatten_direction
from lit_fanions.lmo.problems import Answer, Case, Problem, Settings, Triplets
from lit_fanions.lmo.scaling import largest_entry, unit_frobenius
from lit_fanions.lmo.singular_triplets import basis_columns, leading_triplets
from lit_fanions.lmo.spectrum import Spectrum

# Options of the solvers for full rank and for rank k.
POLAR_OPTIONS = ("polar", "polar_steps")
SOLVER_OPTIONS = ("solver", "solver_steps", "oversampling")


@dataclass(frozen=True)
class Ball:
    """A norm ball. What depends on the matrices takes a ``Case``: a shape, a rank and settings.

    Attributes:
        summary: The ball in words, for tables.
        direction: The direction as a formula, for tables.
        oracle: Returns the direction of steepest descent. D(0) = 0; NaN for a matrix with a NaN or
            an infinity.
        norm: The exact counterpart in ``lit_fanions.norms``.
        dual: Maps a spectrum, the matrices and a case to the dual norm, (...): what ``<m, D>`` can
            reach in the unit ball.
        length: Frobenius norm of directions of matrices of full rank in the unit ball; None where
            it depends on the matrix.
        solved_rank: Rank that a solver is asked for; None: no solver.
        is_polar: Whether the direction is a polar factor: then matrices may come with Frobenius
            norm 1 in ``polar_dtype``, and a blend is fused into the last product.
        in_place: Direction computed in the memory of matrices of Frobenius norm 1; it may lose
            NaN. None: use the oracle.
        radius: Radius that multiplies the unit ball's direction.
        warms_up: Whether the basis of a first step is turned towards the gradient.
        oversamples: Whether its basis has more columns than the rank.
        any_shape: Whether it takes tensors that are no matrices.
        feedback: Whether a step of low rank leaves a part of the momentum for error feedback.
        reads: Options of a group that may change its direction (rank, p, ...). Groups where no ball
            reads an option refuse it.
        flops: Operations of the matrix products that an oracle call takes for one matrix.
        products_solver: Solver of the direction U_k V_k^T from a warm basis and products with the
            matrices on a device; None where the direction needs the matrices.
    """

    summary: str
    direction: str
    oracle: Callable[[Problem], Answer]
    norm: Callable[[Case], norms.Norm]
    dual: Callable[[Spectrum, Tensor, Case], Tensor]
    length: Callable[[Case], float | None] = lambda case: None
    solved_rank: Callable[[Case], int | None] = lambda case: None
    is_polar: Callable[[Case], bool] = lambda case: False
    in_place: Callable[[Tensor, Settings], Tensor] | None = None
    radius: Callable[[Settings], float] = lambda settings: 1.0
    warms_up: bool = True
    oversamples: bool = True
    any_shape: bool = False
    feedback: bool = False
    reads: tuple[str, ...] = ()
    flops: Callable[[Case], float] = lambda case: 0.0
    products_solver: Callable[[Case, torch.device], ProductsSolver | None] = lambda case, on: None

    def basis_columns(self, case: Case) -> int | None:
        """Return the columns of the basis that its solver starts from; None without a basis."""
        rank = self.solved_rank(case)
        if rank is None or not self.oversamples:
            return rank
        return basis_columns(rank, case.limit, case.settings)

    def options_read(self, case: Case) -> set[str]:
        """Return the options that change its direction in a case."""
        read = set(self.reads)
        if self.is_polar(case):
            read.update(POLAR_OPTIONS)
        if self.solved_rank(case) is None:
            read.difference_update(SOLVER_OPTIONS)
        return read

    def has_feedback(self, full: bool) -> bool:
        """Return whether a step of low or of full rank leaves a part for error feedback."""
        return self.feedback and not (full and self.is_polar(Case(2, 2, 2)))


# Oracles.


def spectral(problem: Problem) -> Answer:
    """Return U V^T, by Newton-Schulz or SVD."""
    x, overwrite = polar_input(problem)
    return Answer(polar_factor(x, problem.case.settings, overwrite=overwrite))


def polar_input(problem: Problem) -> tuple[Tensor, bool]:
    """Return the matrices as ``unit_polar`` takes them, and whether it may overwrite them."""
    if problem.unit:
        return problem.m, problem.overwrite
    dtype = polar_dtype(problem.m, problem.case.settings.polar)
    return unit_frobenius(problem.m, dtype=dtype, overwrite=problem.overwrite)[0], True


def polar_factor(x: Tensor, settings: Settings, **options: Any) -> Tensor:
    """Return ``unit_polar`` by the method of some settings."""
    return unit_polar(x, settings.polar, settings.polar_steps, kernels=settings.kernels, **options)


def fanion(problem: Problem) -> Answer:
    """Return U_k V_k^T."""
    k, limit = problem.case.k, problem.case.limit
    return spectral(problem) if k >= limit else rank_k(problem, k)


def nuclear(problem: Problem) -> Answer:
    """Return u_1 v_1^T."""
    return spectral(problem) if problem.case.limit == 1 else rank_k(problem, 1)


def kyfan(problem: Problem) -> Answer:
    """Return u_1 v_1^T where s_1 >= |m|_* / k, else U V^T / k."""
    settings = problem.case.settings
    dtype = polar_dtype(problem.m, settings.polar)
    triplets = leading_triplets(problem.m, 1, settings, problem.warm_start, problem.generator)
    # The matrices are read again after the products, in the precision in which they came.
    x, norm = problem.normalised(torch.promote_types(problem.m.dtype, dtype))
    y = x.to(dtype)
    full = polar_factor(y, settings, overwrite=y is not x)
    del y
    product = full.to(x, copy=True).mul_(x)
    sums = product.sum((-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    nuclear_norm = sums if norm is None else sums * norm
    del product
    largest = triplets.S[..., :1, None]
    concentrated = (largest >= nuclear_norm / problem.case.k) & (largest > 0)
    # Computed in the memory of the polar factor. One of the two weights is 0, and NaN stays NaN.
    full.div_(problem.case.k).mul_((~concentrated).to(full))
    left = triplets.U[..., :1] * concentrated
    return Answer(full.addcmul_(left.to(full), triplets.Vh[..., :1, :].to(full)), triplets)


def schatten(problem: Problem) -> Answer:
    """Return U (S / |S|_q)^(q - 1) V^T, 1/p + 1/q = 1."""
    settings = problem.case.settings
    if named := _named_schatten(problem.case):
        return named.oracle(problem)
    x = problem.normalised()[0]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    broken = largest_entry(x) * 0
    x = x.masked_fill(broken.isnan(), 0.0)
    d = schatten_direction(x, settings.p, exact=settings.polar == "exact")
    return Answer(d + broken)


def spectral_unit(problem: Problem) -> Answer:
    """Return m / |m|_op, the longest multiple of m in the spectral ball."""
    settings = problem.case.settings
    x, norm = unit_frobenius(problem.m)
    u, s, vh = leading_triplets(x, 1, settings, problem.warm_start, problem.generator)
    largest = s[..., :1, None]
    return Answer(x / torch.where(largest == 0, 1.0, largest), Triplets(u, s * norm[..., 0], vh))


def frobenius(problem: Problem) -> Answer:
    """Return m / |m|_F."""
    return Answer(problem.normalised()[0])


def sign(problem: Problem) -> Answer:
    """Return the sign of every entry, times sign_scale."""
    x, _ = problem.normalised()
    broken = largest_entry(x) * 0  # torch.sign maps NaN to 0
    return Answer(sign_in_place(x, problem.case.settings).add_(broken))


def sign_in_place(x: Tensor, settings: Settings) -> Tensor:
    """Return sign_scale * sign(x) in the memory of x; NaN becomes 0."""
    x = x.sign_()
    return x if settings.sign_scale == 1 else x.mul_(settings.sign_scale)


def coordinate(problem: Problem) -> Answer:
    """Return the sign of the largest entry, the first if there are several, and 0 elsewhere."""
    flat = problem.m.flatten(-2)
    index = flat.abs().argmax(-1, keepdim=True)
    d = torch.zeros_like(flat).scatter_(-1, index, flat.gather(-1, index).sign())
    return Answer(d.unflatten(-1, problem.m.shape[-2:]) + largest_entry(problem.m) * 0)


def row(problem: Problem) -> Answer:
    """Return each row over its length; zero rows stay zero."""
    rows = unit_frobenius(problem.m.unsqueeze(-2))[0].squeeze(-2)
    broken = largest_entry(rows) * 0  # one broken row breaks its matrix
    return Answer(rows.add_(broken))


def column(problem: Problem) -> Answer:
    """Return each column over its length; zero columns stay zero."""
    problem = Problem(problem.m.mT, problem.case)
    return Answer(row(problem).direction.mT)


# Dual norms.


def _lengths(dim: int) -> Callable[[Spectrum, Tensor, Case], Tensor]:
    return lambda s, x, case: torch.linalg.vector_norm(x.to(s.frobenius), dim=dim).sum(-1)


def _named_schatten(case: Case) -> Ball | None:
    """Return the ball that the Schatten ball of some p is by another name."""
    name = {1.0: "nuclear", 2.0: "frobenius", math.inf: "spectral"}.get(case.settings.p)
    return BALLS[name] if name else None


def _schatten(s: Spectrum, x: Tensor, case: Case) -> Tensor:
    named, p = _named_schatten(case), case.settings.p
    return named.dual(s, x, case) if named else spectra.schatten(s, p / (p - 1))


def _ky_fan(s: Spectrum, x: Tensor, case: Case) -> Tensor:
    return spectra.nuclear(s) if case.k >= case.limit else spectra.ky_fan(s, case.k)


def _fanion_flops(k: int, case: Case) -> float:
    full = k >= case.limit
    return polar_flops(case) if full else triplets_flops(k, case) + product_flops(k, case)


BALLS: dict[str, Ball] = {
    "frobenius": Ball(
        "Frobenius", "M / ‖M‖_F",
        frobenius,
        norm=lambda case: norms.Frobenius(),
        dual=lambda s, x, case: s.frobenius,
        length=lambda case: 1.0,
        in_place=lambda x, settings: x,
        any_shape=True,
    ),
    "spectral": Ball(
        "spectral", "U Vᵀ",
        spectral,
        norm=lambda case: norms.Spectral(),
        dual=lambda s, x, case: spectra.nuclear(s),
        length=lambda case: math.sqrt(case.limit),
        is_polar=lambda case: True,
        flops=polar_flops,
        reads=POLAR_OPTIONS,
    ),
    "nuclear": Ball(
        "nuclear", "u₁ v₁ᵀ",
        nuclear,
        norm=lambda case: norms.Nuclear(),
        dual=lambda s, x, case: spectra.spectral(s),
        length=lambda case: 1.0,
        solved_rank=lambda case: 1 if case.limit > 1 else None,
        is_polar=lambda case: case.limit == 1,
        feedback=True,
        flops=lambda case: _fanion_flops(1, case),
        reads=SOLVER_OPTIONS,
        products_solver=lambda case, device: rank_k_by_products(1, case, device),
    ),
    "fanion": Ball(
        "dual of Ky Fan k", "U_k V_kᵀ",
        fanion,
        norm=lambda case: norms.KyFanDual(case.k),
        dual=_ky_fan,
        length=lambda case: math.sqrt(case.k),
        solved_rank=lambda case: case.k if case.k < case.limit else None,
        is_polar=lambda case: case.k >= case.limit,
        feedback=True,
        flops=lambda case: _fanion_flops(case.k, case),
        reads=("rank", *SOLVER_OPTIONS),
        products_solver=lambda case, device: rank_k_by_products(case.k, case, device),
    ),
    "kyfan": Ball(
        "Ky Fan k", "u₁ v₁ᵀ if σ₁ ≥ ‖M‖_* / k, else U Vᵀ / k",
        kyfan,
        norm=lambda case: norms.KyFan(case.k),
        dual=lambda s, x, case: torch.maximum(spectra.spectral(s), spectra.nuclear(s) / case.k),
        solved_rank=lambda case: 1,
        flops=lambda case: triplets_flops(1, case) + polar_flops(case),
        reads=("rank", *POLAR_OPTIONS, *SOLVER_OPTIONS),
    ),
    "schatten": Ball(
        "Schatten p", "U (Σ / ‖Σ‖_q)^(q−1) Vᵀ, 1/p + 1/q = 1",
        schatten,
        norm=lambda case: norms.Schatten(case.settings.p),
        dual=_schatten,
        length=lambda case: x.length(case) if (x := _named_schatten(case)) else None,
        solved_rank=lambda case: x.solved_rank(case) if (x := _named_schatten(case)) else None,
        is_polar=lambda case: case.settings.p == math.inf,
        reads=("p", "polar", *SOLVER_OPTIONS),
    ),
    "spectral_unit": Ball(
        "spectral, along M alone", "M / σ₁",
        spectral_unit,
        norm=lambda case: norms.Spectral(),
        dual=lambda s, x, case: s.frobenius**2 / spectra.spectral(s),
        solved_rank=lambda case: 1,
        reads=SOLVER_OPTIONS,
    ),
    "sign": Ball(
        "largest entry", "s sign(M)",
        sign,
        norm=lambda case: norms.MaxEntry(),
        dual=lambda s, x, case: wide(x).abs().sum((-2, -1)).to(s.frobenius),
        length=lambda case: math.sqrt(case.rows * case.cols),
        in_place=sign_in_place,
        radius=lambda settings: settings.sign_scale,
        any_shape=True,
        reads=("sign_scale",),
    ),
    "coordinate": Ball(
        "sum of entries", "sign of the largest entry, 0 elsewhere",
        coordinate,
        norm=lambda case: norms.SumEntry(),
        dual=lambda s, x, case: largest_entry(x)[..., 0, 0].to(s.frobenius),
        length=lambda case: 1.0,
        any_shape=True,
    ),
    "row": Ball(
        "largest row length", "each row over its length",
        row,
        norm=lambda case: norms.MaxRow(),
        dual=_lengths(-1),
        length=lambda case: math.sqrt(case.rows),
    ),
    "column": Ball(
        "largest column length", "each column over its length",
        column,
        norm=lambda case: norms.MaxColumn(),
        dual=_lengths(-2),
        length=lambda case: math.sqrt(case.cols),
    ),
    "dion": Ball(
        "dual of Ky Fan k, approximately", "P Qᵀ of one power iteration",
        dion_step,
        norm=lambda case: norms.KyFanDual(case.k),
        dual=_ky_fan,
        solved_rank=lambda case: case.k,
        warms_up=False,
        oversamples=False,
        feedback=True,
        flops=lambda case: 3 * product_flops(case.k, case),
        reads=("rank",),
        products_solver=lambda case, device: dion_step_by_products,
    ),
}  # fmt: skip

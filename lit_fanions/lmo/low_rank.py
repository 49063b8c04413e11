"""Directions U_k V_k^T of matrices, or of matrices of which only products are known.

A solver that starts warm needs products alone: each rank multiplies its own shard of a matrix, and
no rank needs the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_fanions.lmo.block_power import Products, block_iteration, dion, dion_by_products
from lit_fanions.lmo.factorisations import noise
from lit_fanions.lmo.problems import Answer, Case, Problem, Triplets
from lit_fanions.lmo.scaling import unit_frobenius
from lit_fanions.lmo.singular_triplets import SOLVERS, choose_solver, leading_triplets

# Maps products with matrices and a warm basis, (batch, cols, width), to triplets whose first k make
# the direction.
ProductsSolver = Callable[[Products, Tensor], Triplets]


def rank_k(problem: Problem, k: int) -> Answer:
    """Return U_k V_k^T, zero for a zero matrix."""
    triplets = leading_triplets(
        problem.m, k, problem.case.settings, problem.warm_start, problem.generator
    )
    return Answer(_without_noise(triplets, k) @ triplets.Vh[..., :k, :], triplets)


def _without_noise(triplets: Triplets, k: int) -> Tensor:
    """Return U_k, zero where the singular value is: the vectors are arbitrary, and D(0) = 0."""
    s = triplets.S[..., :k]
    return triplets.U[..., :k] * ((s > noise(s, s.dtype)) | s.isnan()).unsqueeze(-2)


def rank_k_by_products(k: int, case: Case, device: torch.device) -> ProductsSolver | None:
    """Return the solver of ``rank_k`` for products; None if the chosen solver needs matrices."""
    settings, name = case.settings, case.settings.solver
    if name == "auto":
        name = choose_solver(case.limit, k, device, warm=True)
    entry = SOLVERS[name]
    if k >= case.limit or not entry.by_products or entry.steps is None:
        return None
    steps = settings.solver_steps or entry.steps[True]

    def solve(products: Products, basis: Tensor) -> Triplets:
        u, s, vh = block_iteration(products, basis.mT, steps)
        triplets = Triplets(u.mT, s, vh)
        return triplets._replace(U=_without_noise(triplets, k))

    return solve


def dion_step(problem: Problem) -> Answer:
    """Return P Q^T of one power iteration (Dion, arXiv 2504.05295, algorithm 1).

    The triplets are P, the lengths of the columns of R = m^T P, and Q, R with unit columns; Q is
    not orthonormal.
    """
    assert problem.warm_start is not None
    x, norm = unit_frobenius(problem.m)
    p, r, q = dion(x, problem.warm_start[..., : problem.case.k].to(x.dtype))
    lengths = torch.linalg.vector_norm(r, dim=-2) * norm[..., 0]
    return Answer(p @ q.mT, Triplets(p, lengths, q.mT))


def dion_step_by_products(products: Products, basis: Tensor) -> Triplets:
    """Return the triplets of ``dion_step``."""
    p, r, q = dion_by_products(products, basis)
    return Triplets(p, torch.linalg.vector_norm(r, dim=-2), q.mT)

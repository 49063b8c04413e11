"""The step of matrices in strips whose directions are found by products with the strips.

The formula is that of ``update``. Each rank forms its strip of the direction U_k V_k^T, so that no
rank ever has a whole matrix. Bases are whole and equal on all ranks, as with any other placement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_fanions.lmo.singular_triplets import rescaled
from lit_fanions.optim.adapting import moment_key
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.bases import State, basis_key, next_basis
from lit_fanions.optim.matrix_step import store_stepped
from lit_fanions.optim.sharded_products import Strips, products_with
from lit_fanions.optim.stacking import in_batches, stack_entries
from lit_fanions.optim.update import Group, Piece, apply, size_factor, update_momentum

_BASIS = basis_key(0)


def has_products_state(p: Tensor, state: State, group: Group) -> bool:
    """Return whether the state has what a step by products needs.

    After options have changed its basis may be missing or too narrow: an owner then makes one.
    """
    basis, columns = state.get(_BASIS), oracle(group, *p.shape).basis_columns
    if basis is None or columns is None or state["momentum"].dtype == torch.float64:
        return False
    return basis.shape[:-1] == (1, p.shape[-1]) and basis.shape[-1] >= columns


def step_by_products(
    group: Group,
    states: Mapping[Tensor, State],
    finite: Mapping[Tensor, Tensor],
    strips: Mapping[Tensor, Strips],
) -> None:
    """Step parameters of a group that lie on the ranks in strips; see ``step_matrices``."""
    for stack in in_batches(
        strips,
        lambda p: (p.shape, p.dtype, states[p]["momentum"].dtype, p.device, strips[p]),
        lambda p, n: n * p.numel() <= stack_entries(group, p.device) * strips[p].team.size,
    ):
        pieces = [Piece.whole(p, states[p], finite[p]) for p in stack]
        _step_stack(pieces, strips[stack[0]], group)


def _step_stack(pieces: Sequence[Piece], strips: Strips, group: Group) -> None:
    solver = oracle(group, *pieces[0].parameter.shape)
    m = pieces[0].weight.new_empty(len(pieces), *pieces[0].weight.shape, dtype=torch.float32)
    for own, piece in zip(m, pieces, strict=True):
        own.copy_(update_momentum(piece, group))
        piece.state.pop(moment_key(0), None)  # would be stale where options have changed
    products = products_with(m, strips)
    basis = torch.cat([piece.state[_BASIS][..., : solver.basis_columns] for piece in pieces])
    solve = solver.products_solver(basis.device)
    assert solve is not None
    triplets = solve(products, basis.float())
    triplets = triplets._replace(S=rescaled(triplets.S, products.length))
    k = solver.ball.solved_rank(solver.case)
    u, vh = triplets.U[..., :k], triplets.Vh[..., :k, :]
    d = products.strip(u, vh)
    if len(solver.parts) > 1:
        assert solver.partner.in_place is not None
        d = solver.partner.in_place(products.m, solver.case.settings).lerp_(d, solver.alpha)
    factor = size_factor(d, solver, group, products.norm)
    d = d if isinstance(factor, float) and factor == 1 else d.mul_(factor)
    captured: Sequence[Tensor | None] = [None] * len(pieces)
    if group["error_feedback"]:
        captured = products.strip(u * triplets.S[..., None, :k], vh).unbind()
    store_stepped(pieces, _BASIS, basis, next_basis(triplets, basis))
    for piece, step, own_part in zip(pieces, d.unbind(), captured, strict=True):
        apply(piece, step, own_part, group)

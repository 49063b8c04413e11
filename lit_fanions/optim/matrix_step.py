"""Step a group of matrices: gather each stack's state, compute its step, store what it leaves.

``update`` has the formula. This is beside it because a parameter, a slice of a parameter and a
stack of parameters run the same formula on different tensors.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lit_fanions.optim.adapting import gather_moments, moment_key, splits_momentum
from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.bases import State, basis_key, gather_bases
from lit_fanions.optim.fused import apply_by_kernels, takes_kernels, update_by_kernels
from lit_fanions.optim.matrices import column_blocks, gather, to_matrices
from lit_fanions.optim.observing import Observation, Observer, observe_step, shown_in_given_order
from lit_fanions.optim.stacking import Slice, share_memory, slices, stacked, stacks
from lit_fanions.optim.together import (
    apply_together,
    memory_order,
    moves_together,
    permuted,
    stack_momenta,
    update_together,
)
from lit_fanions.optim.update import (
    Batch,
    Piece,
    Solved,
    dtype_of_n,
    find_oracle,
    make_batch,
    normalised,
    solve,
    update_momentum,
    usable_gradient,
)


def without_autocast(groups: Sequence[Group]) -> AbstractContextManager[Any]:
    """Return a context without autocast, which would round the products of rank-k solvers."""
    devices = {p.device for group in groups for p in group["params"]}
    for kind in {device.type for device in devices}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
    return nullcontext()


def step_matrices(
    group: Group,
    states: Mapping[Tensor, State],
    finite: Mapping[Tensor, Tensor],
    observers: Sequence[Observer] = (),
    shared: Container[Tensor] = (),
) -> None:
    """Step a group of matrices but the ``shared`` parameters, which are left to ``step_shared``.

    ``finite`` has whether each parameter with a gradient is stepped, a 0-dimensional bool. The
    step is the same with and without observers.
    """
    parameters = [
        p for p in group["params"] if p.grad is not None and p.numel() and p not in shared
    ]
    for stack in stacks(parameters, group):
        own = [states[p] for p in stack]
        momenta = [state["momentum"] for state in own]
        together = moves_together(stack, momenta) and not splits_momentum(group)
        order = memory_order(stack, momenta, group)
        if together:
            stack_momenta(own, order)
        pieces = [Piece.whole(p, states[p], finite[p]) for p in stack]
        pieces = pieces if order is None else [permuted(piece, order) for piece in pieces]
        cut = slices(stack[0], pieces[0].momentum, group) if len(stack) == 1 else []
        if cut:
            _step_slices(pieces[0], cut, group, observers)
        else:
            shown = [shown_in_given_order(observe, stack[0].shape, order) for observe in observers]
            _step_stack(pieces, group, shown, together=together)


def _step_slices(
    piece: Piece, cut: Sequence[Slice], group: Group, observers: Sequence[Observer]
) -> None:
    """Step one parameter slice by slice, which needs memory for one slice only."""
    tensors = [
        to_matrices(x.detach(), group["layout"], group["splits"])
        for x in (piece.weight, piece.gradient, piece.momentum)
    ]
    batches = {
        **group, "layout": "batch", "splits": None, "column_blocks": column_blocks(group)
    }  # fmt: skip
    states = []
    for part, start, stop, first in cut:
        weight, gradient, momentum = (parts[part][start:stop] for parts in tensors)
        state = {"momentum": momentum, "skipped": piece.state["skipped"]}
        for key in (basis_key, moment_key):
            stored = piece.state.get(key(part))
            if stored is not None and len(stored) == len(tensors[0][part]):
                state[key(0)] = stored[start:stop]
        states.append(state)

        def show(observation: Observation, first: int = first) -> None:
            for observe in observers:
                observe(observation._replace(group=group, first=first))

        own = Piece(piece.parameter, weight, gradient, momentum, piece.finite, state)
        _step_stack([own], batches, (show,) if observers else ())
    _store_slices(piece.state, cut, states)


def _store_slices(whole: State, cut: Sequence[Slice], states: Sequence[State]) -> None:
    """Store the bases and moments of slices that are no views of the parameter's state."""
    for part in dict.fromkeys(own.part for own in cut):
        for key in (basis_key, moment_key):
            found = [
                state[key(0)]
                for own, state in zip(cut, states, strict=True)
                if own.part == part and key(0) in state
            ]
            stored = whole.get(key(part))
            if not found:
                whole.pop(key(part), None)
            elif stored is None or not all(share_memory(x, stored) for x in found):
                whole[key(part)] = torch.cat(found)


def _step_stack(
    pieces: list[Piece], group: Group, observers: Sequence[Observer], together: bool = False
) -> None:
    """Step pieces of one shape; ``together``: not only solve them but also move them as one."""
    if takes_kernels(pieces, group):
        update, apply_all = update_by_kernels, apply_by_kernels
    elif together:
        update, apply_all = update_together, apply_together
    else:
        update, apply_all = _update_each, _apply_each
    batches = update(pieces, group)
    on_cpu = pieces[0].weight.device.type == "cpu"
    scaled = bool(observers) or on_cpu or len(batches) > 1
    solved = solve_parts(pieces, batches, group, scaled)
    if observers:
        _apply_each(pieces, solved, group, observers)
    else:
        apply_all(pieces, solved, group)


def _apply_each(
    pieces: Sequence[Piece],
    solved: Sequence[Solved],
    group: Group,
    observers: Sequence[Observer] = (),
) -> None:
    for i, piece in enumerate(pieces):
        own = [share_of_stack(answer, i, len(pieces)) for answer in solved]
        observe_step(piece, own, group, observers)


def _update_each(pieces: Sequence[Piece], group: Group) -> list[Batch]:
    """Update the momentum of one piece after the other and return the N of all their matrices.

    That is a batch for each part of ``to_matrices``. Each is normalised while it is in the cache.
    """
    dtype = dtype_of_n(pieces[0], group)
    ns = (gather(update_momentum(piece, group, dtype), piece.parameter) for piece in pieces)
    batches = stack_matrices(ns, len(pieces), group)
    if not splits_momentum(group):
        return batches
    each = (gather(usable_gradient(piece, group), piece.parameter) for piece in pieces)
    parts = (to_matrices(gradient, group["layout"], group["splits"]) for gradient in each)
    gradients = [torch.cat(own) for own in zip(*parts, strict=True)]
    return [
        batch._replace(gradient=gradient)
        for batch, gradient in zip(batches, gradients, strict=True)
    ]


def stack_matrices(ns: Iterable[Tensor], count: int, group: Group) -> list[Batch]:
    """Return the matrices of ``count`` tensors N of one shape, a batch for each part."""
    stacked: list[Tensor] = []
    for i, n in enumerate(ns):
        parts = to_matrices(n, group["layout"], group["splits"])
        if count == 1:
            # Without Nesterov N is the momentum itself.
            return [make_batch(m, group, overwrite=group["nesterov"]) for m in parts]
        parts = [normalised(m, group) if find_oracle(m, group)[1] else m for m in parts]
        stacked = stacked or [m.new_empty(count, *m.shape) for m in parts]
        for batch, m in zip(stacked, parts, strict=True):
            batch[i] = m
    return [Batch(m.flatten(0, 1), *find_oracle(m, group), overwrite=True) for m in stacked]


def solve_parts(
    pieces: Sequence[Piece], batches: list[Batch], group: Group, scaled: bool = True
) -> list[Solved]:
    """Solve the batch of each part and free its memory before the next one."""
    parts = range(len(batches))
    return [_solve_part(pieces, part, batches.pop(0), group, scaled) for part in parts]


def _solve_part(
    pieces: Sequence[Piece], part: int, batch: Batch, group: Group, scaled: bool
) -> Solved:
    """Return the directions of a batch and store what its solver and its transform leave."""
    states = [piece.state for piece in pieces]
    basis = gather_bases(states, batch.m, part, batch.oracle, group["seed"])
    moment = gather_moments(states, batch.m.shape, part, group, batch.gradient)
    answer = solve(batch, basis, moment, group, scaled)
    store_stepped(pieces, basis_key(part), basis, answer.basis)
    store_stepped(pieces, moment_key(part), moment, answer.moment)
    return answer


def store_stepped(
    pieces: Sequence[Piece], key: str, before: Tensor | None, after: Tensor | None
) -> None:
    """Store a batch of bases or moments in the states; a skipped step leaves no trace."""
    if before is None or after is None:
        return
    count = len(before) // len(pieces)
    stepped = stacked([piece.finite for piece in pieces]).repeat_interleave(count)
    chosen = torch.where(stepped[:, None, None], after, before).contiguous().split(count)
    for piece in pieces:
        stored = piece.state.get(key)
        # Of one layout, so that the copies are one launch.
        form = chosen[0].shape, chosen[0].stride()
        if stored is None or (stored.shape, stored.stride()) != form:
            piece.state[key] = torch.empty_like(chosen[0])
    torch._foreach_copy_([piece.state[key] for piece in pieces], chosen)


def share_of_stack(solved: Solved, i: int, count: int) -> Solved:
    """Return the part of the i-th of ``count`` pieces."""
    factor, captured = solved.factor, solved.captured
    return Solved(
        solved.direction.chunk(count)[i],
        factor.chunk(count)[i] if isinstance(factor, Tensor) else factor,
        None if captured is None else captured.chunk(count)[i],
        rest=solved.rest,
    )

"""Step a group of matrices: gather each stack's state, compute its step, store what it leaves.

``update`` has the formula. Beside it because a stack of parameters and a slice of one parameter
run the same formula on different tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo import Oracle, polar_dtype, unit_frobenius
from lit_fanions.optim.adapting import gather_moments, moment_key
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.bases import State, gather_bases, key_of_part, take_basis
from lit_fanions.optim.finiteness import finite_flags
from lit_fanions.optim.matrices import (
    from_matrices,
    gather,
    local,
    local_grad,
    scatter,
    to_matrices,
)
from lit_fanions.optim.observing import Observation, Observer
from lit_fanions.optim.stacking import Slice, slices, stacks, takes_unit
from lit_fanions.optim.together import apply_together, moves_together, update_momenta
from lit_fanions.optim.update import (
    Group,
    Piece,
    Solved,
    apply,
    observed_momentum,
    renormalised,
    solve,
    update_momentum,
)


def step_matrices(
    group: Group, states: Mapping[Tensor, State], observers: Sequence[Observer] = ()
) -> None:
    """Step a group of matrices.

    Args:
        group: The group.
        states: State of each of its parameters.
        observers: Called with what the step does; the step is the same with and without them.
    """
    parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
    flags = finite_flags(parameters, states, group)
    for stack in stacks(parameters, group):
        p = stack[0]
        cut = slices(p, states[p]["momentum"], group) if len(stack) == 1 else []
        if cut:
            _step_slices(p, states[p], flags[p], cut, group, observers)
        else:
            finite = [flags[p] for p in stack]
            _step_stack(stack, [states[p] for p in stack], finite, group, observers)


def _step_stack(
    stack: list[Tensor],
    states: list[State],
    finite: list[Tensor],
    group: Group,
    observers: Sequence[Observer],
) -> None:
    """Step parameters of one shape together."""
    pieces = [
        Piece(local(p), local_grad(p), local(state["momentum"]), flag)
        for p, state, flag in zip(stack, states, finite, strict=True)
    ]
    batches = _momentum_batches(stack, pieces, group)
    # The momentum itself must not be overwritten.
    overwrite = len(stack) > 1 or group["nesterov"]
    solved = []
    for part in range(len(batches)):
        m = batches[part]
        batches[part] = m.new_empty(0)  # frees its memory
        own_memory = overwrite or takes_unit(group, m.shape)  # normalising has copied it
        solver = oracle(group, *m.shape[-2:])
        basis = gather_bases(states, m, part, solver, group["seed"])
        moment = gather_moments(states, m.shape, part, group)
        answer = solve(m, basis, moment, solver, group, own_memory)
        _store(states, finite, key_of_part(part), basis, answer.basis)
        _store(states, finite, moment_key(part), moment, answer.moment)
        solved.append(answer)
        del m
    if not observers and moves_together(stack, [piece.momentum for piece in pieces]):
        apply_together(pieces, solved, group)
        return
    for i, (p, piece) in enumerate(zip(stack, pieces, strict=True)):
        own = [_share(answer, i, len(stack)) for answer in solved]
        if observers:
            _apply_observed(p, piece, own, group, observers, states[i]["skipped"])
        else:
            _apply_parameter(p, piece, own, group)


def _step_slices(
    p: Tensor,
    state: State,
    finite: Tensor,
    cut: Sequence[Slice],
    group: Group,
    observers: Sequence[Observer],
) -> None:
    """Step one parameter slice by slice, which needs memory for one slice only."""
    assert p.grad is not None
    layout, splits = group["layout"], group["splits"]
    tensors = [to_matrices(x, layout, splits) for x in (p.detach(), p.grad, state["momentum"])]
    moments = [
        gather_moments([state], weights.shape, part, group)
        for part, weights in enumerate(tensors[0])
    ]
    kept: dict[str, list[Tensor]] = {}
    for one in cut:
        weight, gradient, momentum = (one.of(batches) for batches in tensors)
        piece = Piece(weight, gradient, momentum, finite)
        m = update_momentum(piece, group)
        unit = takes_unit(group, m.shape)
        m = _normalised(m, group) if unit else m
        solver = oracle(group, *m.shape[-2:])
        basis = _sliced_basis(state, one, m, solver, group)
        whole = moments[one.part]
        moment = None if whole is None else whole[one.start : one.stop]
        answer = solve(m, basis, moment, solver, group, group["nesterov"] or unit)
        for key, before, after in (
            (key_of_part(one.part), basis, answer.basis),
            (moment_key(one.part), moment, answer.moment),
        ):
            if before is not None and after is not None:
                kept.setdefault(key, []).append(torch.where(finite, after, before))
        seen = _Before.of(piece, answer.captured, group) if observers else None
        if group["renormalize"] and group["lr"]:
            piece.weight.copy_(renormalised(piece.weight, finite))
        apply(piece, answer.direction, answer.captured, group)
        if seen is not None:
            found = seen.observation(p, group, one.first, piece, answer, state["skipped"])
            _show(observers, found)
    for part in range(len(moments)):
        state.pop(key_of_part(part), None)
    state.update({key: torch.cat(parts) for key, parts in kept.items()})


def _sliced_basis(
    state: State, one: Slice, m: Tensor, solver: Oracle, group: Group
) -> Tensor | None:
    columns = solver.basis_columns
    if columns is None:
        return None
    stored = state.get(key_of_part(one.part))
    own = None if stored is None else stored[one.start : one.stop]
    return take_basis(own, m, columns, group["seed"]).contiguous()


def _momentum_batches(stack: list[Tensor], pieces: list[Piece], group: Group) -> list[Tensor]:
    """Update the momenta of parameters of one shape and return the N of all their matrices.

    Returns:
        A batch (parameters * count, rows, cols) for each part of ``to_matrices``. Those that the
        oracle takes normalised are normalised here, one parameter at a time, while it is in the
        cache.
    """
    if moves_together(stack, [piece.momentum for piece in pieces]):
        return [
            _normalised(m, group) if takes_unit(group, m.shape) else m
            for m in update_momenta(pieces, group)
        ]
    batches: list[Tensor] = []
    for i, (p, piece) in enumerate(zip(stack, pieces, strict=True)):
        n = gather(update_momentum(piece, group), p)
        parts = [
            _normalised(part, group) if takes_unit(group, part.shape) else part
            for part in to_matrices(n, group["layout"], group["splits"])
        ]
        if len(stack) == 1:
            return parts
        batches = batches or [part.new_empty(len(stack), *part.shape) for part in parts]
        for batch, part in zip(batches, parts, strict=True):
            batch[i] = part
    return [batch.flatten(0, 1) for batch in batches]


def _normalised(m: Tensor, group: Group) -> Tensor:
    dtype = polar_dtype(m, group["polar"])
    return unit_frobenius(m, dtype=dtype, overwrite=group["nesterov"])[0]


def _store(
    states: Sequence[State],
    finite: Sequence[Tensor],
    key: str,
    before: Tensor | None,
    after: Tensor | None,
) -> None:
    """Store a batch of bases or moments in the states; a skipped step leaves no trace."""
    if before is None or after is None:
        return
    count = len(before) // len(states)
    stepped = torch.stack(list(finite)).repeat_interleave(count)[:, None, None]
    chosen = torch.where(stepped, after, before).split(count)
    for state, tensor in zip(states, chosen, strict=True):
        state[key] = tensor.contiguous()


def _share(solved: Solved, i: int, count: int) -> Solved:
    """Return the part of the i-th of ``count`` parameters of one shape."""
    factor = solved.factor
    captured = solved.captured
    return Solved(
        solved.direction.chunk(count)[i],
        factor.chunk(count)[i] if isinstance(factor, Tensor) else factor,
        None if captured is None else captured.chunk(count)[i],
    )


def _apply_parameter(p: Tensor, piece: Piece, solved: Sequence[Solved], group: Group) -> None:
    """Apply the directions of all matrices of a parameter to this rank's shard of it."""
    layout, splits = group["layout"], group["splits"]

    def whole(parts: list[Tensor]) -> Tensor:
        return scatter(from_matrices(parts, p.shape, layout, splits), p)

    if group["renormalize"] and group["lr"]:
        matrices = to_matrices(gather(piece.weight, p), layout, splits)
        piece.weight.copy_(whole([renormalised(m, piece.finite) for m in matrices]))
    captured = [answer.captured for answer in solved if answer.captured is not None]
    step = whole([answer.direction for answer in solved])
    apply(piece, step, whole(captured) if captured else None, group)


class _Before(NamedTuple):
    """What observers are shown of matrices before their step; later it may be overwritten."""

    gradient: Tensor
    momentum: Tensor
    weight: Tensor
    captured: Tensor | None

    @classmethod
    def of(cls, piece: Piece, captured: Tensor | None, group: Group) -> _Before:
        """Copy what the step is about to change."""
        taken = None if captured is None else captured.clone()
        momentum = observed_momentum(piece, group)
        return cls(piece.gradient, momentum, piece.weight.clone(), taken)

    def observation(
        self, p: Tensor, group: Group, first: int, after: Piece, answer: Solved, skipped: Tensor
    ) -> Observation:
        """Return the observation of these matrices after the step."""
        return Observation(
            p, group, first, self.gradient, self.momentum, answer.direction, answer.factor,
            self.captured, self.weight, after.weight, after.finite, skipped,
        )  # fmt: skip


def _apply_observed(
    p: Tensor,
    piece: Piece,
    solved: Sequence[Solved],
    group: Group,
    observers: Sequence[Observer],
    skipped: Tensor,
) -> None:
    """Apply the directions of a parameter and show the observers its matrices, whole."""

    def matrices(shard: Tensor) -> list[Tensor]:
        return to_matrices(gather(shard, p), group["layout"], group["splits"])

    before = _Before.of(piece, None, group)
    captured = [None if x.captured is None else x.captured.clone() for x in solved]
    shown = zip(*map(matrices, before[:3]), captured, strict=True)
    parts = [_Before(*tensors) for tensors in shown]
    _apply_parameter(p, piece, solved, group)
    first = 0
    for one, after, answer in zip(parts, matrices(piece.weight), solved, strict=True):
        _show(
            observers,
            one.observation(p, group, first, piece._replace(weight=after), answer, skipped),
        )
        first += len(after)


def _show(observers: Sequence[Observer], observation: Observation) -> None:
    for observe in observers:
        observe(observation)

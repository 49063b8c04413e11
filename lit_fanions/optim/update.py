r"""One step of a group of matrices, in the order of its formula.

.. math::
    M \leftarrow \mu M + (1 - \mu) G, \quad
    W \leftarrow (1 - \eta \lambda) W - \eta \, s \, D(N)

``update_momentum`` makes M and N, ``solve`` the direction D, ``size_factor`` the s, ``apply`` the
new W. What a step computes is here; which matrices are solved together is in ``stacking``, the
solvers' state in ``bases``, what monitors see in ``observing``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo import Oracle, frobenius_norm, polar_dtype, unit_frobenius
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.bases import State, gather_bases, key_of_part, next_basis, take_basis
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
from lit_fanions.optim.stacking import (
    Slice,
    moves_together,
    slices,
    stack_entries,
    stacked_flags,
    stacked_gradients,
    stacked_matrices,
    stacked_tensors,
    stacks,
    takes_unit,
)
from lit_fanions.optim.step_sizes import MATCHED_RMS, step_size_factor

Group = Mapping[str, Any]


class Piece(NamedTuple):
    """The tensors of one parameter, or of a slice of its matrices, that a step reads and writes.

    Attributes:
        weight: This rank's shard of the parameter, or (count, rows, cols) of it.
        gradient: The gradient, of the same shape.
        momentum: The momentum M, of the same shape.
        finite: Whether the parameter is stepped, a 0-dimensional bool.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    finite: Tensor


class Solved(NamedTuple):
    """Directions of a batch of matrices.

    Attributes:
        direction: factor * D, (matrices, rows, cols).
        factor: The step-size factor s: a number, or (matrices, 1, 1).
        captured: The part of the momentum that error feedback subtracts; None without it.
        basis: The basis for the next step; None without one.
    """

    direction: Tensor
    factor: Tensor | float
    captured: Tensor | None
    basis: Tensor | None


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
        answer = solve(m, basis, solver, group, own_memory)
        if basis is not None and answer.basis is not None:
            _store_bases(states, finite, part, basis, answer.basis)
        solved.append(answer)
        del m
    if not observers and moves_together(stack, [piece.momentum for piece in pieces]):
        _apply_together(pieces, solved, group)
        return
    for i, (p, piece) in enumerate(zip(stack, pieces, strict=True)):
        own = [_share(answer, i, len(stack)) for answer in solved]
        shown = _Shown(p, piece, group, own) if observers else None
        _apply_parameter(p, piece, own, group)
        if shown is not None:
            for observation in shown.observations(states[i]["skipped"]):
                for observe in observers:
                    observe(observation)


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
    bases: dict[int, list[Tensor]] = {}
    for one in cut:
        weight, gradient, momentum = (one.of(batches) for batches in tensors)
        piece = Piece(weight, gradient, momentum, finite)
        m = update_momentum(piece, group)
        unit = takes_unit(group, m.shape)
        m = _normalised(m, group) if unit else m
        solver = oracle(group, *m.shape[-2:])
        basis = _sliced_basis(state, one, m, solver, group)
        answer = solve(m, basis, solver, group, group["nesterov"] or unit)
        if basis is not None and answer.basis is not None:
            after = torch.where(finite, answer.basis, basis)
            bases.setdefault(one.part, []).append(after)
        before = piece.weight.clone() if observers else None
        taken = None if answer.captured is None else answer.captured
        seen = observed_momentum(piece, group) if observers else None
        taken = taken.clone() if observers and taken is not None else taken
        if group["renormalize"] and group["lr"]:
            piece.weight.copy_(renormalised(piece.weight, finite))
        apply(piece, answer.direction, answer.captured, group)
        for observe in observers:
            assert before is not None and seen is not None
            observe(
                Observation(
                    p, group, one.first, piece.gradient, seen, answer.direction, answer.factor,
                    taken, before, piece.weight, finite, state["skipped"],
                )
            )  # fmt: skip
    for part in {one.part for one in cut}:
        state.pop(key_of_part(part), None)
        if part in bases:
            state[key_of_part(part)] = torch.cat(bases[part])


def _sliced_basis(
    state: State, one: Slice, m: Tensor, solver: Oracle, group: Group
) -> Tensor | None:
    columns = solver.basis_columns(min(m.shape[-2:]))
    if columns is None:
        return None
    stored = state.get(key_of_part(one.part))
    own = None if stored is None else stored[one.start : one.stop]
    return take_basis(own, m, columns, group["seed"]).contiguous()


# Momentum.


def update_momentum(piece: Piece, group: Group) -> Tensor:
    """Update M and return N, the Nesterov form of it if the group has that.

    Error feedback accumulates, M <- M + G, and N is M. A gradient that is skipped leaves M as it
    is.
    """
    gradient = _usable_gradient(piece, group)
    if group["error_feedback"]:
        piece.momentum.add_(gradient)
    else:
        piece.momentum.lerp_(gradient, 1 - group["momentum"])
    return _nesterov(gradient, piece.momentum, group)


def observed_momentum(piece: Piece, group: Group) -> Tensor:
    """Return the N of ``update_momentum`` again: by now its memory may have been overwritten."""
    n = _nesterov(_usable_gradient(piece, group), piece.momentum, group)
    return n.clone() if n is piece.momentum else n


def _usable_gradient(piece: Piece, group: Group) -> Tensor:
    """Return the gradient, or if it is skipped a stand-in that leaves the momentum unchanged."""
    gradient = piece.gradient.to(piece.momentum.dtype)
    # A CPU can look at the flag without waiting.
    if group["nonfinite"] == "skip" and (gradient.device.type != "cpu" or not piece.finite):
        stand_in = 0.0 if group["error_feedback"] else piece.momentum
        gradient = torch.where(piece.finite, gradient, stand_in)
    return gradient


def _nesterov(gradient: Tensor, momentum: Tensor, group: Group) -> Tensor:
    if group["error_feedback"] or not group["nesterov"]:
        return momentum
    return gradient.lerp(momentum, group["momentum"])  # both are needed later: not in place


def _momentum_batches(stack: list[Tensor], pieces: list[Piece], group: Group) -> list[Tensor]:
    """Update the momenta of parameters of one shape and return the N of all their matrices.

    Returns:
        A batch (parameters * count, rows, cols) for each part of ``to_matrices``. Those that the
        oracle takes normalised are so, one parameter after the other while it is in the cache.
    """
    if moves_together(stack, [piece.momentum for piece in pieces]):
        return _momenta_together(pieces, group)
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


def _momenta_together(pieces: Sequence[Piece], group: Group) -> list[Tensor]:
    """``_momentum_batches`` in launches that do not grow with the number of parameters."""
    momenta = [piece.momentum for piece in pieces]
    together = Piece(
        pieces[0].weight,
        stacked_gradients([piece.gradient for piece in pieces], momenta[0]),
        torch.stack(momenta),
        stacked_flags([piece.finite for piece in pieces], momenta[0].ndim),
    )
    n = update_momentum(together, group)
    torch._foreach_copy_(momenta, together.momentum.unbind())
    return [
        _normalised(m, group) if takes_unit(group, m.shape) else m
        for m in stacked_matrices(n, group)
    ]


def _normalised(m: Tensor, group: Group) -> Tensor:
    dtype = polar_dtype(m, group["polar"])
    return unit_frobenius(m, dtype=dtype, overwrite=group["nesterov"])[0]


# Direction and size.


def solve(m: Tensor, basis: Tensor | None, solver: Oracle, group: Group, overwrite: bool) -> Solved:
    """Return the scaled directions of a batch, in slices that the memory limit allows.

    Args:
        m: Matrices, (matrices, rows, cols); normalised where ``takes_unit``.
        basis: Start of their solver, (matrices, cols, columns); None without one.
        solver: Their oracle.
        group: Options of their group.
        overwrite: Whether the memory of m may be used.
    """
    size = max(1, stack_entries(group, m.device) // m[0].numel())
    ms = m.split(size)
    bases = [None] * len(ms) if basis is None else basis.split(size)
    answers = [_direction(x, b, solver, group, overwrite) for x, b in zip(ms, bases, strict=True)]
    d, captured, after = (_joined(parts) for parts in zip(*answers, strict=True))
    assert d is not None
    factor = size_factor(d, solver, group)
    d = d if isinstance(factor, float) and factor == 1 else d.mul_(factor)
    return Solved(d, factor, captured, after)


def _direction(
    m: Tensor, basis: Tensor | None, solver: Oracle, group: Group, overwrite: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return D, what error feedback captures of m, and the next basis."""
    feedback = group["error_feedback"]
    answer = solver.solve(
        m,
        warm_start=basis,
        unit=takes_unit(group, m.shape),
        overwrite=overwrite and not feedback,
    )
    triplets = answer.triplets
    if triplets is None:  # with feedback the rank has been clamped to full: all is captured
        return answer.direction, m if feedback else None, None
    captured = None
    if feedback:
        k = solver.ball.solved_rank(solver.k, min(m.shape[-2:]))
        u, s, vh = triplets
        captured = (u[..., :k] * s[..., None, :k]) @ vh[..., :k, :]
    return answer.direction, captured, None if basis is None else next_basis(triplets, basis)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the parts of a batch in one tensor, or None for parts of None."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) > 1 else known[0] if known else None


def size_factor(d: Tensor, solver: Oracle, group: Group) -> Tensor | float:
    """Return the step-size factor of directions (matrices, rows, cols).

    Returns:
        A number, or (matrices, 1, 1) where it depends on the directions.
    """
    rows, cols = d.shape[-2:]
    factor = step_size_factor(group["scale"], rows, cols, solver.length(rows, cols))
    if factor is not None:
        return factor
    norm = frobenius_norm(d)
    root_mean_square = torch.where(norm == 0, 1.0, norm) / math.sqrt(rows * cols)
    return MATCHED_RMS / root_mean_square


def _store_bases(
    states: Sequence[State], finite: Sequence[Tensor], part: int, before: Tensor, after: Tensor
) -> None:
    count = len(before) // len(states)
    # A skipped step leaves no trace.
    stepped = torch.stack(list(finite)).repeat_interleave(count)[:, None, None]
    chosen = torch.where(stepped, after, before).split(count)
    for state, basis in zip(states, chosen, strict=True):
        state[key_of_part(part)] = basis.contiguous()


def _share(solved: Solved, i: int, count: int) -> Solved:
    """Return the part of the i-th of ``count`` parameters of one shape."""
    factor = solved.factor
    captured = solved.captured
    return Solved(
        solved.direction.chunk(count)[i],
        factor.chunk(count)[i] if isinstance(factor, Tensor) else factor,
        None if captured is None else captured.chunk(count)[i],
        None,
    )


# Apply.


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


def _apply_together(pieces: Sequence[Piece], solved: Sequence[Solved], group: Group) -> None:
    """``_apply_parameter`` for a stack, in launches that do not grow with its parameters."""
    weights, momenta = [p.weight for p in pieces], [p.momentum for p in pieces]
    count, shape = len(pieces), weights[0].shape
    captured = [answer.captured for answer in solved if answer.captured is not None]
    weight = torch.stack(weights)
    together = Piece(
        weight,
        weight,
        torch.stack(momenta) if captured else weight,
        stacked_flags([p.finite for p in pieces], len(shape)),
    )
    if group["renormalize"] and group["lr"]:
        matrices = stacked_matrices(weight, group)
        flags = together.finite.view(count, 1)
        scaled = [
            renormalised(m, flags.expand(-1, len(m) // count).reshape(-1, 1, 1)) for m in matrices
        ]
        together.weight.copy_(stacked_tensors(scaled, count, shape, group))
    step = stacked_tensors([answer.direction for answer in solved], count, shape, group)
    kept = stacked_tensors(captured, count, shape, group) if captured else None
    apply(together, step, kept, group)
    torch._foreach_copy_(weights, together.weight.unbind())
    if captured:
        torch._foreach_copy_(momenta, together.momentum.unbind())


def apply(piece: Piece, step: Tensor, captured: Tensor | None, group: Group) -> None:
    """Decay and move the weight, and subtract what was captured from the momentum.

    Args:
        piece: Weight, momentum and flag.
        step: factor * D, of the shape of the weight.
        captured: What error feedback captures, of the same shape; None without it.
        group: Options.
    """
    weight, momentum, lr = piece.weight, piece.momentum, group["lr"]
    gate = piece.finite.float()
    if captured is not None:
        gain = group["momentum"] - 1
        momentum.addcmul_(captured.to(momentum.dtype), gate.to(momentum.dtype), value=gain)
    if lr == 0:
        return
    if group["weight_decay"]:
        weight.addcmul_(weight, gate.to(weight.dtype), value=-lr * group["weight_decay"])
    weight.addcmul_(step.to(weight.dtype), gate.to(weight.dtype), value=-lr)


def renormalised(m: Tensor, finite: Tensor) -> Tensor:
    """Return matrices scaled to Frobenius norm sqrt(rows); as they are where not stepped.

    Args:
        m: Matrices, (count, rows, cols).
        finite: Whether they are stepped, a 0-dimensional bool.
    """
    norm = frobenius_norm(m)
    factor = torch.where((norm > 0) & finite, math.sqrt(m.shape[-2]) / norm, 1.0)
    return (m * factor).to(m.dtype)  # the factor in float32: bfloat16 would round it to 1


class _Shown:
    """What observers are shown of a parameter's step: what it was before, and after."""

    def __init__(self, p: Tensor, piece: Piece, group: Group, solved: Sequence[Solved]) -> None:
        self.p, self.piece, self.group, self.solved = p, piece, group, solved
        # It may be the momentum, which is about to change.
        self.captured = [
            None if answer.captured is None else answer.captured.clone() for answer in solved
        ]
        self.gradients = self._matrices(piece.gradient)
        self.momenta = self._matrices(observed_momentum(piece, group))
        self.before = self._matrices(piece.weight.clone())

    def _matrices(self, shard: Tensor) -> list[Tensor]:
        return to_matrices(gather(shard, self.p), self.group["layout"], self.group["splits"])

    def observations(self, skipped: Tensor) -> Iterator[Observation]:
        """Yield what was done to each batch of the parameter's matrices."""
        first = 0
        for part, after in enumerate(self._matrices(self.piece.weight)):
            yield Observation(
                parameter=self.p,
                group=self.group,
                first=first,
                gradient=self.gradients[part],
                momentum=self.momenta[part],
                direction=self.solved[part].direction,
                factor=self.solved[part].factor,
                captured=self.captured[part],
                before=self.before[part],
                after=after,
                finite=self.piece.finite,
                skipped=skipped,
            )
            first += len(after)

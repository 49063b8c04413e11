"""Momenta and weights of a stack of parameters as one tensor each, for accelerators.

There, a step with a launch for each parameter takes as long as the launches. A CPU is faster with
one parameter after the other, whose tensors stay in the cache. The formula is that of ``update``:
the tensors of a stack have one dimension more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_fanions.optim import algorithms
from lit_fanions.optim.bases import State
from lit_fanions.optim.matrices import from_matrices, inverse, is_distributed, to_matrices
from lit_fanions.optim.stacking import share_memory, stacked
from lit_fanions.optim.update import (
    Batch,
    Group,
    Piece,
    Solved,
    apply,
    dtype_of_n,
    is_zero,
    make_batch,
    renormalise,
    renormalises,
    update_momentum,
)

# Kernels of parameters of this many entries take longer than their launches: stacking would cost
# more than it saves.
_LARGE = 2**22


def moves_together(stack: Sequence[Tensor], momenta: Sequence[Tensor]) -> bool:
    """Return whether momenta and weights of parameters of one shape are updated as one tensor."""
    first = stack[0]
    if first.device.type == "cpu" or len(stack) == 1 or first.numel() >= _LARGE:
        return False
    # A loaded checkpoint may have momenta of several dtypes.
    return not any(map(is_distributed, stack)) and len({m.dtype for m in momenta}) == 1


def stack_momenta(states: Sequence[State], order: list[int] | None) -> None:
    """Make the momenta of parameters of one shape views of one tensor, in an order of memory.

    Nothing is done if some are views of another tensor, as when a parameter has no gradient in this
    step.
    """
    if all(has_own_storage(state["momentum"]) for state in states):
        order = order or list(range(states[0]["momentum"].ndim))
        whole = torch.stack([state["momentum"].permute(order) for state in states])
        for state, view in zip(states, whole.unbind(), strict=True):
            state["momentum"] = view.permute(inverse(order))


def memory_order(
    stack: Sequence[Tensor], momenta: Sequence[Tensor], group: Group
) -> list[int] | None:
    """Return the order in which the dimensions of parameters in channels_last lie in memory.

    Matrices with their columns in this order are views, which kernels can take. None where the
    order is that of ``to_matrices``; on a CPU, where products would be summed in another order; and
    where a state or a direction may depend on the order of the columns.
    """
    first = stack[0]
    if first.ndim < 3 or first.device.type == "cpu" or first.is_contiguous():
        return None
    if is_distributed(first) or group["layout"] != "flatten" or group["splits"] is not None:
        return None
    oracle = algorithms.oracle(group, len(first), first.numel() // len(first))
    known = all(ball.in_place or ball.is_polar(oracle.case) for ball, _ in oracle.parts)
    order = [0, *sorted(range(1, first.ndim), key=first.stride, reverse=True)]
    tensors = [*stack, *momenta, *(p.grad for p in stack if p.grad is not None)]
    lie_so = all(x.permute(order).is_contiguous() for x in tensors)
    return order if lie_so and known and group["adapt"] == "none" else None


def permuted(piece: Piece, order: list[int]) -> Piece:
    """Return a piece whose tensors have their dimensions in an order."""
    weight, gradient, momentum = (
        x.permute(order) for x in (piece.weight, piece.gradient, piece.momentum)
    )
    return piece._replace(weight=weight, gradient=gradient, momentum=momentum)


def update_together(pieces: Sequence[Piece], group: Group) -> list[Batch]:
    """Update the momenta of pieces of one shape and return the N of all their matrices.

    That is a batch for each part of ``to_matrices``.
    """
    momentum = stacked([piece.momentum for piece in pieces])
    gradients = torch.empty_like(momentum)
    torch._foreach_copy_(gradients.unbind(), [piece.gradient for piece in pieces])
    piece = _together(pieces, gradients, gradients, momentum)
    n = update_momentum(piece, group, dtype_of_n(pieces[0], group))
    _store_momentum(pieces, momentum)
    return [
        make_batch(m, group, overwrite=not share_memory(m, pieces[0].momentum))
        for m in _stacked_matrices(n, group)
    ]


def apply_together(pieces: Sequence[Piece], solved: Sequence[Solved], group: Group) -> None:
    """Apply the directions of each batch of ``update_together``."""
    weights = [piece.weight for piece in pieces]
    count, shape = len(pieces), weights[0].shape
    captured = [answer.captured for answer in solved if answer.captured is not None]
    if not captured and len(solved) == 1 and _only_moves(weights[0], solved[0], group):
        step = _stacked_tensors([solved[0].direction], count, shape, group)
        flags = stacked([piece.finite for piece in pieces]).view(-1, *[1] * len(shape))
        moves = step * (flags * (group["lr"] * solved[0].rest))
        torch._foreach_sub_(weights, moves.unbind())
        return
    weight = torch.stack(weights)
    # Not read without feedback.
    momentum = stacked([piece.momentum for piece in pieces]) if captured else weight
    together = _together(pieces, weight, weight, momentum)
    if renormalises(group):
        flags = together.finite.view(count, 1)
        matrices = _stacked_matrices(weight, group)
        for m in matrices:
            renormalise([m], flags.expand(-1, len(m) // count).reshape(-1, 1, 1), group)
        if not share_memory(matrices[0], weight):
            weight = _stacked_tensors(matrices, count, shape, group)
            together = together._replace(weight=weight)
    step = _stacked_tensors([answer.direction for answer in solved], count, shape, group)
    left = _stacked_tensors(captured, count, shape, group) if captured else None
    apply(together, step, left, group, solved[0].rest)
    torch._foreach_copy_(weights, weight.unbind())
    if captured:
        _store_momentum(pieces, momentum)


def _only_moves(weight: Tensor, solved: Solved, group: Group) -> bool:
    """Return whether a weight is float32 and not decayed or renormalised: it needs no stack."""
    changes = renormalises(group) or not is_zero(group["weight_decay"]) or is_zero(group["lr"])
    product = torch.promote_types(solved.direction.dtype, torch.float32)
    return not changes and weight.dtype == product == torch.float32


def _store_momentum(pieces: Sequence[Piece], momentum: Tensor) -> None:
    momenta = [piece.momentum for piece in pieces]
    if not share_memory(momenta[0], momentum):
        torch._foreach_copy_(momenta, momentum.unbind())


def has_own_storage(x: Tensor) -> bool:
    """Return whether a tensor is no view of a larger one."""
    return is_distributed(x) or x.untyped_storage().nbytes() <= x.numel() * x.element_size()


def own_state(state: State) -> State:
    """Return a state whose tensors are no views of a stack, to be saved and copied."""
    return {
        key: x.clone() if isinstance(x, Tensor) and not has_own_storage(x) else x
        for key, x in state.items()
    }


def _together(pieces: Sequence[Piece], weight: Tensor, gradient: Tensor, momentum: Tensor) -> Piece:
    """Return stacked tensors as a piece, with the flags shaped to go with them."""
    flags = stacked([piece.finite for piece in pieces])
    finite = flags.view(-1, *[1] * pieces[0].weight.ndim)
    return pieces[0]._replace(weight=weight, gradient=gradient, momentum=momentum, finite=finite)


def _stacked_matrices(x: Tensor, group: Group) -> list[Tensor]:
    """Return a batch for each part of ``to_matrices`` of a stack of tensors, (count, *shape).

    It is a view of x if all matrices lie in it as in the batch.
    """
    each = [to_matrices(own, group["layout"], group["splits"]) for own in x.unbind()]
    first = each[0]
    if len(first) == 1 and first[0].is_contiguous() and share_memory(first[0], x):
        return [x.view(-1, *first[0].shape[-2:])]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def _stacked_tensors(
    batches: Sequence[Tensor], count: int, shape: torch.Size, group: Group
) -> Tensor:
    """Invert ``_stacked_matrices``: return (count, *shape)."""
    each = [
        from_matrices(parts, shape, group["layout"], group["splits"])
        for parts in zip(*(batch.chunk(count) for batch in batches), strict=True)
    ]
    whole = batches[0]
    if len(batches) == 1 and each[0].is_contiguous() and share_memory(each[0], whole):
        return whole.reshape(count, *shape)
    return torch.stack(each)

"""Momenta and weights of a stack of parameters as one tensor each, for accelerators.

A launch for each parameter is what bounds a step there. On a CPU the tensors of one parameter after
the other stay in the cache, so that it does better without. The formula is that of ``update``: the
tensors of a stack have one dimension more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_fanions.optim.bases import State
from lit_fanions.optim.matrices import from_matrices, is_distributed, to_matrices
from lit_fanions.optim.stacking import share_memory
from lit_fanions.optim.update import (
    Group,
    Piece,
    Solved,
    apply,
    renormalise,
    renormalises,
    update_momentum,
)

# Entries of a parameter whose kernels take longer than their launches, so that stacking would cost
# more than it saves.
_LARGE = 2**22


def moves_together(stack: Sequence[Tensor], momenta: Sequence[Tensor]) -> bool:
    """Return whether momenta and weights of parameters of one shape are updated as one tensor."""
    first = stack[0]
    if first.device.type == "cpu" or len(stack) == 1 or first.numel() >= _LARGE:
        return False
    # A loaded checkpoint may have momenta of several dtypes.
    return not any(map(is_distributed, stack)) and len({m.dtype for m in momenta}) == 1


def stack_momenta(states: Sequence[State]) -> None:
    """Make the momenta of parameters of one shape views of one tensor.

    Unless some already are views of another, as when a parameter has no gradient in this step.
    """
    if all(has_own_storage(state["momentum"]) for state in states):
        whole = torch.stack([state["momentum"] for state in states])
        for state, view in zip(states, whole.unbind(), strict=True):
            state["momentum"] = view


def update_together(pieces: Sequence[Piece], group: Group) -> list[Tensor]:
    """Update the momenta of pieces of one shape and return the N of all their matrices.

    That is a batch (pieces * count, rows, cols) for each part of ``to_matrices``.
    """
    momentum = _stacked([piece.momentum for piece in pieces])
    gradients = torch.empty_like(momentum)
    torch._foreach_copy_(gradients.unbind(), [piece.gradient for piece in pieces])
    n = update_momentum(_together(pieces, gradients, gradients, momentum), group)
    _store_momentum(pieces, momentum)
    return _stacked_matrices(n, group)


def apply_together(pieces: Sequence[Piece], solved: Sequence[Solved], group: Group) -> None:
    """Apply the directions of each batch of ``update_together``."""
    weights = [piece.weight for piece in pieces]
    count, shape = len(pieces), weights[0].shape
    captured = [answer.captured for answer in solved if answer.captured is not None]
    weight = torch.stack(weights)
    momentum = (
        _stacked([piece.momentum for piece in pieces]) if captured else weight
    )  # not read without feedback
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
    apply(together, step, left, group)
    torch._foreach_copy_(weights, weight.unbind())
    if captured:
        _store_momentum(pieces, momentum)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one: the tensor that they are views of, or a copy."""
    first, size = tensors[0], tensors[0].numel()
    start = first.storage_offset()
    if all(
        share_memory(x, first) and x.storage_offset() == start + i * size and x.is_contiguous()
        for i, x in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    return torch.stack(list(tensors))


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
    flags = torch.stack([piece.finite for piece in pieces])
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

"""Momenta and weights of a stack of parameters as one tensor each, for accelerators.

A launch for each parameter is what bounds a step there. On a CPU the tensors of one parameter after
the other stay in the cache, so that it does better without. The formula is that of ``update``: the
tensors of a stack have one dimension more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_fanions.optim.matrices import from_matrices, is_distributed, to_matrices
from lit_fanions.optim.stacking import share_memory
from lit_fanions.optim.update import Group, Piece, Solved, apply, renormalised, update_momentum

# Entries of a parameter whose kernels take longer than their launches, so that stacking would cost
# more than it saves.
_LARGE = 2**22


def moves_together(pieces: Sequence[Piece]) -> bool:
    """Return whether momenta and weights of pieces of one shape are updated as one tensor each."""
    first = pieces[0].parameter
    if first.device.type == "cpu" or len(pieces) == 1 or first.numel() >= _LARGE:
        return False
    if any(is_distributed(piece.parameter) for piece in pieces):
        return False
    return len({piece.momentum.dtype for piece in pieces}) == 1  # a checkpoint may have several


def update_together(pieces: Sequence[Piece], group: Group) -> list[Tensor]:
    """Update the momenta of pieces of one shape and return the N of all their matrices.

    Returns:
        A batch (pieces * count, rows, cols) for each part of ``to_matrices``.
    """
    momenta = [piece.momentum for piece in pieces]
    gradients = momenta[0].new_empty(len(pieces), *momenta[0].shape)
    torch._foreach_copy_(gradients.unbind(), [piece.gradient for piece in pieces])
    together = _together(pieces, gradients, gradients, torch.stack(momenta))
    n = update_momentum(together, group)
    torch._foreach_copy_(momenta, together.momentum.unbind())
    return _stacked_matrices(n, group)


def apply_together(pieces: Sequence[Piece], solved: Sequence[Solved], group: Group) -> None:
    """Apply the directions of each batch of ``update_together``."""
    weights, momenta = [p.weight for p in pieces], [p.momentum for p in pieces]
    count, shape = len(pieces), weights[0].shape
    captured = [answer.captured for answer in solved if answer.captured is not None]
    weight = torch.stack(weights)
    momentum = torch.stack(momenta) if captured else weight  # not read without feedback
    together = _together(pieces, weight, weight, momentum)
    if group["renormalize"] and group["lr"]:
        flags = together.finite.view(count, 1)
        scaled = [
            renormalised(m, flags.expand(-1, len(m) // count).reshape(-1, 1, 1))
            for m in _stacked_matrices(weight, group)
        ]
        weight.copy_(_stacked_tensors(scaled, count, shape, group))
    step = _stacked_tensors([answer.direction for answer in solved], count, shape, group)
    left = _stacked_tensors(captured, count, shape, group) if captured else None
    apply(together, step, left, group)
    torch._foreach_copy_(weights, weight.unbind())
    if captured:
        torch._foreach_copy_(momenta, momentum.unbind())


def _together(pieces: Sequence[Piece], weight: Tensor, gradient: Tensor, momentum: Tensor) -> Piece:
    """Return stacked tensors as a piece, with the flags shaped to go with them."""
    flags = torch.stack([piece.finite for piece in pieces])
    finite = flags.view(-1, *[1] * pieces[0].weight.ndim)
    return pieces[0]._replace(weight=weight, gradient=gradient, momentum=momentum, finite=finite)


def _stacked_matrices(x: Tensor, group: Group) -> list[Tensor]:
    """Return the matrices of a stack of tensors, (count, *shape).

    Returns:
        A batch for each part of ``to_matrices``; a view of x if all matrices lie in it as in the
        batch.
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

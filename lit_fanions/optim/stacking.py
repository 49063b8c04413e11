"""Which matrices are solved together, and in how much memory.

Matrices of one shape are solved as a batch. Accelerators are kept busy with fewer launches; a CPU
shares out the products of a batch between its threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo import Oracle
from lit_fanions.optim import algorithms
from lit_fanions.optim.adapting import splits_momentum
from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.matrices import is_distributed, matrix_shapes, to_matrices

# Entries of the matrices in a batch.
_STACK_ENTRIES = 2**26
_CPU_STACK_ENTRIES = 5 * 2**20


def stack_entries(group: Group, device: torch.device) -> int:
    """Return the most entries of matrices of a group that are solved together on a device."""
    if group["stack_entries"] is not None:
        return int(group["stack_entries"])
    return _CPU_STACK_ENTRIES if device.type == "cpu" else _STACK_ENTRIES


def takes_unit(oracle: Oracle, group: Group) -> bool:
    """Return whether an oracle gets its matrices normalised.

    Not with error feedback or a transform that splits the momentum, which need it as it is.
    """
    return oracle.takes_unit and not group["error_feedback"] and not splits_momentum(group)


def in_batches(
    parameters: Iterable[Tensor],
    key: Callable[[Tensor], Hashable],
    fits: Callable[[Tensor, int], bool],
) -> list[list[Tensor]]:
    """Return batches of parameters of equal keys; ``fits`` says if so many are not too many."""
    alike: dict[Hashable, list[list[Tensor]]] = {}
    for p in parameters:
        batches = alike.setdefault(key(p), [[]])
        if batches[-1] and not fits(p, len(batches[-1]) + 1):
            batches.append([])
        batches[-1].append(p)
    return list(itertools.chain.from_iterable(alike.values()))


def stacks(parameters: Iterable[Tensor], group: Group) -> list[list[Tensor]]:
    """Return parameters of one shape, dtype and device, as many as may be solved together."""

    def fits(p: Tensor, count: int) -> bool:
        # On a CPU only batches of large products are faster.
        gains = p.device.type != "cpu" or any(
            takes_unit(algorithms.oracle(group, rows, cols), group)
            for _, rows, cols in matrix_shapes(p.shape, group["layout"], group["splits"])
        )
        return gains and count * p.numel() <= stack_entries(group, p.device)

    return in_batches(parameters, lambda p: (p.shape, p.dtype, p.device), fits)


class Slice(NamedTuple):
    """Some of the matrices of one parameter."""

    part: int  # number of their batch in ``to_matrices``
    start: int  # place of the first of them in that batch
    stop: int  # place after the last of them
    first: int  # place of the first of them among all matrices of the parameter


def slices(p: Tensor, momentum: Tensor, group: Group) -> list[Slice]:
    """Return slices of a parameter that has more matrices than may be solved together.

    Empty where one slice would be all, or where matrices are no views of the tensors, so that the
    parameter has to be stepped as a whole.
    """
    grad = p.grad
    assert grad is not None
    if is_distributed(p) or grad.dtype != p.dtype:
        return []
    shapes = matrix_shapes(p.shape, group["layout"], group["splits"])
    limit = stack_entries(group, p.device)
    sizes = [max(1, limit // (rows * cols)) for _, rows, cols in shapes]
    if len(shapes) == 1 and shapes[0][0] <= sizes[0]:
        return []
    if not (_has_views(p.detach(), group) and _has_views(momentum, group)):
        return []
    found, first = [], 0
    for part, (count, *_) in enumerate(shapes):
        for start in range(0, count, sizes[part]):
            found.append(Slice(part, start, min(start + sizes[part], count), first + start))
        first += count
    return found


def _has_views(x: Tensor, group: Group) -> bool:
    parts = to_matrices(x, group["layout"], group["splits"])
    return all(share_memory(part, x) for part in parts)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one: the tensor that they are views of, or a copy."""
    first, size = tensors[0], tensors[0].numel()
    start = first.storage_offset()
    if all(
        share_memory(x, first) and x.storage_offset() == start + i * size and x.is_contiguous()
        for i, x in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    return torch.stack(list(tensors))


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors lie in the same storage."""
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata

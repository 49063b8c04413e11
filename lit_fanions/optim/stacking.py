"""Which matrices are solved together, and in how much memory.

Matrices of one shape are solved as a batch. Accelerators are kept busy with fewer launches; a CPU
shares out the products of a batch between its threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.matrices import is_distributed, matrix_shapes, to_matrices

# Entries of the matrices in a batch.
_STACK_ENTRIES = 2**26
_CPU_STACK_ENTRIES = 5 * 2**20


def stack_entries(group: Mapping[str, Any], device: torch.device) -> int:
    """Return the most entries of matrices that are solved together.

    Args:
        group: Options of a matrix group.
        device: Device of the matrices.
    """
    if group["stack_entries"] is not None:
        return int(group["stack_entries"])
    return _CPU_STACK_ENTRIES if device.type == "cpu" else _STACK_ENTRIES


def takes_unit(group: Mapping[str, Any], shape: torch.Size) -> bool:
    """Return whether the oracle of matrices of a shape takes them normalised.

    Not with error feedback, which needs the momentum as it is.
    """
    return not group["error_feedback"] and oracle(group, *shape[-2:]).takes_unit


def stacks(parameters: Sequence[Tensor], group: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """Yield parameters of one shape, dtype and device, as many as may be solved together.

    Args:
        parameters: Parameters of the group with a gradient.
        group: Its options.
    """
    same: dict[Any, list[list[Tensor]]] = {}
    for p in parameters:
        batches = same.setdefault((p.shape, p.dtype, p.device), [[]])
        # A CPU gains by a batch of large products alone.
        shapes = matrix_shapes(p.shape, group["layout"], group["splits"])
        gains = p.device.type != "cpu" or any(takes_unit(group, shape) for shape in shapes)
        limit = stack_entries(group, p.device) if gains else 0
        if batches[-1] and (len(batches[-1]) + 1) * p.numel() > limit:
            batches.append([])
        batches[-1].append(p)
    for batches in same.values():
        yield from batches


class Slice:
    """Some of the matrices of one parameter, as views of its tensors.

    Attributes:
        part: Number of their batch in ``to_matrices``.
        start: Place of the first of them in that batch.
        stop: Place after the last of them.
        first: Place of the first of them among all matrices of the parameter.
    """

    def __init__(self, part: int, start: int, stop: int, first: int) -> None:
        self.part, self.start, self.stop, self.first = part, start, stop, first

    def of(self, batches: Sequence[Tensor]) -> Tensor:
        """Return these matrices of a tensor's batches."""
        return batches[self.part][self.start : self.stop]


def slices(p: Tensor, momentum: Tensor, group: Mapping[str, Any]) -> list[Slice]:
    """Return slices of a parameter with more matrices than may be solved together.

    Args:
        p: The parameter, with a gradient.
        momentum: Its momentum.
        group: Options of its group.

    Returns:
        None where one slice would be all, or where matrices are no views of the tensors, so that
        the parameter has to be stepped as a whole.
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
            stop = min(start + sizes[part], count)
            found.append(Slice(part, start, stop, first + start))
        first += count
    return found


def _has_views(x: Tensor, group: Mapping[str, Any]) -> bool:
    storage = x.untyped_storage().data_ptr()
    parts = to_matrices(x, group["layout"], group["splits"])
    return all(part.untyped_storage().data_ptr() == storage for part in parts)

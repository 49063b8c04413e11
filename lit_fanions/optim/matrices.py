"""A parameter as matrices, and back: layouts, splits, and shards of a distributed tensor.

Beside ``fanion.py`` so that the rules by which a convolution, a fused QKV or a stack of experts
becomes a batch of matrices stand in one place, for the optimizer, the factory and the monitors.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Layout = Literal["flatten", "transposed", "batch"]
Splits = int | list[int] | None


def to_matrices(x: Tensor, layout: str = "flatten", splits: Splits = None) -> list[Tensor]:
    """A tensor of a parameter's shape as batches of matrices.

    Args:
        x: The tensor. With fewer than two dimensions it is one row.
        layout: ``flatten``: dimension 0 are the rows, the rest the columns, as in convolutions.
            ``transposed``: the same with dimensions 0 and 1 swapped, as in transposed
            convolutions. ``batch``: leading dimensions are separate matrices, as in experts.
        splits: Into how many equal parts, or into which sizes, dimension 0 (for ``batch`` the
            rows) is cut, each part being a matrix of its own.

    Returns:
        A tensor (count, rows, cols) for each part of unequal splits, else a single one. Views
        where strides allow.

    Raises:
        ValueError: If the splits do not fit.
    """
    if x.ndim < 2:
        x = x.reshape(1, -1)
    elif layout == "batch":
        x = x.reshape(-1, *x.shape[-2:])
    dim = 1 if layout == "batch" else 0
    return [_as_batch(part, layout) for part in _cut(x, dim, splits)]


def from_matrices(
    parts: list[Tensor], shape: torch.Size, layout: str = "flatten", splits: Splits = None
) -> Tensor:
    """The inverse of ``to_matrices``.

    Args:
        parts: What ``to_matrices`` returned, or tensors of these shapes.
        shape: Shape of the parameter.
        layout: As there.
        splits: As there.

    Returns:
        A tensor of that shape.
    """
    if len(shape) < 2:
        return parts[0].reshape(shape)
    if layout == "batch":
        count = math.prod(shape[:-2])
        parts = [part.reshape(count, -1, shape[-1]) for part in parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).reshape(shape)
    restored = []
    for part in parts:
        if layout == "transposed":  # (count, outer, inner * kernel) -> (count, inner, outer, ...)
            part = part.unflatten(2, (-1, *shape[2:])).transpose(1, 2)
        restored.append(part.reshape(-1, *shape[1:]))
    return restored[0] if len(restored) == 1 else torch.cat(restored)


def _cut(x: Tensor, dim: int, splits: Splits) -> list[Tensor]:
    """Parts with a new dimension in front of ``dim``: equal parts together, others apart."""
    rows = x.shape[dim]
    if splits is None:
        return [x.unsqueeze(dim)]
    if isinstance(splits, int):
        if splits < 1 or rows % splits:
            raise ValueError(f"splits {splits} does not divide the {rows} rows of {_shape(x)}")
        return [x.unflatten(dim, (splits, -1))]
    if sum(splits) != rows:
        raise ValueError(f"splits {splits} do not add up to the {rows} rows of {_shape(x)}")
    if len(set(splits)) == 1:
        return [x.unflatten(dim, (len(splits), -1))]
    return [part.unsqueeze(dim) for part in x.split(splits, dim)]


def _as_batch(part: Tensor, layout: str) -> Tensor:
    if layout == "batch":
        return part.flatten(0, 1)
    if layout == "transposed":
        part = part.transpose(1, 2)
    return part.flatten(2)


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def matrix_shapes(shape: torch.Size, layout: str, splits: Splits) -> list[torch.Size]:
    """The (count, rows, cols) of each batch of ``to_matrices`` for a parameter of that shape.

    Raises:
        ValueError: If the splits do not fit.
    """
    nothing = torch.empty((), device="meta").expand(shape)
    return [m.shape for m in to_matrices(nothing, layout, splits)]


# Distributed tensors: entrywise work is done on the local shard, directions on the whole matrix.


def local(x: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_grad(p: Tensor) -> Tensor:
    """This rank's shard of the gradient, placed as the parameter is.

    Tensor parallelism leaves partial sums in the gradients of replicated parameters.
    """
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def gather(shard: Tensor, like: Tensor) -> Tensor:
    """The whole tensor from every rank's shard of a tensor laid out as ``like``."""
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that every rank has, laid out as ``like``."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()

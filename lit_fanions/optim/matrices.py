"""A parameter as matrices, and back: layouts, splits, and shards of a distributed tensor.

Beside ``fanion.py`` so that the rules by which a convolution, a fused QKV or a stack of experts
becomes a batch of matrices stand in one place, for the optimizer, the factory and the monitors.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from lit_fanions.checks import whole_number

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LAYOUTS = ("flatten", "transposed", "batch", "batch_transposed")
# Equal parts or sizes of parts of the rows; {"count": n, "dim": 1}: equal parts of the columns.
Splits = int | list[int] | dict[str, int] | None


def check_splits(name: str, value: Any) -> Splits:
    """Return the splits of an option ``name``, or raise ValueError."""
    try:
        if isinstance(value, Mapping) and value.get("dim") == 1:
            return check_heads(name, value)
        if isinstance(value, (list, tuple)) and value:
            return [whole_number(name, size) for size in value]
        return whole_number(name, value)
    except ValueError:
        raise ValueError(
            f"{name} must be a number of equal parts or a list of sizes, got {value!r}"
        ) from None


def check_heads(name: str, value: Any) -> Any:
    """Return the heads of an option ``name``, or raise ValueError."""
    if value == "auto":
        return value
    with contextlib.suppress(ValueError):
        if not isinstance(value, Mapping):
            return whole_number(name, value)
        if {"count"} <= value.keys() <= {"count", "dim"} and value.get("dim", 0) in (0, 1):
            return {"count": whole_number(name, value["count"]), "dim": int(value.get("dim", 0))}
    raise ValueError(
        f"{name} must be a number, {{count, dim}} with dim 0 (rows) or 1 (columns), or auto, "
        f"got {value!r}"
    )


def to_matrices(x: Tensor, layout: str = "flatten", splits: Splits = None) -> list[Tensor]:
    """Return a tensor of a parameter's shape as batches of matrices of out x in.

    That is a tensor (count, rows, cols) for each part of unequal splits, else a single one: views
    where strides allow. A tensor of fewer than two dimensions is one row. For layout and splits see
    the options; in transposed convolutions splits cut dimension 0, as their groups do, and
    ``{"count": n, "dim": 1}`` cuts the columns of every matrix into n equal parts.

    Raises:
        ValueError: If the splits do not fit.
    """
    if isinstance(splits, dict):
        return [_cut_columns(m, splits["count"]) for m in to_matrices(x, layout)]
    if x.ndim < 2:
        return [part.flatten(2) for part in _cut(x.reshape(1, -1), 0, splits)]
    if layout in ("batch", "batch_transposed"):
        x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        x = x if layout == "batch" else x.mT
        return [part.flatten(0, 1) for part in _cut(x, 1, splits)]
    if layout == "transposed" and x.ndim > 2:
        return [part.transpose(1, 2).flatten(2) for part in _cut(x, 0, splits)]
    x = x.mT if layout == "transposed" else x
    return [part.flatten(2) for part in _cut(x, 0, splits)]


def from_matrices(
    parts: Sequence[Tensor], shape: torch.Size, layout: str = "flatten", splits: Splits = None
) -> Tensor:
    """Invert ``to_matrices``: return a tensor of a shape from parts like those that it returns."""
    if isinstance(splits, dict):
        count = splits["count"]
        whole = [part.unflatten(0, (-1, count)).transpose(1, 2).flatten(2) for part in parts]
        return from_matrices(whole, shape, layout)
    if len(shape) < 2:
        return parts[0].reshape(shape)
    if layout == "transposed" and len(shape) == 2:
        return from_matrices(parts, torch.Size((shape[1], shape[0]))).mT
    if layout == "batch_transposed":
        swapped = torch.Size((*shape[:-2], shape[-1], shape[-2]))
        return from_matrices(parts, swapped, "batch").mT
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


def _cut_columns(m: Tensor, count: int) -> Tensor:
    """Return (matrices * count, rows, columns / count) from (matrices, rows, columns)."""
    if m.shape[-1] % count:
        raise ValueError(f"{count} heads do not divide the columns of {shape_text(m[0])}")
    return m.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def inverse(order: Sequence[int]) -> list[int]:
    """Return the order that restores permuted dimensions."""
    return sorted(range(len(order)), key=order.__getitem__)


def column_blocks(options: Mapping[str, Any]) -> int:
    """Return into how many blocks of columns a group's options cut each matrix, 1 for none.

    The outputs of the blocks of one matrix are added. Slices of a parameter have the number as
    ``column_blocks``, because they are no longer split.
    """
    splits = options.get("splits")
    return splits["count"] if isinstance(splits, dict) else options.get("column_blocks", 1)


def split_into_heads(splits: Splits, heads: int | Mapping[str, int]) -> Splits:
    """Return the splits of a parameter into heads, all of one size; raise where they do not fit.

    ``splits`` are those into projections; the number of heads is that in each of them, or in the
    first of unequal ones.
    """
    count, dim = (heads, 0) if isinstance(heads, int) else (heads["count"], heads.get("dim", 0))
    if dim == 0 and not isinstance(splits, list):
        if isinstance(splits, dict):
            raise ValueError(f"heads {heads!r} of a parameter that is split into columns")
        return count * (splits or 1)
    if dim == 1:
        if splits is not None:
            raise ValueError(f"heads {heads!r} by columns of a parameter with splits {splits!r}")
        return {"count": count, "dim": 1}
    assert isinstance(splits, list)
    size, rest = divmod(splits[0], count)
    if rest or any(part % size for part in splits):
        raise ValueError(
            f"splits {splits!r} do not fall into heads as large as {count} in {splits[0]}"
        )
    return sum(splits) // size


def _cut(x: Tensor, dim: int, splits: int | list[int] | None) -> list[Tensor]:
    """Return parts with a new dimension before ``dim``: equal parts in one tensor, others apart."""
    rows = x.shape[dim]
    if splits is None:
        return [x.unsqueeze(dim)]
    if isinstance(splits, int):
        if splits < 1 or rows % splits:
            raise ValueError(f"splits {splits} does not divide the {rows} rows of {shape_text(x)}")
        return [x.unflatten(dim, (splits, rows // splits))]
    if any(size < 1 for size in splits) or sum(splits) != rows:
        raise ValueError(f"splits {splits} do not add up to the {rows} rows of {shape_text(x)}")
    if len(set(splits)) == 1:
        return [x.unflatten(dim, (len(splits), -1))]
    return [part.unsqueeze(dim) for part in x.split(splits, dim)]


def shape_text(x: Tensor) -> str:
    """Return a shape as in 4x3."""
    return "x".join(map(str, x.shape))


def matrix_shapes(shape: torch.Size, layout: str, splits: Splits) -> list[torch.Size]:
    """Return the (count, rows, cols) of each batch of ``to_matrices`` for a parameter's shape."""
    if isinstance(splits, dict):
        whole = _matrix_shapes(shape, layout, None)
        return [_cut_columns(_stand_in(batch), splits["count"]).shape for batch in whole]
    return _matrix_shapes(shape, layout, tuple(splits) if isinstance(splits, list) else splits)


def _stand_in(shape: torch.Size) -> Tensor:
    """Return a tensor of a shape, without memory."""
    return torch.empty((), device="meta", dtype=torch.float32).expand(shape)


@functools.lru_cache(maxsize=4096)
def _matrix_shapes(
    shape: torch.Size, layout: str, splits: int | tuple[int, ...] | None
) -> list[torch.Size]:
    sizes = list(splits) if isinstance(splits, tuple) else splits
    return [m.shape for m in to_matrices(_stand_in(shape), layout, sizes)]


# Distributed tensors: entrywise operations run on the local shard, directions on whole matrices.


def is_distributed(x: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor.

    The module of DTensor takes a second to import: whoever has one has loaded it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """Return this rank's shard, or the tensor itself if it is not distributed."""
    return x.to_local() if is_distributed(x) else x


def local_grad(p: Tensor) -> Tensor:
    """Return this rank's shard of the gradient, placed as the parameter is.

    Tensor parallelism leaves partial sums in the gradients of replicated parameters.
    """
    grad = p.grad
    assert grad is not None
    if is_distributed(p) and is_distributed(grad) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def chunk_bounds(total: int, parts: int, place: int) -> tuple[int, int]:
    """Return the start and end of one of the parts that torch.chunk makes of ``total`` indices."""
    size = math.ceil(total / parts)
    return min(place * size, total), min((place + 1) * size, total)


def gather(shard: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor from every rank's shard of a tensor placed as ``like``."""
    if not is_distributed(like):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()


def placed_as(x: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, whole on every rank or a DTensor of any placement, placed as ``like``."""
    if is_distributed(x):
        if is_distributed(like) and (x.device_mesh, x.placements) == (
            like.device_mesh, like.placements
        ):  # fmt: skip
            return x
        x = x.full_tensor()
    if not is_distributed(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(x.to(like.device), mesh, placements, src_data_rank=None)

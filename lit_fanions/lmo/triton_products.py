"""Symmetric products on a GPU by Triton: one triangle is computed, the other mirrored.

Apart from ``newton_schulz``, which imports this room where an option asks for it: Triton is no
dependency of the package.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _DEPTH = 128, 64


@torch.library.custom_op("lit_fanions::symmetric_product", mutates_args=("out",))
def symmetric_product(
    out: Tensor, x: Tensor, addend: Tensor | None, a: float, b: float, c: float
) -> None:
    """Write a I + b addend + c x x^T, summed in float32 and rounded once.

    The matrices x, (side, inner) or a batch of them, are float16 or bfloat16 of any strides; out
    and the symmetric addend, of which None is no such term, are contiguous.
    """
    x = x if x.ndim == 3 else x[None]
    batch, side, inner = x.shape
    tiles = triton.cdiv(side, _BLOCK)
    with torch.cuda.device_of(x):
        _symmetric_kernel[(batch * tiles * tiles,)](
            out, x, addend, side, inner, a, b, c, *x.stride(),
            BLOCK=_BLOCK, DEPTH=_DEPTH, num_warps=8, num_stages=3,
        )  # fmt: skip


@triton.jit
def _symmetric_kernel(
    out, x, addend, side, inner, a, b, c, batch_stride, row_stride, column_stride,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(side, BLOCK)
    place = tl.program_id(0) % (tiles * tiles)
    matrix = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    top, left = place // tiles, place % tiles
    if left > top:  # the mirror image of another tile
        return
    rows = (top * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (left * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    x += matrix * batch_stride
    first = x + rows[:, None] * row_stride + depth[None, :] * column_stride
    second = x + columns[None, :] * row_stride + depth[:, None] * column_stride
    total = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, inner, DEPTH):
        inside = depth < inner - start
        u = tl.load(first, mask=(rows[:, None] < side) & inside[None, :], other=0.0)
        v = tl.load(second, mask=(columns[None, :] < side) & inside[:, None], other=0.0)
        total = tl.dot(u, v, total)
        first += DEPTH * column_stride
        second += DEPTH * column_stride
    start = matrix * side * side
    offsets = start + rows[:, None] * side + columns[None, :]
    mask = (rows[:, None] < side) & (columns[None, :] < side)
    total = c * total + tl.where(rows[:, None] == columns[None, :], a, 0.0)
    if addend is not None:
        total += b * tl.load(addend + offsets, mask=mask, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + offsets, result, mask=mask)
    if left < top:
        mirrored = start + columns[:, None] * side + rows[None, :]
        mask = (columns[:, None] < side) & (rows[None, :] < side)
        tl.store(out + mirrored, tl.trans(result), mask=mask)

"""The passes over gradients, momenta and weights of a step as kernels of Triton.

The formulas are those of ``update``. Kernels read the tensors of all parameters of one shape by a
table of their addresses, so that nothing is copied into a stack. A room of its own because it
imports Triton, which is no dependency of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_fanions.optim.capturing import is_capturing

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
DTYPES = tuple(_TYPES)
_BLOCK = 2048
# Programs that share a matrix, and so partial sums of its squares.
_MOST_PROGRAMS = 256
_TINY = tl.constexpr(1.1754943508222875e-38)  # in place of 0, so that a zero matrix stays zero
# Addresses change only where gradients get other memory.
_MOST_TABLES = 1024
_tables: dict[tuple[object, ...], Tensor] = {}
_captured: list[Tensor] = []  # tables that a CUDA graph reads


@torch.library.custom_op("lit_fanions::momentum_pass", mutates_args=("momenta",))
def momentum_pass(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    finite: Tensor,
    rest: float,
    device_rest: Tensor | None,
    skip: bool,
    feedback: bool,
    nesterov: bool,
    matrices: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Update the momenta of parameters of one shape, and return N and sums of its squares.

    Momenta and gradients are contiguous, of one dtype each. ``finite`` has a bool for each, and
    with ``skip`` those that are not stepped keep their momentum. ``rest`` is 1 - momentum, unless
    ``device_rest`` has it in a 0-dimensional tensor. N has the Nesterov form if ``nesterov``.

    The results are N, (parameters * matrices, entries), with ``matrices`` of each parameter one
    behind the other; and for each of its rows the largest entry and the sum of squares over that
    entry, of the parts that programs read: (rows, 2, programs), float32.
    """
    n, partials = _empty_results(momenta, matrices, dtype)
    count, size = n.shape
    programs = partials.shape[-1]
    (old, old_aligned), (new, new_aligned) = map(_addresses, (momenta, gradients))
    with torch.cuda.device_of(n):
        _momentum_kernel[(count * programs,)](
            n, partials, old, new, finite, rest, device_rest, size, matrices, programs,
            MOMENTUM=_TYPES[momenta[0].dtype], GRADIENT=_TYPES[gradients[0].dtype],
            SKIP=skip, FEEDBACK=feedback, NESTEROV=nesterov,
            ALIGNED=old_aligned and new_aligned, BLOCK=_BLOCK,
        )  # fmt: skip
    return n, partials


@momentum_pass.register_fake
def _(momenta: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    *_, matrices, dtype = others
    return _empty_results(momenta, matrices, dtype)


def _empty_results(
    momenta: Sequence[Tensor], matrices: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, count = momenta[0], len(momenta) * matrices
    size = first.numel() // matrices
    n = first.new_empty((count, size), dtype=dtype)
    return n, n.new_empty((count, 2, _count_programs(size)), dtype=torch.float32)


def _count_programs(size: int) -> int:
    return min(_MOST_PROGRAMS, triton.cdiv(size, _BLOCK))


@torch.library.custom_op("lit_fanions::divide_by_norms", mutates_args=("n",))
def divide_by_norms(n: Tensor, partials: Tensor) -> None:
    """Divide each row of N by its Frobenius norm, in place; both are as ``momentum_pass`` returns.

    Zero stays zero; a row with a NaN or an infinity becomes NaN.
    """
    count, size = n.shape
    programs = partials.shape[-1]
    with torch.cuda.device_of(n):
        _division_kernel[(count * programs,)](
            n, partials, size, programs, PARTS=triton.next_power_of_2(programs), BLOCK=_BLOCK
        )


@torch.library.custom_op("lit_fanions::weight_pass", mutates_args=("weights", "momenta"))
def weight_pass(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    step: Tensor,
    captured: Tensor | None,
    finite: Tensor,
    norms: Tensor | None,
    radius: float,
    numbers: Sequence[float],
    device_numbers: Tensor | None,
    decays: bool,
    cautious: bool,
) -> None:
    """Decay and move weights of one shape, and subtract what was captured from their momenta.

    Weights and momenta are contiguous, of one dtype each; momenta and ``captured`` are only needed
    for error feedback. Both ``step``, which lr multiplies, and ``captured`` have as many matrices
    for each weight, and ``finite`` a bool. Matrices of the weights are scaled from their Frobenius
    ``norms``, in float32, to ``radius`` before, unless norms are None or lr on the device is 0.
    ``numbers`` are lr * factor, lr * weight decay and 1 - momentum, unless ``device_numbers`` has
    these. With ``cautious`` only entries decay that the step does not move away from 0.
    """
    count = len(step)
    size, per_weight = step.numel() // count, count // len(weights)
    programs = _count_programs(size)
    (table, aligned), (momentum_table, momenta_aligned) = _addresses(weights), (None, True)
    if captured is not None:
        momentum_table, momenta_aligned = _addresses(momenta)
    kind = momenta[0] if captured is not None else weights[0]
    with torch.cuda.device_of(step):
        _weight_kernel[(count * programs,)](
            table, momentum_table, step, captured, finite, norms, radius, *numbers, device_numbers,
            size, per_weight, programs,
            WEIGHT=_TYPES[weights[0].dtype], MOMENTUM=_TYPES[kind.dtype], DECAYS=decays,
            CAUTIOUS=cautious, ALIGNED=aligned and momenta_aligned, BLOCK=_BLOCK,
        )  # fmt: skip


def _addresses(tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Return addresses of tensors on their device, and whether all are multiples of 16 bytes.

    A table is uploaded without a wait when an address is new. While a CUDA graph captures the step
    a new table is written by kernels: the host's memory would be another when the graph is played.
    """
    pointers, device = [x.data_ptr() for x in tensors], tensors[0].device
    key = (device, *pointers)
    table = _tables.get(key)
    if table is None and is_capturing():
        table = tensors[0].new_empty(len(pointers), dtype=torch.int64)
        for place, pointer in zip(table.unbind(), pointers, strict=True):
            place.fill_(pointer)
    elif table is None:
        pinned = device.type == "cuda" and torch.cuda.is_available()
        host = torch.tensor(pointers, dtype=torch.int64, device="cpu", pin_memory=pinned)
        table = host.to(device, non_blocking=True)
        if len(_tables) >= _MOST_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = table
    elif is_capturing():
        _captured.append(table)
    return table, all(pointer % 16 == 0 for pointer in pointers)


@triton.jit
def _locate(table, parameter, offset, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to an offset in a tensor of a table of addresses."""
    start = tl.load(table + parameter).to(tl.pointer_type(TYPE))
    if ALIGNED:
        start = tl.multiple_of(start, [16])
    return start + offset


@triton.jit
def _momentum_kernel(
    n, partials, momenta, gradients, finite, rest, device_rest, size, matrices, programs,
    MOMENTUM: tl.constexpr, GRADIENT: tl.constexpr, SKIP: tl.constexpr, FEEDBACK: tl.constexpr,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    parameter, offset = matrix // matrices, (matrix % matrices).to(tl.int64) * size
    momentum = _locate(momenta, parameter, offset, MOMENTUM, ALIGNED)
    gradient = _locate(gradients, parameter, offset, GRADIENT, ALIGNED)
    stepped = tl.load(finite + parameter) != 0
    if device_rest is not None:
        rest = tl.load(device_rest).to(tl.float32)
    n += matrix.to(tl.int64) * size
    peak, squares = 0.0, 0.0
    for start in range(program * BLOCK, size, programs * BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < size
        m = tl.load(momentum + places, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + places, mask=inside, other=0.0).to(MOMENTUM).to(tl.float32)
        if SKIP:
            g = tl.where(stepped, g, 0.0 if FEEDBACK else m)
        if FEEDBACK:
            m = m + g
        else:  # lerp, from the nearer end
            m = tl.where(rest < 0.5, m + rest * (g - m), g - (1 - rest) * (g - m))
        tl.store(momentum + places, m.to(MOMENTUM), mask=inside)
        m = m.to(MOMENTUM).to(tl.float32)
        if NESTEROV:
            m = tl.where(rest <= 0.5, m + rest * (g - m), g - (1 - rest) * (g - m))
            m = m.to(MOMENTUM).to(tl.float32)
        tl.store(n + places, m.to(n.dtype.element_ty), mask=inside)
        # Squares of numbers far from 1 under- or overflow: they are taken over the largest entry.
        before = peak
        peak = tl.maximum(before, tl.maximum(tl.max(tl.abs(m), 0), _TINY))
        relative = m / peak
        squares = squares * (before / peak) * (before / peak) + tl.sum(relative * relative, 0)
    partials += matrix * 2 * programs + program
    tl.store(partials, peak)
    tl.store(partials + programs, squares)


@triton.jit
def _division_kernel(n, partials, size, programs, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    matrix, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    parts = tl.arange(0, PARTS)
    partials += matrix * 2 * programs
    peaks = tl.load(partials + parts, mask=parts < programs, other=0.0)
    squares = tl.load(partials + programs + parts, mask=parts < programs, other=0.0)
    peak = tl.max(peaks, 0)
    relative = peaks / peak
    norm = tl.sqrt(tl.sum(squares * relative * relative, 0))
    norm = tl.where(norm < _TINY, _TINY, norm)  # a maximum would drop NaN
    n += matrix.to(tl.int64) * size
    for start in range(program * BLOCK, size, programs * BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(n + places, mask=places < size, other=0.0).to(tl.float32)
        tl.store(n + places, (x / peak / norm).to(n.dtype.element_ty), mask=places < size)


@triton.jit
def _weight_kernel(
    weights, momenta, step, captured, finite, norms, radius, lr, decay, rest, device_numbers,
    size, matrices, programs,
    WEIGHT: tl.constexpr, MOMENTUM: tl.constexpr, DECAYS: tl.constexpr, CAUTIOUS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    parameter, offset = matrix // matrices, (matrix % matrices).to(tl.int64) * size
    weight = _locate(weights, parameter, offset, WEIGHT, ALIGNED)
    stepped = tl.load(finite + parameter) != 0
    if device_numbers is not None:
        lr = tl.load(device_numbers).to(tl.float32)
        decay = tl.load(device_numbers + 1).to(tl.float32)
        rest = tl.load(device_numbers + 2).to(tl.float32)
    factor = 1.0
    if norms is not None:
        norm = tl.load(norms + matrix)
        if device_numbers is None:
            factor = tl.where(norm > 0, radius / norm, 1.0)
        else:
            factor = tl.where((norm > 0) & (lr != 0), radius / norm, 1.0)
    begin = matrix.to(tl.int64) * size
    for start in range(program * BLOCK, size, programs * BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = (places < size) & stepped
        w = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(step + begin + places, mask=inside, other=0.0).to(WEIGHT).to(tl.float32)
        if norms is not None:
            w = w * factor
        moved = w
        if DECAYS:
            part = w
            if CAUTIOUS:
                agree = ((w >= 0) & (d >= 0)) | ((w <= 0) & (d <= 0))
                part = tl.where(agree, w, 0.0)
            moved = w - decay * part
        tl.store(weight + places, (moved - lr * d).to(WEIGHT), mask=inside)
        if captured is not None:
            momentum = _locate(momenta, parameter, offset, MOMENTUM, ALIGNED) + places
            m = tl.load(momentum, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(captured + begin + places, mask=inside, other=0.0)
            m = m - rest * c.to(MOMENTUM).to(tl.float32)
            tl.store(momentum, m.to(MOMENTUM), mask=inside)

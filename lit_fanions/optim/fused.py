"""The passes of a step around its solver by kernels of Triton, for the option ``kernels``.

The formula is that of ``update``, which stays the reference. Kernels take contiguous tensors of a
GPU whose matrices lie one behind the other; other parameters are stepped without them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_fanions.checks import check_choice
from lit_fanions.lmo import polar_dtype
from lit_fanions.optim.adapting import splits_momentum
from lit_fanions.optim.matrices import column_blocks, is_distributed, to_matrices
from lit_fanions.optim.stacking import share_memory, stacked
from lit_fanions.optim.update import Batch, Group, Piece, Solved, find_oracle, is_zero, renormalises

KERNELS = ("plain", "triton")


def check_kernels(name: str, value: Any) -> str:
    """Return the kernels of an option ``name``, or raise ValueError."""
    check_choice(name, value, KERNELS)
    if value == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError(f"{name}='triton' needs Triton: pip install triton, or choose plain")
    return str(value)


def takes_kernels(pieces: Sequence[Piece], group: Group) -> bool:
    """Return whether kernels of Triton step pieces of one shape."""
    first = pieces[0]
    if group["kernels"] != "triton" or first.weight.device.type != "cuda" or splits_momentum(group):
        return False
    from lit_fanions.optim.triton_passes import DTYPES

    m, *others = _matrices(first.weight, group)
    lies_as_matrices = m.is_contiguous() and share_memory(m, first.weight)
    if others or not lies_as_matrices or is_distributed(first.parameter):
        return False
    tensors = zip(*((p.weight, p.gradient, p.momentum) for p in pieces), strict=True)
    return all(
        same[0].dtype in DTYPES
        and all(x.dtype == same[0].dtype and x.is_contiguous() for x in same)
        for same in tensors
    )


def update_by_kernels(pieces: Sequence[Piece], group: Group) -> list[Batch]:
    """Update the momenta of pieces of one shape and return the N of all their matrices."""
    from lit_fanions.optim.triton_passes import divide_by_norms, momentum_pass

    (like,) = _matrices(pieces[0].momentum, group)
    oracle, unit = find_oracle(like, group)
    rest = 1 - group["momentum"]
    n, partials = momentum_pass(
        [piece.momentum for piece in pieces],
        [piece.gradient for piece in pieces],
        stacked([piece.finite for piece in pieces]),
        *((0.0, rest) if isinstance(rest, Tensor) else (rest, None)),
        skip=group["nonfinite"] == "skip",
        feedback=group["error_feedback"],
        nesterov=group["nesterov"] and not group["error_feedback"],
        matrices=len(like),
        dtype=polar_dtype(like, group["polar"]) if unit else like.dtype,
    )
    if unit:
        divide_by_norms(n, partials)
    return [Batch(n.view(-1, *like.shape[-2:]), oracle, unit, overwrite=True)]


def apply_by_kernels(pieces: Sequence[Piece], solved: Sequence[Solved], group: Group) -> None:
    """Apply the directions of a batch of ``update_by_kernels``, not scaled by a number yet."""
    from lit_fanions.optim.triton_passes import weight_pass

    (answer,) = solved
    feedback = answer.captured is not None
    if is_zero(group["lr"]) and not feedback:
        return
    numbers, device_numbers = _numbers(group, answer.rest)
    norms, radius = _renormalisation(pieces, group)
    weight_pass(
        [piece.weight for piece in pieces],
        [piece.momentum for piece in pieces] if feedback else [],
        answer.direction.contiguous(),
        None if answer.captured is None else answer.captured.contiguous(),
        stacked([piece.finite for piece in pieces]),
        norms,
        radius,
        numbers,
        device_numbers,
        decays=not is_zero(group["weight_decay"]),
        cautious=group["cautious_decay"],
    )


def _matrices(x: Tensor, group: Group) -> list[Tensor]:
    return to_matrices(x, group["layout"], group["splits"])


def _renormalisation(pieces: Sequence[Piece], group: Group) -> tuple[Tensor | None, float]:
    """Return the norms of all matrices, None without renormalisation, and the norm to be had."""
    if not renormalises(group):
        return None, 0.0
    matrices = [m for piece in pieces for m in _matrices(piece.weight, group)[0].unbind()]
    norms = torch.stack(list(torch._foreach_norm(matrices, 2, dtype=torch.float32)))
    return norms, math.sqrt(matrices[0].shape[-2] / column_blocks(group))


def _numbers(group: Group, rest: float) -> tuple[list[float], Tensor | None]:
    """Return lr * rest, lr * weight decay and 1 - momentum, on the device if lr is there."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    numbers = [lr * rest, lr * group["weight_decay"], 1 - group["momentum"]]
    if not isinstance(lr, Tensor):
        return numbers, None
    return [0.0] * len(numbers), torch.stack([torch.as_tensor(x).to(lr) for x in numbers])

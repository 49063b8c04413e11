"""One step of matrices, in the order of its formula.

With the gradient G, the momentum M and the weight W::

    M <- momentum * M + (1 - momentum) * G
    W <- (1 - lr * weight_decay) * W - lr * scale * D(N)

``update_momentum`` makes M and N, ``solve`` the direction D, which ``adapt`` may divide by a second
moment or ``leading`` join with a step of Adam, ``size_factor`` the s, and ``apply`` the new W.
Which matrices are stepped together, and with which state, is in ``matrix_step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo import Oracle, frobenius_norm, polar_dtype, scaling
from lit_fanions.optim import algorithms
from lit_fanions.optim.adapting import adapt
from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.bases import State, next_basis
from lit_fanions.optim.leading import join_leading, split_leading
from lit_fanions.optim.matrices import (
    column_blocks,
    from_matrices,
    gather,
    is_distributed,
    local,
    local_grad,
    placed_as,
    to_matrices,
)
from lit_fanions.optim.stacking import share_memory, stack_entries, takes_unit
from lit_fanions.optim.step_sizes import MATCHED_RMS, step_size_factor


class Piece(NamedTuple):
    """A parameter, or a slice of its matrices: the tensors that a step reads and writes."""

    parameter: Tensor
    weight: Tensor  # this rank's shard of the parameter, or (count, rows, cols) of it
    gradient: Tensor  # the gradient, of the same shape
    momentum: Tensor  # the momentum M, of the same shape
    finite: Tensor  # whether it is stepped, a 0-dimensional bool
    state: State  # the state of the parameter, or views of it for the slice

    @classmethod
    def whole(cls, p: Tensor, state: State, finite: Tensor) -> Piece:
        """Return a parameter as a piece."""
        return cls(p, local(p), local_grad(p), local(state["momentum"]), finite, state)


class Batch(NamedTuple):
    """The N of matrices of one shape, and how they are solved."""

    m: Tensor  # matrices, (matrices, rows, cols); normalised where the oracle takes them so
    oracle: Oracle
    unit: bool  # whether they are normalised
    overwrite: bool  # whether the memory of m may be used
    gradient: Tensor | None = None  # gradients of the matrices; None unless ``adapt`` needs them


def make_batch(m: Tensor, group: Group, overwrite: bool) -> Batch:
    """Return the N of matrices (matrices, rows, cols) as their oracle takes them."""
    oracle, unit = find_oracle(m, group)
    # Normalising copies a momentum, which must not be overwritten.
    return Batch(normalised(m, group) if unit else m, oracle, unit, unit or overwrite)


class Solved(NamedTuple):
    """Directions of a batch of matrices."""

    direction: Tensor  # factor / rest * D, (matrices, rows, cols)
    factor: Tensor | float  # the step-size factor s: a number, or (matrices, 1, 1)
    # The part of the momentum that error feedback subtracts; None without it.
    captured: Tensor | None = None
    basis: Tensor | None = None  # the basis for the next step; None without one
    moment: Tensor | None = None  # the second moment after this step; None without ``adapt``
    rest: float = 1.0  # what the step multiplies directions by beside lr, which saves a pass


def update_momentum(piece: Piece, group: Group, dtype: torch.dtype | None = None) -> Tensor:
    """Update M and return N, the Nesterov form of it if the group has that.

    Error feedback accumulates, M <- M + G, and N is M. A gradient that is skipped leaves M as it
    is. The Nesterov form may be written in another dtype.
    """
    gradient = usable_gradient(piece, group)
    if group["error_feedback"]:
        piece.momentum.add_(gradient)
    else:
        piece.momentum.lerp_(gradient, _weight(1 - group["momentum"], gradient))
    return _nesterov(gradient, piece.momentum, group, dtype)


def observed_momentum(piece: Piece, group: Group) -> Tensor:
    """Return N once more: the memory of the first one may be overwritten by now."""
    n = _nesterov(usable_gradient(piece, group), piece.momentum, group)
    return n.clone() if n is piece.momentum else n


def usable_gradient(piece: Piece, group: Group) -> Tensor:
    """Return the gradient, or if it is skipped a stand-in that leaves the momentum unchanged."""
    gradient = piece.gradient.to(piece.momentum.dtype)
    # A CPU can look at the flag without waiting.
    if group["nonfinite"] == "skip" and (gradient.device.type != "cpu" or not piece.finite):
        stand_in = 0.0 if group["error_feedback"] else piece.momentum
        gradient = torch.where(piece.finite, gradient, stand_in)
    return gradient


def _nesterov(
    gradient: Tensor, momentum: Tensor, group: Group, dtype: torch.dtype | None = None
) -> Tensor:
    if group["error_feedback"] or not group["nesterov"]:
        return momentum
    # Both are needed later: not in place.
    if isinstance(group["momentum"], Tensor):
        # The weight has the tensors' dtype: a momentum of .999 would be 1 in bfloat16.
        return momentum.lerp(gradient, _weight(1 - group["momentum"], gradient))
    out = None if dtype is None else torch.empty_like(gradient, dtype=dtype)
    return torch.lerp(gradient, momentum, group["momentum"], out=out)


def _weight(number: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a weight of ``lerp``: a number, or a tensor in the dtype of the tensors."""
    return number.to(like.dtype) if isinstance(number, Tensor) else number


def find_oracle(m: Tensor, group: Group) -> tuple[Oracle, bool]:
    """Return the oracle of matrices (..., rows, cols), and whether it gets them normalised."""
    oracle = algorithms.oracle(group, *m.shape[-2:])
    return oracle, takes_unit(oracle, group)


def dtype_of_n(piece: Piece, group: Group) -> torch.dtype | None:
    """Return the dtype in which N of a piece is written; None: the momentum's.

    An accelerator rounds to the solver's before it normalises, which reads and writes less.
    """
    if piece.weight.device.type == "cpu" or is_distributed(piece.parameter):
        return None
    like, *others = to_matrices(piece.momentum, group["layout"], group["splits"])
    unit = find_oracle(like, group)[1] and not others
    return polar_dtype(like, group["polar"]) if unit else None


def normalised(m: Tensor, group: Group) -> Tensor:
    """Return the N of matrices with Frobenius norm 1, in the dtype of the solver."""
    dtype = polar_dtype(m, group["polar"])
    return scaling.normalised(m, dtype=dtype, overwrite=group["nesterov"])


def solve(
    batch: Batch, basis: Tensor | None, moment: Tensor | None, group: Group, scaled: bool = True
) -> Solved:
    """Return the scaled directions of a batch, in slices that the memory limit allows.

    The basis starts the solver, (matrices, cols, columns); ``moment`` has the second moments for
    ``adapt``. Unless ``scaled``, directions are not multiplied by a factor that is a number.
    """
    leading = None
    if batch.gradient is not None:
        assert moment is not None
        leading = split_leading(batch.m, batch.gradient, moment, group)
        moment, batch = leading.state, batch._replace(m=leading.rest, overwrite=True)
    size = max(1, stack_entries(group, batch.m.device) // batch.m[0].numel())
    ms = batch.m.split(size)
    bases = [None] * len(ms) if basis is None else basis.split(size)
    answers = [_direction(batch._replace(m=m), b, group) for m, b in zip(ms, bases, strict=True)]
    d, captured, after = (_joined(parts) for parts in zip(*answers, strict=True))
    assert d is not None
    if leading is not None:
        d = join_leading(d, leading, batch.oracle.length, group)
    elif moment is not None:
        d, moment = adapt(d, moment, group)
    factor = size_factor(d, batch.oracle, group)
    if not scaled and not isinstance(factor, Tensor):
        return Solved(d, factor, captured, after, moment, rest=factor)
    if isinstance(factor, Tensor) or factor != 1:
        d = scaling.multiplied(d, factor)
    return Solved(d, factor, captured, after, moment)


def _direction(
    batch: Batch, basis: Tensor | None, group: Group
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return D, what error feedback captures of N, and the next basis."""
    feedback, oracle, m = group["error_feedback"], batch.oracle, batch.m
    k = oracle.ball.solved_rank(oracle.case)
    cold = k is not None and basis is None
    answer = oracle.solve(
        m,
        warm_start=basis,
        generator=torch.Generator().manual_seed(group["seed"]) if cold else None,
        unit=batch.unit,
        overwrite=batch.overwrite and not feedback,
    )
    # All of m where the rank has been clamped to full. A copy, because m may be the momentum
    # itself, and torch refuses to subtract a tensor from a view of itself with other strides.
    captured = m.clone() if feedback and k is None else None
    if answer.triplets is None:
        return answer.direction, captured, None
    if feedback and k is not None:
        u, s, vh = answer.triplets
        captured = (u[..., :k] * s[..., None, :k]) @ vh[..., :k, :]
    after = None if basis is None else next_basis(answer.triplets, basis)
    return answer.direction, captured, after


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the parts of a batch in one tensor, or None for parts of None."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) > 1 else known[0] if known else None


def size_factor(
    d: Tensor, oracle: Oracle, group: Group, norm_of: Callable[[Tensor], Tensor] = frobenius_norm
) -> Tensor | float:
    """Return the step-size factor of directions (matrices, rows, cols), or of strips of them.

    It is a number, or (matrices, 1, 1) where it depends on the directions, whose Frobenius norms,
    of that shape, ``norm_of`` returns.
    """
    factor = static_factor(oracle, group)
    if factor is not None:
        return factor
    norm = norm_of(d)
    root = math.sqrt(oracle.case.rows * oracle.case.cols)
    return MATCHED_RMS / (torch.where(norm == 0, 1.0, norm) / root)


def static_factor(oracle: Oracle, group: Group) -> float | None:
    """Return the step-size factor of all directions; None where it depends on the direction."""
    rows, cols = oracle.case.rows, oracle.case.cols
    return step_size_factor(group["scale"], rows, cols, oracle.length, column_blocks(group))


def renormalises(group: Group) -> bool:
    """Return whether the step may renormalise weights: not where lr is the number 0."""
    return bool(group["renormalize"]) and not is_zero(group["lr"])


def renormalise(matrices: Sequence[Tensor], finite: Tensor, group: Group) -> None:
    """Scale matrices (count, rows, cols) to Frobenius norm sqrt(rows) in place, where stepped.

    Blocks of columns have equal parts of the norm of the matrix that they make up.
    """
    lr, blocks = group["lr"], column_blocks(group)
    stepped = finite & (lr != 0) if isinstance(lr, Tensor) else finite
    for m in matrices:
        # In float32: bfloat16 would round the factor to 1. A norm of 0 says to leave the matrix.
        norm, length = frobenius_norm(m) * stepped, math.sqrt(m.shape[-2] / blocks)
        # A number over a tensor would be two launches.
        on_cpu = m.device.type == "cpu"
        factor = length / norm if on_cpu else norm.new_tensor(length, device="cpu").div(norm)
        m.mul_(factor.nan_to_num_(nan=1.0, posinf=1.0))


def apply_each(piece: Piece, solved: Sequence[Solved], group: Group) -> None:
    """Apply the directions of all matrices of a piece to this rank's shard of it."""
    layout, splits, like = group["layout"], group["splits"], piece.parameter
    shape = like.shape if is_distributed(like) else piece.weight.shape

    def shard(parts: list[Tensor]) -> Tensor:
        return local(placed_as(from_matrices(parts, shape, layout, splits), like))

    if renormalises(group):
        matrices = to_matrices(gather(piece.weight, like), layout, splits)
        renormalise(matrices, piece.finite, group)
        if not all(share_memory(m, piece.weight) for m in matrices):
            piece.weight.copy_(shard(matrices))
    captured = [answer.captured for answer in solved if answer.captured is not None]
    step = shard([answer.direction for answer in solved])
    apply(piece, step, shard(captured) if captured else None, group, solved[0].rest)


def apply(
    piece: Piece, step: Tensor, captured: Tensor | None, group: Group, rest: float = 1.0
) -> None:
    """Decay and move the weight, and subtract what was captured from the momentum.

    Decay and step of a 16-bit weight are added in float32 and rounded together. Where their sum is
    below half the spacing of the weight's numbers, the weight stays as it is.

    ``step`` is factor / rest * D and ``captured`` what error feedback captures, if there is any,
    both of the shape of the weight; ``rest`` multiplies the step beside lr.
    """
    weight, momentum, lr = piece.weight, piece.momentum, group["lr"]
    if captured is not None:
        _add(momentum, captured, piece.finite, group["momentum"] - 1)
    if is_zero(lr):
        return
    if is_zero(group["weight_decay"]):
        _add(weight, step, piece.finite, -lr * rest)
        return
    decay = lr * group["weight_decay"]
    if weight.dtype.itemsize < 4:
        # A decay that is rounded by itself is lost where it is below half the weight's spacing.
        moved = _decayed(weight, step, piece.finite, decay, group["cautious_decay"])
        _add(moved, step.to(weight.dtype), piece.finite, -lr * rest)
        weight.copy_(moved)
        return
    decayed = _agreeing(weight, step) if group["cautious_decay"] else weight
    _add(weight, decayed, piece.finite, -decay)
    _add(weight, step, piece.finite, -lr * rest)


def _decayed(
    weight: Tensor, step: Tensor, finite: Tensor, decay: float | Tensor, cautious: bool
) -> Tensor:
    """Return a 16-bit weight in float32, decayed where finite."""
    if cautious:
        moved = weight.float()
        _add(moved, _agreeing(weight, step), finite, -decay)
        return moved
    factor = (1 - finite.float() * decay).float()
    # With dimensions, or the product would be in 16 bits.
    return weight * (factor if factor.ndim else factor.view([1] * weight.ndim))


def _agreeing(weight: Tensor, step: Tensor) -> Tensor:
    """Return the entries of the weight that the step does not move away from 0; 0 for others."""
    return torch.where(weight.sign() * step.sign() >= 0, weight, 0.0)


def is_zero(number: float | Tensor) -> bool:
    """Return whether a number is 0; a tensor counts as another number, as looking would wait."""
    return not isinstance(number, Tensor) and number == 0


def _add(x: Tensor, y: Tensor, finite: Tensor, factor: float | Tensor) -> None:
    """Add factor * y to x where finite."""
    # Rounded to x first, as the fused kernels of torch.optim take updates.
    y = y if torch.promote_types(x.dtype, y.dtype) == x.dtype else y.to(x.dtype)
    if isinstance(factor, Tensor):
        gate = (finite * factor).to(torch.promote_types(x.dtype, torch.float32))
        # With dimensions, or a bfloat16 x would round it.
        x.addcmul_(y, gate if gate.ndim else gate.view([1] * x.ndim))
    else:
        x.addcmul_(y, finite, value=factor)

r"""One step of matrices, in the order of its formula.

.. math::
    M \leftarrow \mu M + (1 - \mu) G, \quad
    W \leftarrow (1 - \eta \lambda) W - \eta \, s \, D(N)

``update_momentum`` makes M and N, ``solve`` the direction D, which ``adapt`` may divide by a second
moment, ``size_factor`` the s, and ``apply`` the new W. Which matrices are stepped together, and
with which state, is in ``matrix_step``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo import Oracle, frobenius_norm
from lit_fanions.optim.adapting import adapt
from lit_fanions.optim.bases import next_basis
from lit_fanions.optim.stacking import stack_entries, takes_unit
from lit_fanions.optim.step_sizes import MATCHED_RMS, step_size_factor

Group = Mapping[str, Any]


class Piece(NamedTuple):
    """The tensors of one parameter, or of a slice of its matrices, that a step reads and writes.

    Attributes:
        weight: This rank's shard of the parameter, or (count, rows, cols) of it.
        gradient: The gradient, of the same shape.
        momentum: The momentum M, of the same shape.
        finite: Whether the parameter is stepped, a 0-dimensional bool.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    finite: Tensor


class Solved(NamedTuple):
    """Directions of a batch of matrices.

    Attributes:
        direction: factor * D, (matrices, rows, cols).
        factor: The step-size factor s: a number, or (matrices, 1, 1).
        captured: The part of the momentum that error feedback subtracts; None without it.
        basis: The basis for the next step; None without one.
        moment: The second moment after this step; None without ``adapt``.
    """

    direction: Tensor
    factor: Tensor | float
    captured: Tensor | None = None
    basis: Tensor | None = None
    moment: Tensor | None = None


def update_momentum(piece: Piece, group: Group) -> Tensor:
    """Update M and return N, the Nesterov form of it if the group has that.

    Error feedback accumulates, M <- M + G, and N is M. A gradient that is skipped leaves M as it
    is.
    """
    gradient = _usable_gradient(piece, group)
    if group["error_feedback"]:
        piece.momentum.add_(gradient)
    else:
        piece.momentum.lerp_(gradient, 1 - group["momentum"])
    return _nesterov(gradient, piece.momentum, group)


def observed_momentum(piece: Piece, group: Group) -> Tensor:
    """Recompute N: its memory may be overwritten by now."""
    n = _nesterov(_usable_gradient(piece, group), piece.momentum, group)
    return n.clone() if n is piece.momentum else n


def _usable_gradient(piece: Piece, group: Group) -> Tensor:
    """Return the gradient, or if it is skipped a stand-in that leaves the momentum unchanged."""
    gradient = piece.gradient.to(piece.momentum.dtype)
    # A CPU can look at the flag without waiting.
    if group["nonfinite"] == "skip" and (gradient.device.type != "cpu" or not piece.finite):
        stand_in = 0.0 if group["error_feedback"] else piece.momentum
        gradient = torch.where(piece.finite, gradient, stand_in)
    return gradient


def _nesterov(gradient: Tensor, momentum: Tensor, group: Group) -> Tensor:
    if group["error_feedback"] or not group["nesterov"]:
        return momentum
    return gradient.lerp(momentum, group["momentum"])  # both are needed later: not in place


def solve(
    m: Tensor,
    basis: Tensor | None,
    moment: Tensor | None,
    solver: Oracle,
    group: Group,
    overwrite: bool,
) -> Solved:
    """Return the scaled directions of a batch, in slices that the memory limit allows.

    Args:
        m: Matrices, (matrices, rows, cols); normalised where ``takes_unit``.
        basis: Start of their solver, (matrices, cols, columns); None without one.
        moment: Second moments of their directions; None without ``adapt``.
        solver: Their oracle.
        group: Options of their group.
        overwrite: Whether the memory of m may be used.
    """
    size = max(1, stack_entries(group, m.device) // m[0].numel())
    ms = m.split(size)
    bases = [None] * len(ms) if basis is None else basis.split(size)
    answers = [_direction(x, b, solver, group, overwrite) for x, b in zip(ms, bases, strict=True)]
    d, captured, after = (_joined(parts) for parts in zip(*answers, strict=True))
    assert d is not None
    if moment is not None:
        d, moment = adapt(d, moment, group)
    factor = size_factor(d, solver, group)
    d = d if isinstance(factor, float) and factor == 1 else d.mul_(factor)
    return Solved(d, factor, captured, after, moment)


def _direction(
    m: Tensor, basis: Tensor | None, solver: Oracle, group: Group, overwrite: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return D, what error feedback captures of m, and the next basis."""
    feedback = group["error_feedback"]
    k = solver.ball.solved_rank(solver.case)
    answer = solver.solve(
        m,
        warm_start=basis,
        generator=_cold_generator(group["seed"]) if k and basis is None else None,
        unit=takes_unit(group, m.shape),
        overwrite=overwrite and not feedback,
    )
    triplets = answer.triplets
    captured = None
    if feedback and (k is None or triplets is None):
        captured = m  # the rank has been clamped to full
    elif feedback and triplets is not None:
        u, s, vh = triplets
        captured = (u[..., :k] * s[..., None, :k]) @ vh[..., :k, :]
    if triplets is None:
        return answer.direction, captured, None
    return answer.direction, captured, None if basis is None else next_basis(triplets, basis)


def _cold_generator(seed: int) -> torch.Generator:
    """Return the generator of solvers that start anew at every step."""
    return torch.Generator().manual_seed(seed)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the parts of a batch in one tensor, or None for parts of None."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) > 1 else known[0] if known else None


def size_factor(d: Tensor, solver: Oracle, group: Group) -> Tensor | float:
    """Return the step-size factor of directions (matrices, rows, cols).

    Returns:
        A number, or (matrices, 1, 1) where it depends on the directions.
    """
    rows, cols = d.shape[-2:]
    factor = step_size_factor(group["scale"], rows, cols, solver.length)
    if factor is not None:
        return factor
    norm = frobenius_norm(d)
    root_mean_square = torch.where(norm == 0, 1.0, norm) / math.sqrt(rows * cols)
    return MATCHED_RMS / root_mean_square


def apply(piece: Piece, step: Tensor, captured: Tensor | None, group: Group) -> None:
    """Decay and move the weight, and subtract what was captured from the momentum.

    Args:
        piece: Weight, momentum and flag.
        step: factor * D, of the shape of the weight.
        captured: What error feedback captures, of the same shape; None without it.
        group: Options.
    """
    weight, momentum, lr = piece.weight, piece.momentum, group["lr"]
    gate = piece.finite.float()
    if captured is not None:
        gain = group["momentum"] - 1
        momentum.addcmul_(captured.to(momentum.dtype), gate.to(momentum.dtype), value=gain)
    if lr == 0:
        return
    if group["weight_decay"]:
        weight.addcmul_(weight, gate.to(weight.dtype), value=-lr * group["weight_decay"])
    weight.addcmul_(step.to(weight.dtype), gate.to(weight.dtype), value=-lr)


def renormalised(m: Tensor, finite: Tensor) -> Tensor:
    """Return matrices scaled to Frobenius norm sqrt(rows); as they are where not stepped.

    Args:
        m: Matrices, (count, rows, cols).
        finite: Whether they are stepped, a 0-dimensional bool.
    """
    norm = frobenius_norm(m)
    factor = torch.where((norm > 0) & finite, math.sqrt(m.shape[-2]) / norm, 1.0)
    return (m * factor).to(m.dtype)  # the factor in float32: bfloat16 would round it to 1

"""What monitors are shown of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.matrices import gather, inverse, to_matrices
from lit_fanions.optim.update import Piece, Solved, apply_each, observed_momentum


class Observation(NamedTuple):
    """What a step did to matrices of one shape of one parameter, for monitors.

    The tensors are to be read, and only during the call: some are the optimizer's own memory.
    Distributed parameters are shown whole. A tensor of matrices is (count, rows, cols).

    Attributes:
        parameter: The parameter.
        group: Its group's options, lr among them.
        first: Place of the first of these matrices among all of the parameter's.
        gradient: The gradient, as the step found it.
        momentum: What the oracle was given: the momentum, or its Nesterov form. Where the step was
            skipped because of its gradient, the momentum as it was.
        direction: The direction times ``factor``; what was subtracted is lr times it.
        factor: The step-size factor: a number, or (count, 1, 1).
        captured: The part of the momentum that error feedback subtracts; None without it.
        before: The weights before the step.
        after: The weights after it: decay and renormalisation have changed them too.
        finite: Whether the parameter was stepped, a 0-dimensional bool.
        skipped: How many of its steps have been left out so far, 0-dimensional.
    """

    parameter: Tensor
    group: Group
    first: int
    gradient: Tensor
    momentum: Tensor
    direction: Tensor
    factor: Tensor | float
    captured: Tensor | None
    before: Tensor
    after: Tensor
    finite: Tensor
    skipped: Tensor


Observer = Callable[[Observation], None]
_MATRICES = ("gradient", "momentum", "direction", "captured", "before", "after")


def shown_in_given_order(
    observe: Observer, shape: torch.Size, order: Sequence[int] | None
) -> Observer:
    """Return an observer of matrices whose columns are in an order of memory.

    It shows ``observe`` the columns in the order of the parameter's shape. ``order`` is that of the
    dimensions in memory; None: of the shape itself.
    """
    if order is None:
        return observe

    def columns(m: Tensor | None) -> Tensor | None:
        if m is None:
            return None
        moved = m.unflatten(-1, [shape[i] for i in order[1:]])
        return moved.permute(0, *(i + 1 for i in inverse(order))).flatten(2)

    def show(observation: Observation) -> None:
        given: dict[str, Any] = {x: columns(getattr(observation, x)) for x in _MATRICES}
        observe(observation._replace(**given))

    return show


def observe_step(
    piece: Piece, solved: Sequence[Solved], group: Group, observers: Sequence[Observer]
) -> None:
    """Apply directions to a piece, whose momentum has been updated.

    Observers are shown its matrices, whole, a batch of ``to_matrices`` a call.
    """
    if not observers:
        apply_each(piece, solved, group)
        return

    def matrices(shard: Tensor) -> list[Tensor]:
        return to_matrices(gather(shard, piece.parameter), group["layout"], group["splits"])

    # The step may overwrite all of these.
    captured = [None if x.captured is None else x.captured.clone() for x in solved]
    momenta = matrices(observed_momentum(piece, group))
    gradients, before = matrices(piece.gradient), matrices(piece.weight.clone())
    apply_each(piece, solved, group)
    first = 0
    for i, (after, answer) in enumerate(zip(matrices(piece.weight), solved, strict=True)):
        observation = Observation(
            piece.parameter, group, first, gradients[i], momenta[i], answer.direction,
            answer.factor, captured[i], before[i], after, piece.finite, piece.state["skipped"],
        )  # fmt: skip
        for observe in observers:
            observe(observation)
        first += len(after)

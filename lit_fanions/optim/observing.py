"""What monitors are shown of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

Options = Mapping[str, Any]


class Observation(NamedTuple):
    """What a step did to matrices of one shape of one parameter, for monitors.

    The tensors are to be read, and only during the call: some are the optimizer's own memory.
    Distributed parameters are shown whole. A tensor of matrices is (count, rows, cols).

    Attributes:
        parameter: The parameter.
        group: Its group's options, lr among them.
        first: Place of the first of these matrices among all of the parameter's.
        gradient: The gradient, as the step found it.
        momentum: What the direction is taken of, the Nesterov form if the group has it. Where the
            gradient is broken and the step skipped, the momentum as it was.
        direction: The direction times ``factor``; what was subtracted is lr times it.
        factor: The step-size factor: a number, or (count, 1, 1).
        captured: The part of the momentum that error feedback takes away; None without it.
        before: The weights before the step.
        after: The weights after it: decay and renormalisation have changed them too.
        finite: Whether the parameter was stepped, a 0-dimensional bool.
        skipped: How many of its steps have been left out so far, 0-dimensional.
    """

    parameter: Tensor
    group: Options
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

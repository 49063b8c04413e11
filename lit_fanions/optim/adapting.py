"""Transforms between direction and step that have a state of their own: second moments of D.

A transform is a function and a row of ``TRANSFORMS``. Its state is a tensor for each batch of a
parameter's matrices, under the key ``secondN`` of the parameter's state. The length of every
direction is kept, so that the step-size rules mean the same with and without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_fanions.lmo import frobenius_norm
from lit_fanions.optim.matrices import matrix_shapes

State = dict[str, Tensor]


@dataclass(frozen=True)
class Transform:
    """A transform of directions by a second moment.

    Attributes:
        shape: Maps the shape of a batch of matrices, (count, rows, cols), to that of the moment.
        moment: Maps squared directions, (count, rows, cols), to what the moment averages.
    """

    shape: Callable[[torch.Size], tuple[int, ...]]
    moment: Callable[[Tensor], Tensor]


TRANSFORMS: dict[str, Transform] = {
    # NorMuon, arXiv 2510.05491: one learning rate for each row (neuron).
    "rows": Transform(
        lambda shape: (*shape[:-1], 1), lambda squares: squares.mean(-1, keepdim=True)
    ),
    # AdaMuon, arXiv 2507.11005, without its sign before the polar factor: one for each entry.
    "entries": Transform(tuple, lambda squares: squares),
}
NAMES = ("none", *TRANSFORMS)
if TYPE_CHECKING:
    Adapt = str
else:
    Adapt = Literal[NAMES]


def moment_key(part: int) -> str:
    """Return the key of the second moment of a parameter's batch of matrices in its state."""
    return f"second{part}"


def first_moments(p: Tensor, group: Mapping[str, Any]) -> State:
    """Return second moments of zero for a parameter, by their keys; none without a transform."""
    if group["adapt"] == "none":
        return {}
    shape_of = TRANSFORMS[group["adapt"]].shape
    shapes = matrix_shapes(p.shape, group["layout"], group["splits"])
    return {
        moment_key(part): torch.zeros(shape_of(shape), dtype=torch.float32, device=p.device)
        for part, shape in enumerate(shapes)
    }


def gather_moments(
    states: Sequence[State], shape: torch.Size, part: int, group: Mapping[str, Any]
) -> Tensor | None:
    """Return the moments of a batch of matrices of several parameters; None without a transform.

    Options may have changed since they were stored: those of another shape start at zero, and
    without a transform they are dropped.

    Args:
        states: State of each parameter.
        shape: Shape of their matrices, (matrices, rows, cols), equally many for each.
        part: Number of the batch in ``to_matrices``.
        group: Options of the group.
    """
    key = moment_key(part)
    if group["adapt"] == "none":
        for state in states:
            state.pop(key, None)
        return None
    count = shape[0] // len(states)
    wanted = TRANSFORMS[group["adapt"]].shape(torch.Size((count, *shape[1:])))
    for state in states:
        if key not in state or state[key].shape != wanted:
            device = state["momentum"].device
            state[key] = torch.zeros(wanted, dtype=torch.float32, device=device)
    return torch.cat([state[key] for state in states])


def adapt(d: Tensor, moment: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return D divided by the root of its second moment, of the length of D, and the new moment.

    Args:
        d: Directions, (matrices, rows, cols).
        moment: Their second moments before this step.
        group: Options of the group: ``adapt``, ``beta2`` and ``eps``.
    """
    squares = TRANSFORMS[group["adapt"]].moment(d.float().square())
    moment = moment.lerp(squares, 1 - group["beta2"])
    adapted = d.float() / (moment.sqrt() + group["eps"])
    before, after = frobenius_norm(d), frobenius_norm(adapted)
    return (adapted * (before / torch.where(after == 0, 1.0, after))).to(d.dtype), moment

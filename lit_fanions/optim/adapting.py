"""Transforms between direction and step that have a state of their own, such as second moments.

A transform is a row of ``TRANSFORMS``. Its state is a tensor for each batch of a
parameter's matrices, under the key ``secondN`` of the parameter's state. The length of every
direction is kept, so that the step-size rules mean the same with and without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo.scaling import multiplied
from lit_fanions.optim.matrices import matrix_shapes


@dataclass(frozen=True)
class Transform:
    """A division of directions by the root of their second moment.

    Attributes:
        shape: Maps the shape of a batch of matrices, (count, rows, cols), to that of the state,
            which starts at zero, in float32.
        squares: Maps directions (matrices, rows, cols) to the squares that the state averages, of
            its shape.
    """

    shape: Callable[[torch.Size], tuple[int, ...]]
    squares: Callable[[Tensor], Tensor]


def row_squares(d: Tensor) -> Tensor:
    """Return the mean square of each row in float32 (NorMuon, arXiv 2510.05491)."""
    length = torch.linalg.vector_norm(d, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(d.shape[-1])


def entry_squares(d: Tensor) -> Tensor:
    """Return the square of each entry in float32.

    AdaMuon, arXiv 2507.11005, without its sign before the polar factor.
    """
    return d.float().square()


TRANSFORMS: dict[str, Transform] = {
    "rows": Transform(lambda shape: (*shape[:-1], 1), row_squares),
    "entries": Transform(tuple, entry_squares),
}
NAMES = ("none", *TRANSFORMS)


def moment_key(part: int) -> str:
    """Return the key of the second moment of a parameter's batch of matrices in its state."""
    return f"second{part}"


def is_moment(key: str) -> bool:
    """Return whether a key of a state belongs to a second moment."""
    return key.startswith(moment_key(0)[:-1])


def moment_shape(shape: torch.Size, group: Mapping[str, Any]) -> torch.Size:
    """Return the shape of the second moments of a batch of matrices, (count, rows, cols)."""
    return torch.Size(TRANSFORMS[group["adapt"]].shape(shape))


def initial_moments(p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
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
    states: Sequence[dict[str, Tensor]], shape: torch.Size, part: int, group: Mapping[str, Any]
) -> Tensor | None:
    """Return the moments of matrices of several parameters; None without a transform.

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
    """Divide directions by the root of their second moment, in place.

    Returns:
        The directions, of the same Frobenius norms as before, which lie outside the ball; and the
        new state.
    """
    squares = TRANSFORMS[group["adapt"]].squares(d)
    moment = moment.lerp(squares, 1 - group["beta2"])
    root = moment.sqrt().add_(group["eps"])
    root.masked_fill_(root == 0, 1.0)
    before = squares.sum((-2, -1), keepdim=True)
    after = squares.div_(root).div_(root).sum((-2, -1), keepdim=True)
    length = (before / torch.where(after == 0, 1.0, after)).sqrt_()
    return multiplied(d, length / root), moment

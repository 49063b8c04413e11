"""Transforms between momentum and step that have a state of their own, such as second moments.

A transform is a row of ``TRANSFORMS``. Its state is a tensor for each batch of a
parameter's matrices, under the key ``secondN`` of the parameter's state. Every direction keeps its
length, so that the step-size rules mean the same with and without a transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_fanions.lmo.scaling import multiplied
from lit_fanions.optim import leading
from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.matrices import gather, local_grad, matrix_shapes, to_matrices


@dataclass(frozen=True)
class Transform:
    """A division of directions by the root of their second moment, or ``leading``."""

    # Maps the shape of a batch of matrices, (count, rows, cols), and the group's options to the
    # shape of the state.
    shape: Callable[[torch.Size, Group], tuple[int, ...]]
    # Maps directions (matrices, rows, cols) to the squares that the state averages, of its shape.
    # None: the transform takes a part of the momentum before the oracle gets the rest
    # (``leading``).
    squares: Callable[[Tensor], Tensor] | None


def row_squares(d: Tensor) -> Tensor:
    """Return the mean square of each row in float32 (NorMuon, arXiv 2510.05491)."""
    dtype = torch.promote_types(d.dtype, torch.float32)
    length = torch.linalg.vector_norm(d, dim=-1, keepdim=True, dtype=dtype)
    return length.square_().div_(d.shape[-1]).float()


def entry_squares(d: Tensor) -> Tensor:
    """Return the square of each entry in float32.

    AdaMuon, arXiv 2507.11005, without its sign before the polar factor.
    """
    return d.float().square()


TRANSFORMS: dict[str, Transform] = {
    "rows": Transform(lambda shape, group: (*shape[:-1], 1), row_squares),
    "entries": Transform(lambda shape, group: tuple(shape), entry_squares),
    "leading": Transform(leading.state_shape, None),
}
NAMES = ("none", *TRANSFORMS)


def moment_key(part: int) -> str:
    """Return the key of the second moment of a parameter's batch of matrices in its state."""
    return f"second{part}"


def is_moment(key: str) -> bool:
    """Return whether a key of a state belongs to a second moment."""
    return key.startswith(moment_key(0)[:-1])


def moment_shape(shape: torch.Size, group: Group) -> torch.Size:
    """Return the shape of the second moments of a batch of matrices, (count, rows, cols)."""
    return torch.Size(TRANSFORMS[group["adapt"]].shape(shape, group))


def splits_momentum(group: Group) -> bool:
    """Return whether the transform of a group takes a part of the momentum, and the gradient."""
    return group["adapt"] != "none" and TRANSFORMS[group["adapt"]].squares is None


def initial_moments(p: Tensor, group: Group) -> dict[str, Tensor]:
    """Return the first second moments of a parameter by their keys; none without a transform."""
    if group["adapt"] == "none":
        return {}
    shapes = matrix_shapes(p.shape, group["layout"], group["splits"])
    gradients: Sequence[Tensor | None] = [None] * len(shapes)
    if splits_momentum(group) and p.grad is not None:
        gradients = to_matrices(gather(local_grad(p), p), group["layout"], group["splits"])
    return {
        moment_key(part): _first_moment(shape, gradients[part], p.device, group)
        for part, shape in enumerate(shapes)
    }


def _first_moment(
    shape: torch.Size, gradients: Tensor | None, device: torch.device, group: Group
) -> Tensor:
    if splits_momentum(group):
        return leading.first_state(gradients, shape, group, device)
    return torch.zeros(moment_shape(shape, group), dtype=torch.float32, device=device)


def gather_moments(
    states: Sequence[dict[str, Tensor]],
    shape: torch.Size,
    part: int,
    group: Group,
    gradients: Tensor | None = None,
) -> Tensor | None:
    """Return the moments of matrices of several parameters; None without a transform.

    Each parameter has equally many of the matrices (matrices, rows, cols), which are its batch
    ``part`` in ``to_matrices``. Gradients are given for a transform that splits the momentum.
    Options may have changed since moments were stored: those of another shape start anew, and
    without a transform they are dropped.
    """
    key = moment_key(part)
    if group["adapt"] == "none":
        for state in states:
            state.pop(key, None)
        return None
    own = torch.Size((shape[0] // len(states), *shape[1:]))
    wanted = moment_shape(own, group)
    for i, state in enumerate(states):
        if key not in state or state[key].shape != wanted:
            device = state["momentum"].device
            own_gradients = None if gradients is None else gradients.chunk(len(states))[i]
            state[key] = _first_moment(own, own_gradients, device, group)
            if splits_momentum(group):  # the momentum is older, and without a bias
                leading.end_bias(state[key])
    return torch.cat([state[key] for state in states])


def adapt(d: Tensor, moment: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Divide directions by the root of their second moment, in place; return them and the state.

    Their Frobenius norms are the same as before, so that they lie outside the ball.
    """
    squares_of = TRANSFORMS[group["adapt"]].squares
    assert squares_of is not None
    squares = squares_of(d)
    moment = moment.lerp(squares, 1 - group["beta2"])
    root = moment.sqrt().add_(group["eps"])
    root.masked_fill_(root == 0, 1.0)
    before = squares.sum((-2, -1), keepdim=True)
    after = squares.div_(root).div_(root).sum((-2, -1), keepdim=True)
    length = (before / torch.where(after == 0, 1.0, after)).sqrt_()
    return multiplied(d, length / root), moment

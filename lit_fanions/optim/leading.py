"""COSMOS: Adam in the leading subspace of the gradients, the ball in the rest.

Beside ``adapting``, whose other transforms see the direction alone: this one takes its part of the
momentum before the oracle gets the rest. Formulas of arXiv 2502.17410, version 3, for a matrix
whose smaller side is the columns (others are transposed), with its gradient G, momentum M and mean
over steps E with decay beta2::

    U <- orthonormal basis of (beta2 U S + (1 - beta2) G^T G U),  which is (cols, r)
    S <- U^T (beta2 U' S U'^T + (1 - beta2) G^T G) U,             U' being the former U
    V <- E (G U)^2
    A  = M U / (sqrt(V) + eps) U^T,                               M and V without their bias
    D  = A + rest_weight * sqrt(rows * cols) * B / |B|_F

B is the ball's direction of M - M U U^T, the polar factor as published. D gets the length of a
direction of the ball. The first U holds the leading right singular vectors of the first gradient,
as in the authors' code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions.lmo import Solver, frobenius_norm, start_block, top_singular
from lit_fanions.lmo.factorisations import gram_schmidt
from lit_fanions.optim.algorithms import Group

# Entries whose squares can still be added up in float32.
_LARGEST = 1e15


class Leading(NamedTuple):
    """What the leading subspace takes of matrices (matrices, rows, cols)."""

    rest: Tensor  # M - M U U^T, what the oracle gets
    step: Tensor  # A, the step in the subspace
    basis: Tensor  # U, (matrices, min(rows, cols), r)
    state: Tensor  # the new state


def state_shape(shape: torch.Size, group: Group) -> tuple[int, ...]:
    """Return the shape of the state of matrices (count, rows, cols): U, V, S and two weights.

    All have r columns and are stacked as rows. The weights are the sums of the factors that M and V
    give to the gradients so far, each in a row of its own.
    """
    count, rows, cols = shape
    r = min(group["adapt_rank"], rows, cols)
    return count, rows + cols + r + 2, r


def first_state(
    gradients: Tensor | None, shape: torch.Size, group: Group, device: torch.device
) -> Tensor:
    """Return the state of matrices (count, rows, cols) before the first step, in float32.

    Entries of their gradients that are not finite count as 0; without gradients U is drawn at
    random.
    """
    state = torch.zeros(state_shape(shape, group), dtype=torch.float32, device=device)
    r, (rows, cols) = state.shape[-1], shape[1:]
    if not shape.numel():
        return state
    if gradients is None:
        generator = torch.Generator().manual_seed(0)
        like = torch.Size((shape[0], max(rows, cols), min(rows, cols)))
        u = start_block(like, r, device=device, generator=generator, oversampling=0)
    else:
        g = _upright(gradients.float().nan_to_num(0.0, 0.0, 0.0))
        # Lanczos, which auto takes for larger matrices, would wait for an accelerator.
        solver: Solver = "auto" if device.type == "cpu" else "subspace"
        u = top_singular(g, r, solver=solver).Vh.mT
    state[:, : min(rows, cols)] = u
    return state


def end_bias(state: Tensor) -> None:
    """Set the weight of M in a first state to that of a momentum with a long history."""
    state[:, -2] = 1.0


def split_leading(m: Tensor, gradient: Tensor, state: Tensor, group: Group) -> Leading:
    """Return the step of the leading subspace, and what of the momenta m is outside of it."""
    is_wide = m.shape[-2] < m.shape[-1]
    dtype = torch.promote_types(m.dtype, torch.float32)
    g, upright = (_upright(x.to(dtype).clamp(-_LARGEST, _LARGEST)) for x in (gradient, m))
    rows, cols = upright.shape[-2:]
    beta1, beta2, r = group["momentum"], group["beta2"], state.shape[-1]
    before, v, s, weights = state.to(dtype).split([cols, rows, r, 2], dim=-2)
    u = beta2 * (before @ s) + (1 - beta2) * (g.mT @ (g @ before))
    u = gram_schmidt(u.mT).mT
    overlap, projected = before.mT @ u, g @ u
    s = beta2 * (overlap.mT @ s @ overlap) + (1 - beta2) * (projected.mT @ projected)
    v = beta2 * v + (1 - beta2) * projected.square()
    first, second = (weights[..., i : i + 1, :] for i in (0, 1))
    first, second = beta1 * first + (1 - beta1), beta2 * second + (1 - beta2)
    # N of Nesterov is one more step of the average.
    bias = beta1 * first + (1 - beta1) if group["nesterov"] else first
    inside = upright @ u
    root = (v / second).sqrt() + group["eps"]
    step = (inside / bias / torch.where(root == 0, 1.0, root)) @ u.mT
    rest = upright - inside @ u.mT
    # What rounding leaves of a matrix inside the subspace has no direction.
    noise = 8 * torch.finfo(dtype).eps * math.sqrt(cols) * frobenius_norm(upright)
    rest = torch.where(frobenius_norm(rest) <= noise, 0.0, rest)
    state = torch.cat([u, v, s, first, second], dim=-2).to(state)
    return Leading(rest.mT, step.mT, u, state) if is_wide else Leading(rest, step, u, state)


def join_leading(d: Tensor, leading: Leading, length: float | None, group: Group) -> Tensor:
    """Return A + rest_weight * sqrt(rows * cols) * B / |B|_F, at the length of the directions.

    ``length`` is the length of the ball's directions; None: the length of B, or 1 where B is 0. The
    part of B (``d``) inside the subspace is removed: it comes from rounding of the rest, which a
    polar factor enlarges to full size.
    """
    u, b = leading.basis, _upright(d.to(leading.step.dtype))
    b = b - b @ u @ u.mT
    b = b.mT if d.shape[-2] < d.shape[-1] else b
    own = frobenius_norm(b)
    own = torch.where(own == 0, 1.0, own)
    size = group["rest_weight"] * math.sqrt(d.shape[-2] * d.shape[-1])
    joined = leading.step + b * (size / own)
    whole = frobenius_norm(joined)
    wanted = own if length is None else length
    return joined * (wanted / torch.where(whole == 0, 1.0, whole))


def _upright(m: Tensor) -> Tensor:
    """Return matrices, transposed where they have fewer rows than columns."""
    return m.mT if m.shape[-2] < m.shape[-1] else m

"""Norms, oracles and balls of diagonal matrices: points whose coordinates are singular values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_fanions import norms

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
OUTSIDE = (-0.1, 1.1)  # values of alpha that the article tries
EXACT = 1e-9
DUALS: dict[str, norms.Norm] = {"F*": norms.Spectral(), "F2": norms.Nuclear()}
Outlines = dict[tuple[str, float], Tensor]  # name in DUALS and alpha -> points, (count, 2)


class Polyhedron(NamedTuple):
    """A ball in space.

    Attributes:
        vertices: All vertices, (count, 3).
        faces: Vertices of each face, in order around it.
    """

    vertices: Tensor
    faces: list[Tensor]


def diagonal_norm(norm: norms.Norm, points: Tensor) -> Tensor:
    """Return the norms of diagonal matrices: (..., n) -> (...)."""
    return norm.value(torch.diag_embed(points))


def diagonal_oracle(norm: norms.Norm, points: Tensor) -> Tensor:
    """Return the diagonals of the oracle's directions, which are diagonal: (..., n) -> (..., n)."""
    return norm.lmo(torch.diag_embed(points)).diagonal(dim1=-2, dim2=-1)


def polyhedron(norm: norms.Norm, dual: norms.Norm, directions: Tensor) -> Polyhedron:
    """Return the ball of a norm of three singular values, by asking oracles about directions.

    Args:
        norm: The norm; its oracle returns vertices of the ball.
        dual: The dual norm; its oracle returns normals of the ball's faces.
        directions: Directions that together find every vertex, (count, 3).
    """
    vertices = _unique_rows(diagonal_oracle(norm, directions))
    faces = []
    for normal in _unique_rows(diagonal_oracle(dual, directions)):
        face = vertices[vertices @ normal > 1 - EXACT]
        across = face[0] - face.mean(0)
        turned = torch.linalg.cross(normal / normal.norm(), across)
        around = face - face.mean(0)
        faces.append(face[torch.atan2(around @ turned, around @ across).argsort()])
    return Polyhedron(vertices, faces)


def _unique_rows(points: Tensor) -> Tensor:
    return torch.unique((points / EXACT).round(), dim=0) * EXACT


def circle_of_directions(count: int) -> Tensor:
    """Return evenly spaced unit vectors in the plane, (count, 2)."""
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angles.cos(), angles.sin()], -1)


def ball_outlines(circle: Tensor) -> Outlines:
    """Return the balls of the duals of F* and F2 in a plane, for every alpha.

    Args:
        circle: Directions, (count, 2).
    """
    return {
        (dual, alpha): circle / diagonal_norm(norms.Blend(norm, alpha), circle).unsqueeze(-1)
        for dual, norm in DUALS.items()
        for alpha in ALPHAS
    }


def steps_outside(circle: Tensor) -> dict[float, Tensor]:
    """Return the steps of F-Muon in a plane for alpha outside [0, 1], each (count, 2).

    Args:
        circle: Directions, (count, 2).
    """
    return {
        alpha: diagonal_oracle(norms.Blend(norms.Spectral(), alpha), circle) for alpha in OUTSIDE
    }

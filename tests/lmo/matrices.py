"""Matrices that every solver must take, and measures of directions and triplets."""

from typing import get_args

import torch
from torch import Tensor

from lit_fanions import lmo, norms
from tests.matrices import gaussian, power_law, with_spectrum

# CuPy's is in test_cupy_svds.py, "polar", which finds no triplets, in test_block_power.py.
SOLVERS = [solver for solver in get_args(lmo.Solver) if solver not in ("cupy", "polar")]

CLUSTER = torch.tensor([1.0] * 6 + [0.5] * 64)

# Most have more than 64 rows and columns, because smaller ones get no products in bfloat16.
MATRICES = {
    "gaussian": gaussian(2, 70, 90),
    "small": gaussian(2, 30, 40),
    "tall": gaussian(2, 200, 66),
    "wide": gaussian(2, 66, 200),
    "large": gaussian(1, 300, 240),
    "power law": with_spectrum(power_law(70, 0.7), 70, 80)[None].float(),
    "condition 1e3": with_spectrum(torch.logspace(0, -3, 70), 80, 70)[None].float(),
    "clustered": with_spectrum(CLUSTER, 70, 80)[None].float(),
    "clustered, rank 70 of 75": with_spectrum(CLUSTER, 75, 80)[None].float(),
    "identity": torch.eye(70)[None],
    "rank 3": with_spectrum(power_law(3, 1), 70, 80)[None].float(),
    "rank 3, float64": with_spectrum(power_law(3, 1), 80, 70)[None],
    "zero": torch.zeros(2, 80, 70),
    "zero, square": torch.zeros(1, 70, 70),
    "one row": gaussian(2, 1, 80),
    "one column": gaussian(2, 80, 1),
    "one entry": gaussian(2, 1, 1),
    "1e-20": gaussian(1, 70, 80) * 1e-20,
    "1e+20": gaussian(1, 70, 80) * 1e20,
    "float64": gaussian(1, 70, 80).double(),
    "float16": gaussian(1, 70, 80).half(),
    "bfloat16": gaussian(1, 70, 80).bfloat16(),
}


def attained(m: Tensor, d: Tensor, dual: Tensor) -> float:
    """Return the smallest <m, d> / dual over the batch; 1 is the largest possible value."""
    inner = (m.double() * d.double()).sum((-2, -1))
    return torch.where(dual == 0, 1.0, inner / dual).min().item()


def quality(m: Tensor, d: Tensor, norm: norms.Norm) -> float:
    """Return <m, d> divided by its largest value over the unit ball of the norm."""
    return attained(m, d, norm.dual(m))


def least_quality(solver: str, *dtypes: torch.dtype) -> float:
    """Return the quality that a solver must reach; power iteration has no oversampling."""
    least = {"exact": 1 - 1e-6, "power": 0.97}.get(solver, 0.99)
    return least - max(torch.finfo(dtype).eps for dtype in dtypes)


def largest_value(*dtypes: torch.dtype) -> float:
    """Return the norm that a direction may have after rounding; exactly it would be 1."""
    return 1 + 1e-4 + 4 * max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))


def broken(m: Tensor) -> Tensor:
    """Return a batch of a matrix unchanged, with a NaN, with an infinity, and times 2."""
    batch = torch.stack([m, m, m, 2 * m])
    batch[1, 0, -1] = torch.nan
    batch[2, -1, 0] = torch.inf
    return batch


def distances(m: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    """Return the residuals of triplets: the larger of |m^T u - s v| and |m v - s u|, over s.

    Both are needed: solvers compute u or v by a product with the other, so that one residual is
    zero whatever they found.
    """
    m, u, s, vh = (x.double() for x in (m, u, s, vh))
    left = torch.linalg.vector_norm(m.mT @ u - vh.mT * s.unsqueeze(-2), dim=-2)
    right = torch.linalg.vector_norm(m @ vh.mT - u * s.unsqueeze(-2), dim=-2)
    return torch.maximum(left, right) / s


def orthonormal_vectors(u: Tensor, vh: Tensor) -> bool:
    """Return whether U^T U and V V^T are the identity; in float64 to half of its digits."""
    eye = torch.eye(u.shape[-1]).double()
    errors = [(x.mT.double() @ x.double() - eye).abs().max() for x in (u, vh.mT)]
    return float(max(errors)) < (2e-5 if u.dtype == torch.float32 else 1e-8)

"""Matrices of known spectrum, and measures of directions and triplets."""

import torch
from torch import Tensor

from lit_fanions import norms


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return a matrix with orthonormal columns, in float64."""
    return torch.linalg.qr(gaussian(rows, cols, seed=seed).double()).Q


def with_spectrum(s: Tensor, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return a float64 matrix with the nonzero singular values s and random singular vectors."""
    u, v = orthonormal(rows, len(s), seed), orthonormal(cols, len(s), seed + 1)
    return (u * s.double()) @ v.mT


def power_law(n: int, power: float) -> Tensor:
    return torch.arange(1, n + 1).double() ** -power


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

"""Random matrices and parameters, and matrices of known spectrum."""

import math

import torch
from torch import Tensor, nn


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Return entries of the standard normal distribution, in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian64(*shape: int, seed: int = 0) -> Tensor:
    """Return entries of the standard normal distribution, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter whose entries are the same in every dtype, up to rounding."""
    return nn.Parameter(gaussian64(*shape, seed=seed).to(dtype))


def parameter64(*shape: int, seed: int = 0) -> nn.Parameter:
    """Return a parameter in float64."""
    return parameter(*shape, seed=seed, dtype=torch.float64)


def orthonormal(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return a matrix with orthonormal columns, in float64."""
    return torch.linalg.qr(gaussian(rows, cols, seed=seed).double()).Q


def with_spectrum(s: Tensor, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return a float64 matrix with the nonzero singular values s and random singular vectors."""
    u, v = orthonormal(rows, len(s), seed), orthonormal(cols, len(s), seed + 1)
    return (u * s.double()) @ v.mT


def power_law(n: int, power: float) -> Tensor:
    """Return the numbers i^-power for i from 1 to n."""
    return torch.arange(1, n + 1).double() ** -power


def decaying(rows: int, cols: int, seed: int = 0, condition: float = 1e3) -> Tensor:
    """Return a matrix whose singular values fall from 1 to 1 / condition, as a momentum's do."""
    s = torch.logspace(0, -math.log10(condition), min(rows, cols), dtype=torch.float64)
    return with_spectrum(s, rows, cols, seed)

"""The paper's algorithm for one matrix, in float64 by SVD."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fanions import Fanion
from tests.matrices import gaussian64, parameter64
from tests.optim.steps import update

# Rank, alpha and blend of each name: a second source, against which the table is tested.
NAMES: dict[str, tuple[int | float | str, float, str]] = {
    "muon": ("full", 1.0, "frobenius"),
    "neon": (1, 1.0, "frobenius"),
    "fanion": (0.25, 1.0, "frobenius"),
    "kyfan": (0.25, 1.0, "frobenius"),
    "nsgd": ("full", 0.0, "frobenius"),
    "signum": ("full", 0.0, "sign"),
    "coordinate": ("full", 1.0, "frobenius"),
    "row": ("full", 1.0, "frobenius"),
    "column": ("full", 1.0, "frobenius"),
    "f_muon": ("full", 0.5, "frobenius"),
    "f_neon": (1, 0.5, "frobenius"),
    "f_fanion": (0.25, 0.5, "frobenius"),
    "s_muon": ("full", 0.5, "sign"),
    "s_neon": (1, 0.5, "sign"),
    "s_fanion": (0.25, 0.5, "sign"),
}
SCALES = ["none", "original", "match_rms_adamw", "spectral_unclamped"]
SHAPES = [(8, 4), (4, 8), (5, 5)]
EXACT = {"polar": "exact", "solver": "exact"}


class Case(NamedTuple):
    """Options of an optimizer that the reference implements."""

    algorithm: str = "muon"
    rank: int | float | str | None = None
    alpha: float | None = None
    blend: str | None = None
    sign_scale: float = 1.0
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: str = "original"
    renormalize: bool = False
    error_feedback: bool = False

    def options(self) -> dict[str, Any]:
        return {key: value for key, value in self._asdict().items() if value is not None}


def reference_direction(m: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Return D(M) by SVD, and the part of M that error feedback removes."""
    rank, alpha, blend = (
        own if own is not None else named
        for own, named in zip(case[1:4], NAMES[case.algorithm], strict=True)
    )
    limit = min(m.shape)
    k = limit if rank == "full" else round(rank * limit) if isinstance(rank, float) else rank
    k = min(max(1, k), limit)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    d = u[:, :k] @ vh[:k]
    if case.algorithm == "coordinate":
        d = m.sign() * (m.abs() == m.abs().max())
    if case.algorithm in ("row", "column"):
        d = m / m.norm(dim=-1 if case.algorithm == "row" else -2, keepdim=True)
    if case.algorithm == "kyfan":
        d = u[:, :1] @ vh[:1] if s[0] >= s.sum() / k else u @ vh / k
    other = m.sign() * case.sign_scale if blend == "sign" else m / m.norm()
    return alpha * d + (1 - alpha) * other, (u[:, :k] * s[:k]) @ vh[:k]


def reference_step(w: Tensor, m: Tensor, g: Tensor, case: Case) -> None:
    """Step one matrix in place, as the paper writes the algorithm."""
    rows, cols = w.shape
    mu, lr = case.momentum, case.lr
    m.copy_(m + g if case.error_feedback else mu * m + (1 - mu) * g)
    n = (1 - mu) * g + mu * m if case.nesterov and not case.error_feedback else m
    d, captured = reference_direction(n, case)
    factor = {
        "none": 1.0,
        "original": max(1.0, rows / cols) ** 0.5,
        "spectral_unclamped": (rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 / d.square().mean().sqrt(),
    }[case.scale]
    if case.renormalize:
        w.mul_(rows**0.5 / w.norm())
    w.copy_((1 - lr * case.weight_decay) * w - lr * factor * d)
    if case.error_feedback:
        m.sub_((1 - mu) * captured)


def assert_follows_reference(
    case: Case, shape: tuple[int, int], steps: int = 4, atol: float = 2e-6
) -> None:
    """Assert that weights and momenta equal those of the reference after each step."""
    p = parameter64(*shape, seed=1)
    w, m = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Fanion([p], **case.options(), **EXACT)
    for i in range(steps):
        grad = gaussian64(*shape, seed=10 + i)
        update(optimizer, p, grad)
        reference_step(w, m, grad, case)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=atol, msg=f"step {i}, {shape}")
        torch.testing.assert_close(optimizer.state[p]["momentum"], m, rtol=0, atol=1e-9)


def index_matrices(shape: tuple[int, ...], layout: str, parts: int) -> list[Tensor]:
    """Return, for each matrix of a parameter, the flat indices of its entries."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    if layout == "batch":
        stacks = index.reshape(-1, *shape[-2:])
        return [part for matrix in stacks for part in matrix.chunk(parts)]
    chunks = index.chunk(parts)
    if layout == "transposed":  # torch keeps in x out / groups
        return [chunk.transpose(0, 1).flatten(1) for chunk in chunks]
    return [chunk.flatten(1) for chunk in chunks]

"""Steps of Fanion against the exact oracles of norms."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.paper.norms.methods import Method, inner, random_matrices
from lit_fanions import Fanion
from lit_fanions.cli.console import Table

LR = 0.1
Shape = tuple[int, int]


class Check(NamedTuple):
    """Errors of steps of one method on matrices of one shape, one value per gradient.

    Attributes:
        step: Largest difference of an entry of a step from -lr times the oracle, over lr.
        dual: <m, d> over the dual norm, minus 1.
        norm: |d| - 1.
        fast: <m, d> over the dual norm with Fanion's default solvers.
    """

    step: Tensor
    dual: Tensor
    norm: Tensor
    fast: Tensor


Checks = dict[str, dict[Shape, Check]]  # method -> shape


def check_method(method: Method, shape: Shape, seeds: int) -> Check:
    """Return the errors of steps of a method on random gradients.

    Args:
        method: The method.
        shape: Rows and columns of the matrices.
        seeds: Number of gradients.
    """
    exact = {"polar": "exact", "solver": "exact"}
    with warnings.catch_warnings():
        # No method needs both.
        warnings.filterwarnings("ignore", message=".*: no effect of (polar|solver) 'exact'")
        pairs = [_step(method, shape, seed, exact) for seed in range(seeds)]
    momentum, step = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    fast = torch.stack([_step(method, shape, seed, {})[1] for seed in range(seeds)])
    dual = method.norm.dual(momentum)
    return Check(
        step=(step + method.norm.lmo(momentum)).abs().amax((-2, -1)),
        dual=-inner(momentum, step) / dual - 1,
        norm=method.norm.value(step) - 1,
        fast=-inner(momentum, fast) / dual,
    )


def _step(
    method: Method, shape: Shape, seed: int, solver: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the momentum and the step over lr, of the second of two steps of Fanion."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    options = {"algorithm": method.algorithm, "momentum": 0.0, **method.options, **solver}
    if "rank" in options:
        options["rank"] = min(options["rank"], *shape)
    optimizer = Fanion([weight], lr=LR, nesterov=False, scale="none", **options)
    decay, momentum = options["momentum"], torch.zeros(shape, dtype=torch.float64)
    for gradient in random_matrices(2, *shape, seed=seed):
        before = weight.detach().clone()
        weight.grad = gradient
        momentum = decay * momentum + (1 - decay) * gradient
        optimizer.step()
    return momentum, (weight.detach() - before) / LR


def worst_errors(checks: Mapping[Shape, Check]) -> Check:
    """Return the largest errors over all shapes and gradients, and the smallest ``fast``."""
    step, dual, norm, fast = (torch.cat(values) for values in zip(*checks.values(), strict=True))
    return Check(step.amax(), dual.abs().amax(), norm.abs().amax(), fast.amin())


def errors_table(checks: Checks) -> Table:
    """Return the table of the worst errors by method."""
    cells = []
    for name, own in checks.items():
        worst = worst_errors(own)
        cells.append([name, *(f"{e.item():.0e}" for e in worst[:3]), f"{worst.fast.item():.4f}"])
    columns = ["method", "step + lr d", "<m, d> / dual - 1", "|d| - 1", "default solvers"]
    return Table("Largest errors over all steps; smallest <m, d> / dual norm", columns, cells)

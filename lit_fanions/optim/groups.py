"""Checks of whole parameter groups: options that exclude each other, parameters without a matrix.

Beside ``options``, where each option is checked alone.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo import BALLS, SOLVERS, Case
from lit_fanions.lmo.newton_schulz import check_polar
from lit_fanions.lmo.singular_triplets import check_solver
from lit_fanions.optim.algorithms import ALGORITHMS, ANY_SHAPE, find_algorithm, is_entrywise
from lit_fanions.optim.matrices import matrix_shapes
from lit_fanions.optim.options import default_options

# Keys that torch, its schedulers and the factory keep in a group beside the options.
KEPT = (
    "params", "param_names", "name", "algorithm", "config_group", "initial_lr", "initial_momentum",
)  # fmt: skip


# Keys that schedulers and wrappers keep in groups and that look like misspelt options.
_KEYS_OF_OTHERS = re.compile(
    r"(max|min|base|initial|start|end|final|peak|swa)_(lr|momentum|weight_decay)"
    r"|lr_(scale|mult|multiplier|factor|ratio|decay)"
)

# Options of torch's optimizers that change a step and that Fanion does not have, with what to do.
TORCH_OPTIONS = {
    "maximize": "negate the loss",
    "amsgrad": "use torch.optim.AdamW for these parameters",
    "dampening": "the momentum of matrices is always an average; that of sgd has none",
    "differentiable": "use an optimizer of torch for these parameters",
    "foreach": "parameters are always stepped together where that is faster",
    "fused": "adamw and sgd always use torch's fused kernels",
    "capturable": "steps do not wait for the device as it is",
}


def keys_of_others(group: Iterable[str]) -> list[str]:
    """Return the keys of a group that are no options but known: torch's, schedulers', wrappers'."""
    known = (*KEPT, *TORCH_OPTIONS)
    return [key for key in group if key in known or _KEYS_OF_OTHERS.fullmatch(key)]


def check_torch_options(group: Mapping[str, Any], where: str) -> None:
    """Refuse options of torch's optimizers that are switched on and would be ignored.

    Raises:
        ValueError: With what to do instead.
    """
    for name in TORCH_OPTIONS:
        if group.get(name):
            raise ValueError(f"{where} has no option {name!r}: {TORCH_OPTIONS[name]}")


def as_list(params: Any) -> Any:
    """Return parameters as a list, and what torch will refuse as it is."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, (list, set)) else list(params)


def are_parameters(params: Any) -> bool:
    """Return whether a list holds tensors, or (name, tensor) pairs."""
    if not isinstance(params, list):
        return False
    pairs = [p if isinstance(p, tuple) and len(p) == 2 else ("", p) for p in params]
    return all(isinstance(p, Tensor) for _, p in pairs)


def named_parameters(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names, or numbers in place of names."""
    unnamed = [f"{group['name']}[{i}]" for i in range(len(group["params"]))]
    # A list, not a generator: torch.compile cannot trace ``yield from zip(..., strict=True)``.
    return list(zip(group.get("param_names", unnamed), group["params"], strict=True))


def configured_group(group: Mapping[str, Any]) -> str:
    """Return the group of the configuration that a group of the optimizer was made from.

    The factory makes several of one where parameters differ in their matrix form. A group that was
    not made by the factory is its own.
    """
    return str(group.get("config_group", group.get("name", "matrix")))


def check_combination(group: Mapping[str, Any], where: str) -> None:
    """Refuse options that exclude each other, and warn where there is no norm.

    Args:
        group: All options of a group, each checked.
        where: What to call the group in messages.

    Raises:
        ValueError: If solvers cannot take their steps, or error feedback has nothing to keep.
    """
    entry = find_algorithm(group["algorithm"])
    if entry.kind != "matrix":
        return
    try:
        check_polar(group["polar"], group["polar_steps"])
        check_solver(group["solver"], group["solver_steps"], group["oversampling"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    defaults = default_options(group["algorithm"])
    if group["p"] != defaults["p"] and "schatten" not in (entry.ball, group["blend"]):
        raise ValueError(f"{where}: p belongs to the Schatten ball: set algorithm or blend to it")
    if group["adapt"] == "none":
        for name in ("beta2", "eps"):
            if group[name] != defaults[name]:
                raise ValueError(f"{where}: {name} belongs to adamw and to adapt: set adapt too")
    if group["error_feedback"]:
        if group["solver"] in SOLVERS and not SOLVERS[group["solver"]].triplets:
            raise ValueError(
                f"{where}: error feedback needs singular triplets, which solver "
                f"{group['solver']!r} does not find: choose another solver"
            )
        ball = BALLS[entry.ball]
        rank = group["rank"]
        full = rank == "full" or (isinstance(rank, float) and rank == 1)
        if not ball.feedback or group["alpha"] == 0 or (full and ball.is_polar(Case(2, 2, 2))):
            able = [
                name
                for name, one in ALGORITHMS.items()
                if one.kind == "matrix" and BALLS[one.ball].feedback
            ]
            raise ValueError(
                f"{where}: error feedback keeps what a step of low rank leaves behind, which rank "
                f"{rank!r} and alpha {group['alpha']} do not have: choose one of "
                f"{', '.join(able)} with a rank below full and alpha above 0"
            )
    if not 0 <= group["alpha"] <= 1:
        warnings.warn(
            f"{where}: alpha = {group['alpha']} is outside [0, 1]: the step is the oracle of no "
            "norm",
            stacklevel=5,
        )


def check_parameters(group: Mapping[str, Any]) -> None:
    """Refuse parameters that the algorithm of their group cannot step, and warn of clamped ranks.

    Raises:
        TypeError: If a parameter is not of real floating-point numbers.
        ValueError: If a parameter has no matrix form.
    """
    clamped = False
    for name, p in named_parameters(group):
        if not p.is_floating_point():
            raise TypeError(f"{name} is {p.dtype}; Fanion steps real floating-point parameters")
        if p.layout != torch.strided:
            raise TypeError(f"{name} is sparse ({p.layout}); Fanion steps dense parameters")
        if is_entrywise(group["algorithm"]):
            continue
        if p.ndim < 2 and group["algorithm"] not in ANY_SHAPE:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, which is no matrix for {group['algorithm']}; "
                f"give it to a group of {', '.join(ANY_SHAPE)}"
            )
        if group["layout"].startswith("batch") and p.ndim < 2:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, which is no batch of matrices")
        for _, rows, cols in matrix_shapes(p.shape, group["layout"], group["splits"]):
            least = min(rows, cols) if p.numel() else math.inf
            clamped |= isinstance(group["rank"], int) and group["rank"] > least
    if clamped:
        warnings.warn(
            f"group {group['name']!r}: rank {group['rank']} is more than some of its matrices have "
            "and is clamped to their smaller dimension",
            stacklevel=5,
        )

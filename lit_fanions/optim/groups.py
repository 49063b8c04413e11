"""Checks of whole parameter groups: names, options that exclude each other, parameters.

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

from lit_fanions.checks import did_you_mean
from lit_fanions.lmo import BALLS, SOLVERS
from lit_fanions.lmo.presets import check_polar
from lit_fanions.lmo.singular_triplets import check_solver
from lit_fanions.optim.adapting import splits_momentum
from lit_fanions.optim.algorithms import ALGORITHMS, ANY_SHAPE, Group, find_algorithm, is_entrywise
from lit_fanions.optim.capturing import check_capturable
from lit_fanions.optim.matrices import matrix_shapes, split_into_heads
from lit_fanions.optim.options import CHECKS, NAMES, RUNTIME_OPTIONS, default_options
from lit_fanions.optim.reporting import caller_level

# Values of options from which schedules start, by the key that schedulers keep them under.
INITIAL = {f"initial_{name}": name for name in ("lr", "momentum", "alpha", "rank")}
# Keys that torch, its schedulers and the factory keep in a group beside the options.
KEPT = ("params", "param_names", "name", "algorithm", "config_group", *INITIAL)
# Keys that schedulers and wrappers keep in groups and that look like misspelt options.
_KEYS_OF_OTHERS = re.compile(
    r"(max|min|base|initial|start|end|final|peak|swa)_(lr|momentum|weight_decay)"
)
# Factors that some training scripts and schedulers apply; Fanion would ignore them.
_FACTORS = re.compile(r"(lr|weight_decay|wd)_(scale|mult|multiplier|factor|ratio|decay)")

# Options of torch's optimizers that change a step and that Fanion does not have, with what to do.
TORCH_OPTIONS = {
    "maximize": "negate the loss",
    "amsgrad": "use torch.optim.AdamW for these parameters",
    "dampening": "the momentum of matrices is always an average; that of sgd has none",
    "differentiable": "use an optimizer of torch for these parameters",
    "foreach": "parameters are always stepped together where that is faster",
    "fused": "adamw and sgd always use torch's fused kernels",
}

# Names that other optimizers use for an option.
OTHER_NAMES = {
    "learning_rate": "lr",
    "betas": "momentum (beta1) and beta2",
    "beta1": "momentum",
    "wd": "weight_decay",
    "ns_steps": "polar_steps",
    "backend_steps": "polar_steps",
    "ns_coefficients": "polar",
    "adjust_lr_fn": "scale",
    "k": "rank",
}


def keys_of_others(group: Iterable[str]) -> list[str]:
    """Return the keys of a group that torch, schedulers and wrappers are known to keep there."""
    known = (*KEPT, *TORCH_OPTIONS)
    return [key for key in group if key in known or _KEYS_OF_OTHERS.fullmatch(key)]


def check_names(given: Iterable[str], algorithm: str, where: str, others: Iterable[str]) -> None:
    """Refuse options that the algorithm does not have, and keys that look like a typo of one.

    Other keys are left alone: wrappers and schedulers keep their own in parameter groups. Those in
    ``others`` are known. ``where`` is the group's name in messages.
    """
    options = ["algorithm", "name", *default_options(algorithm)]
    known = {*options, *others}
    for key in (key for key in given if key not in known):
        hint = did_you_mean(key, options)
        if factor := _FACTORS.fullmatch(key):
            hint = f": multiply {OTHER_NAMES.get(factor[1], factor[1])} yourself"
        if key in OTHER_NAMES:
            hint = f"; did you mean {OTHER_NAMES[key]}?"
        if hint or key in NAMES:
            listed = ", ".join(sorted(options))
            raise ValueError(f"{where} has no option {key!r}{hint} (options: {listed})")


def refuse_argument(name: str, algorithm: str) -> None:
    """Say why Fanion has no argument of that name."""
    if name in TORCH_OPTIONS:
        raise TypeError(f"Fanion has no argument {name!r}: {TORCH_OPTIONS[name]}")
    try:
        check_names([name], algorithm, f"Fanion ({algorithm})", ())
    except ValueError as error:
        raise TypeError(str(error)) from None
    raise TypeError(f"Fanion has no argument {name!r} (arguments: params, {', '.join(NAMES)})")


def free_name(algorithm: str, taken: list[str]) -> str:
    """Return a name for a group that no other group has."""
    names = [algorithm, *(f"{algorithm}_{i}" for i in range(1, len(taken) + 1))]
    return next(name for name in names if name not in taken)


def check_group(group: Group, where: str) -> dict[str, Any]:
    """Return the options of a group, all of its algorithm's, as they are stored, or raise.

    Keys that are no options are left as they are. ``where`` is the group's name in messages.
    """
    options = default_options(group["algorithm"])
    checked = dict(group)
    for name in (name for name in NAMES if name in group):
        if group[name] is not None or options.get(name) is not None:
            checked[name] = CHECKS[name](f"{where}: {name}", group[name])
    return checked


def resolve_heads(group: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the options of a group with its heads as splits."""
    heads = group.get("heads")
    if heads is None:
        return group
    if heads == "auto":
        raise ValueError(
            f"{where}: heads auto needs the module (configure_optimizers); give their number"
        )
    try:
        return {**group, "splits": split_into_heads(group.get("splits"), heads), "heads": None}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_torch_options(group: Group, where: str) -> None:
    """Refuse options of torch's optimizers that are switched on and would be ignored."""
    for name in TORCH_OPTIONS:
        if group.get(name):
            raise ValueError(f"{where} has no option {name!r}: {TORCH_OPTIONS[name]}")


def check_keys(group: Any) -> None:
    """Refuse what is no parameter group.

    Raises:
        TypeError: If it is no dict, has keys that are no strings, or no ``params``.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
    odd = [key for key in group if not isinstance(key, str)]
    if odd:
        raise TypeError(f"keys of a parameter group must be strings, got {odd[0]!r}")
    if group.get("params") is None:
        raise TypeError(
            f"a parameter group needs params, got {', '.join(group) or 'an empty dict'}"
        )


def as_list(params: Any) -> Any:
    """Return parameters as a list; a set, which torch refuses, stays a set."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, (list, set)) else list(params)


def are_parameters(params: Any) -> bool:
    """Return whether a list holds tensors, or (name, tensor) pairs."""
    if not isinstance(params, list):
        return False
    pairs = [p if isinstance(p, tuple) and len(p) == 2 else ("", p) for p in params]
    return all(isinstance(p, Tensor) for _, p in pairs)


def named_parameters(group: Group) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names, or numbers in place of names."""
    unnamed = [f"{group['name']}[{i}]" for i in range(len(group["params"]))]
    # A list, not a generator: torch.compile cannot trace ``yield from zip(..., strict=True)``.
    return list(zip(group.get("param_names", unnamed), group["params"], strict=True))


def configured_group(group: Group) -> str:
    """Return the group of the configuration that a group of the optimizer was made from.

    The factory makes several of one where parameters differ in their matrix form. A group that was
    not made by the factory is its own.
    """
    return str(group.get("config_group", group.get("name", "matrix")))


def carry_over(given: Mapping[str, Any], source: str, target: str) -> dict[str, Any]:
    """Return the options given with the algorithm ``source`` that hold for a group of ``target``.

    Options that the target's name fixes (rank, alpha, blend, ...) are not carried over. Between
    adamw and sgd lr is not; between balls and those two only weight decay and how a step is made.
    """
    if source == target:
        return dict(given)
    kinds = {find_algorithm(source).kind, find_algorithm(target).kind}
    allowed = default_options(target).keys() - find_algorithm(target).options.keys()
    if len(kinds) > 1:
        shared = {"weight_decay", *RUNTIME_OPTIONS}
        allowed = allowed - {"lr"} if "matrix" not in kinds else allowed & shared
    return {name: value for name, value in given.items() if name in allowed}


def check_combination(group: Group, where: str) -> None:
    """Refuse checked options that exclude each other, and warn where there is no norm."""
    check_capturable(group, where)
    if is_entrywise(group["algorithm"]):
        return
    try:
        check_polar(group["polar"], group["polar_steps"])
        check_solver(group["solver"], group["solver_steps"], group["oversampling"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if group["error_feedback"] and splits_momentum(group):
        raise ValueError(
            f"{where}: adapt leading takes a part of the momentum, which error feedback would keep "
            "for ever: choose one of them"
        )
    _check_feedback(group, where)
    if not 0 <= group["alpha"] <= 1:
        warnings.warn(
            f"{where}: alpha = {group['alpha']} is outside [0, 1]: the step is the oracle of no "
            "norm",
            stacklevel=caller_level(),
        )


def _check_feedback(group: Group, where: str) -> None:
    """Refuse error feedback of a step that leaves nothing behind."""
    if not group["error_feedback"]:
        return
    solver = group["solver"]
    if solver in SOLVERS and not SOLVERS[solver].triplets:
        raise ValueError(
            f"{where}: error feedback needs singular triplets, which solver {solver!r} does not "
            "find: choose another solver"
        )
    rank, ball = group["rank"], BALLS[ALGORITHMS[group["algorithm"]].ball]
    full = rank == "full" or (isinstance(rank, float) and rank == 1)
    if group["alpha"] and ball.has_feedback(full):
        return
    able = [name for name, x in ALGORITHMS.items() if x.ball and BALLS[x.ball].feedback]
    raise ValueError(
        f"{where}: error feedback keeps what a step of low rank leaves behind, which rank {rank!r} "
        f"and alpha {group['alpha']} do not have: choose one of {', '.join(able)} with a rank "
        "below full and alpha above 0"
    )


def check_parameters(group: Group) -> None:
    """Refuse parameters that the group's algorithm cannot step, and warn of clamped ranks."""
    clamped = False
    for name, p in named_parameters(group):
        if not isinstance(name, str):
            raise TypeError(f"the name of a parameter must be a string, got {name!r}")
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
            stacklevel=caller_level(),
        )


def check_gradients(groups: Iterable[Group]) -> None:
    """Refuse sparse gradients.

    Raises:
        RuntimeError: With the parameter's name.
    """
    for group in groups:
        sparse = [(x := p.grad) is not None and x.is_sparse for p in group["params"]]
        if any(sparse):
            name, _ = named_parameters(group)[sparse.index(True)]
            raise RuntimeError(
                f"the gradient of {name} is sparse; Fanion takes dense ones: make the embedding "
                "with sparse=False"
            )

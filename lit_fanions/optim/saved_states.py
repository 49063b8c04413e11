"""Checks of a state_dict by itself: that it is one of an optimizer, and that it is not damaged.

Beside ``checkpoints``, which compares it with an optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lit_fanions.checks import real_number
from lit_fanions.optim.adapting import is_moment
from lit_fanions.optim.bases import WARM, is_basis
from lit_fanions.optim.matrices import local

# Keys of what has the parameter's shape.
MOMENTS = ("momentum", "exp_avg", "exp_avg_sq", "momentum_buffer")


def check_form(state_dict: Any) -> None:
    """Refuse what is no state_dict of an optimizer.

    Raises:
        ValueError: With the part that is missing or of another type.
    """
    what = "no state_dict of an optimizer: "
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{what}it is a {type(state_dict).__name__}")
    kinds: dict[str, Any] = {"state": Mapping, "param_groups": (list, tuple)}
    for key, kind in kinds.items():
        if key not in state_dict:
            raise ValueError(f"{what}{key!r} is missing in it")
        if not isinstance(state_dict[key], kind):
            raise ValueError(f"{what}its {key!r} is a {type(state_dict[key]).__name__}")
    counts: Counter[Any] = Counter()
    names: Counter[str] = Counter()
    for i, group in enumerate(state_dict["param_groups"]):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not _is_list(params, (int, str)):
            raise ValueError(f"{what}its group {i} has no list of params")
        counts.update(params)
        if "param_names" in group:
            own = group["param_names"]
            if not _is_list(own, str) or len(own) != len(params):
                raise ValueError(f"{what}the param_names of its group {i} are no names of params")
            names.update(own)
    twice = [key for own in (counts, names) for key, count in own.items() if count > 1]
    if twice:
        raise ValueError(f"{what}parameter {twice[0]!r} is in it twice")
    for key, state in state_dict["state"].items():
        if not isinstance(state, Mapping):
            raise ValueError(f"{what}the state of parameter {key!r} is a {type(state).__name__}")
        if isinstance(key, int) and key not in counts:
            raise ValueError(f"{what}parameter {key} has a state and is in no group")


def _is_list(value: Any, kinds: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple)) and all(isinstance(item, kinds) for item in value)


def check_state(name: str, p: Tensor, state: Mapping[str, Any], is_finite: bool) -> None:
    """Refuse a saved state of a parameter that is damaged, or of a parameter of another shape.

    ``is_finite`` refuses NaN and infinities too, which would reach the weights.
    """
    if p.is_meta:  # nothing has values yet
        return
    for key, value in state.items():
        where = f"the checkpoint's {key} of {name}"
        if not isinstance(key, str):
            raise ValueError(f"the checkpoint's state of {name} has a key {key!r}, not a name")
        if key in MOMENTS or is_basis(key) or is_moment(key):
            if key == "momentum_buffer" and value is None:  # of torch's SGD before its first step
                continue
            _check_tensor(where, value, is_finite)
            shape = tuple(value.shape)
            if key in MOMENTS and shape != tuple(p.shape):
                raise ValueError(
                    f"{where} has shape {shape}, the parameter {tuple(p.shape)}: it is another "
                    "model's"
                )
            if key not in MOMENTS and len(shape) != 3:
                raise ValueError(f"{where} has shape {shape}, which is no batch of matrices")
            if key == "exp_avg_sq" and bool((local(value) < 0).any()):
                raise ValueError(f"{where} is negative: the checkpoint is damaged")
        elif key in ("step", "skipped", WARM):
            number = value
            if isinstance(value, Tensor):
                number = value.item() if value.numel() == 1 and not value.is_meta else value.shape
            real_number(where, int(number) if isinstance(number, bool) else number, 0.0)
        elif not isinstance(value, (Tensor, int, float)):
            raise ValueError(f"{where} is a {type(value).__name__}; states are tensors and numbers")


def _check_tensor(where: str, value: Any, is_finite: bool) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, not a tensor")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{where} is {value.dtype}, {value.layout}, on {value.device}: a dense tensor of real "
            "floating-point numbers is needed"
        )
    own = local(value.detach())
    if is_finite and own.numel() and not torch.linalg.vector_norm(own, torch.inf).isfinite():
        raise ValueError(f"{where} is not finite: take an earlier checkpoint")

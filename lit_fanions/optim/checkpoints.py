"""The state of a parameter: made, fitted to a parameter that was changed, checked and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_fanions.optim import entrywise
from lit_fanions.optim.adapting import initial_moments, is_moment, moment_key
from lit_fanions.optim.algorithms import Group, is_entrywise
from lit_fanions.optim.bases import WARM, basis_key, is_basis, start_bases
from lit_fanions.optim.groups import (
    INITIAL,
    check_combination,
    check_group,
    named_parameters,
    resolve_heads,
)
from lit_fanions.optim.matrices import is_distributed, matrix_shapes, placed_as
from lit_fanions.optim.options import CHECKS, default_options
from lit_fanions.optim.saved_states import MOMENTS, check_state

_OWN = {"param_names", "kernels"}  # keys of a group that are not taken from a checkpoint
_NUMBERS = {"skipped": torch.int64, WARM: torch.bool}  # dtypes of states saved as numbers


def check_loadable(own: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Check a state_dict against an optimizer's own groups and return it completed.

    Refused are other groups, algorithms, names of parameters or shapes, and impossible options.
    Options that are younger than the state_dict stay as they are.
    """
    saved = state_dict["param_groups"]
    if difference := _difference(own, saved):
        raise ValueError(
            f"the checkpoint was saved with other {difference}; load it into an optimizer with the "
            "same configuration and model, or set on_mismatch: keep_momentum to take each "
            "parameter's momentum alone"
        )
    checked = []
    for group, saved_group in zip(own, saved, strict=True):
        for (name, p), index in zip(named_parameters(group), saved_group["params"], strict=True):
            state = state_dict["state"].get(index, {})
            check_state(name, p, state, group["nonfinite"] != "propagate")
            adamw = group["algorithm"] == "adamw"
            needed = ("exp_avg", "exp_avg_sq", "step") if adamw else ("momentum",)
            check_complete(name, group["algorithm"], state, needed)
        # The optimizer's own names stay, as in torch: those of the checkpoint may be another
        # model's. Its kernels stay too: this machine may have no Triton.
        taken = {key: value for key, value in saved_group.items() if key not in _OWN}
        checked.append(_checked({**group, **taken}, group["params"]))
    return {**state_dict, "param_groups": checked}


def _checked(group: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return the options of a saved group, checked together and with the parameters."""
    where = f"the checkpoint's group {group['name']!r}"
    checked = resolve_heads(check_group(group, where), where)
    for key in INITIAL.keys() & checked.keys():
        checked[key] = CHECKS[INITIAL[key]](f"{where}: {key}", checked[key])
    with warnings.catch_warnings():  # the optimizer has warned of its own options
        warnings.simplefilter("ignore")
        check_combination({**checked, "params": parameters}, where)
    if not is_entrywise(group["algorithm"]):
        for p in parameters:
            try:
                matrix_shapes(p.shape, checked["layout"], checked["splits"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    return checked


def has_same_options(own: Sequence[Group], state_dict: Mapping[str, Any]) -> bool:
    """Return whether a state_dict was saved with the same groups and options, before schedules.

    Seeds do not count, nor an lr that was changed without a schedule's ``initial_lr``: by
    ReduceLROnPlateau, or by hand.
    """
    saved = state_dict["param_groups"]
    if _difference(own, saved):
        return False
    return all(
        _before_schedules(theirs, name, ours.get(name)) == _before_schedules(ours, name)
        for ours, theirs in zip(own, saved, strict=True)
        for name in default_options(ours["algorithm"]).keys() - _OWN - {"seed"}
        if name != "lr" or "initial_lr" in theirs
    )


def _before_schedules(group: Group, name: str, default: Any = None) -> Any:
    return group.get(f"initial_{name}", group.get(name, default))


def _difference(own: Sequence[Group], saved: Sequence[Group]) -> str:
    """Return in words where groups, their algorithms or parameters differ; empty if nowhere."""
    readings: list[tuple[str, Callable[[Sequence[Group]], list[Any]]]] = [
        ("groups", lambda groups: [g.get("name") for g in groups]),
        ("algorithms", lambda groups: [g.get("algorithm") for g in groups]),
        ("numbers of parameters", lambda groups: [len(g["params"]) for g in groups]),
    ]
    # Where one side has no names, they do not matter to torch either.
    if all("param_names" in group for group in (*own, *saved)):
        readings.insert(
            2, ("parameters", lambda groups: [n for g in groups for n in g["param_names"]])
        )
    for what, read in readings:
        ours, theirs = read(own), read(saved)
        if ours != theirs:
            odd = next(pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
            return f"{what}: {odd[1]!r} there, {odd[0]!r} here"
    return ""


def check_complete(
    name: str, algorithm: str, state: Mapping[str, Any], needed: Sequence[str]
) -> None:
    """Refuse a saved state that lacks some of the keys needed."""
    for key in needed:
        if state and key not in state:
            raise ValueError(f"the checkpoint's state of {name} ({algorithm}) has no {key!r}")


def first_state(p: Tensor, group: Group, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step; bases are drawn by the generator."""
    skipped = torch.zeros((), dtype=torch.int64, device=p.device)
    if is_entrywise(group["algorithm"]):
        return {**entrywise.first_state(p, group["algorithm"]), "skipped": skipped}
    return {
        "momentum": torch.zeros_like(p, dtype=momentum_dtype(p, group)),
        **initial_moments(p, group),
        **start_bases(p, group, generator),
        "skipped": skipped,
    }


def momentum_dtype(p: Tensor, group: Group) -> torch.dtype:
    """Return the dtype of the momentum of a parameter of a matrix group."""
    # float16 has too little range for sums of gradients.
    default = torch.float32 if p.dtype == torch.float16 else p.dtype
    name = group.get("momentum_dtype")
    return getattr(torch, name) if name else default


def fit_state(p: Tensor, state: dict[str, Tensor], group: Group) -> None:
    """Make the state of a parameter usable with the parameter as it is now.

    State saved before skipped steps were counted gets a count. Moments of adamw and sgd follow a
    parameter that was cast, as ``module.double()`` does. What belongs to former splits is dropped.

    Raises:
        RuntimeError: If the parameter has another shape than its state. torch's fused kernels
            would write outside the state's memory.
    """
    if "skipped" not in state:
        state["skipped"] = torch.zeros((), dtype=torch.int64, device=p.device)
    entrywise = is_entrywise(group["algorithm"])
    for key in MOMENTS:
        value = state.get(key)
        if value is None:
            continue
        if value.shape != p.shape:
            raise RuntimeError(
                f"a parameter of group {group['name']!r} has shape {tuple(p.shape)}, but its "
                f"{key} {tuple(value.shape)}: its data was replaced; make a new optimizer, or "
                "clear optimizer.state[parameter]"
            )
        if entrywise and value.dtype != p.dtype:
            state[key] = value.to(p.dtype)
    stored = [] if entrywise else [key for key in state if is_basis(key) or is_moment(key)]
    parts = len(matrix_shapes(p.shape, group["layout"], group["splits"])) if stored else 0
    known = {key(part) for part in range(parts) for key in (basis_key, moment_key)}
    for key in stored:
        if key not in known:
            del state[key]


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give the state of an optimizer the dtypes of the state_dict that torch has just loaded.

    torch casts the state to the parameter's dtype, which would round the float32 momentum of a
    bfloat16 parameter, and leaves counters on the device where they were saved. Kernels of adamw
    and sgd want the parameter's dtype. Every tensor is a copy, so that the state_dict, which is as
    hooks and checks have left it, shares nothing with the optimizer.
    """
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        entrywise = is_entrywise(group["algorithm"])
        for p, index in zip(group["params"], saved_group["params"], strict=True):
            for key, saved in state_dict["state"].get(index, {}).items():
                number = _NUMBERS.get(key, torch.float32)
                if not isinstance(saved, Tensor):
                    saved = torch.tensor(saved, dtype=number, device="cpu")
                cast = entrywise and key != "step" and saved.is_floating_point()
                dtype = p.dtype if cast else saved.dtype
                device = torch.device("cpu") if key == WARM else p.device
                value = placed_as(saved, p) if key in MOMENTS else saved
                form = memory_format(p) if key in MOMENTS else torch.preserve_format
                optimizer.state[p][key] = value.to(device, dtype, copy=True, memory_format=form)


def memory_format(p: Tensor) -> torch.memory_format:
    """Return the memory format of a parameter: channels_last where it is stored so."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(p.ndim)
    if form is None or is_distributed(p) or p.is_contiguous():
        return torch.preserve_format
    return form if p.is_contiguous(memory_format=form) else torch.preserve_format


def keyed_by_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict with parameters' names in place of numbers.

    ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict`` takes a state_dict of one
    process, or of DDP, in this form. If it lacks names, or has this form, it is returned unchanged.
    """
    groups = state_dict["param_groups"]
    names = {
        number: name
        for group in groups
        for number, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    if names.keys() != {number for group in groups for number in group["params"]}:
        return dict(state_dict)
    return {
        **state_dict,
        "state": {names[number]: state for number, state in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in groups
        ],
    }


def load_saved(folder: str | Path, keys: Iterable[str]) -> dict[str, Any]:
    """Return parts of a distributed checkpoint as they were saved, whole on this rank.

    ``torch.distributed.checkpoint.load`` only fills a state_dict of the same form, which an
    optimizer of another configuration does not have.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    saved: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={*keys})
    _load_state_dict(saved, FileSystemReader(folder), planner=planner, no_dist=True)
    return saved

"""States of optimizers of another configuration: the running averages of gradients are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_fanions.checks import real_number
from lit_fanions.optim.adapting import is_moment
from lit_fanions.optim.algorithms import ALGORITHMS, Group, find_algorithm
from lit_fanions.optim.bases import WARM, State, is_basis
from lit_fanions.optim.checkpoints import (
    check_complete,
    check_loadable,
    has_same_options,
    momentum_dtype,
)
from lit_fanions.optim.groups import check_group, named_parameters
from lit_fanions.optim.matrices import placed_as
from lit_fanions.optim.options import default_options
from lit_fanions.optim.reporting import warn
from lit_fanions.optim.saved_states import check_form, check_state

OnMismatch = Literal["error", "keep_momentum"]
_LISTED = 20  # names in a warning


class Average(NamedTuple):
    """How states of a kind of group hold the running average of gradients."""

    key: str  # of the average in the state
    # Maps a group and its number of steps to the factor in tensor = unit * mean gradient.
    unit: Callable[[Group, float], float]


def _matrix_unit(group: Group, step: float) -> float:
    mu = float(group["momentum"])
    return mu / (1 - mu) if group["error_feedback"] else 1.0


AVERAGES = {
    "matrix": Average("momentum", _matrix_unit),
    "adamw": Average("exp_avg", lambda group, step: 1 - group["momentum"] ** step),
    "sgd": Average("momentum", lambda group, step: 1 / (1 - group["momentum"])),
    "torch.optim.Muon": Average("momentum_buffer", lambda group, step: 1.0),
    "torch.optim.SGD": Average(
        "momentum_buffer", lambda group, step: (1 - group["dampening"]) / (1 - group["momentum"])
    ),
    "torch.optim.AdamW": Average("exp_avg", lambda group, step: 1 - group["betas"][0] ** step),
}
# Options that show to which of torch's optimizers a group belongs.
_MARKS = {
    "adjust_lr_fn": "torch.optim.Muon",
    "dampening": "torch.optim.SGD",
    "betas": "torch.optim.AdamW",
}

# Options of which each optimizer of torch with betas has one.
_ADAMS = {"amsgrad", "momentum_decay", "decoupled_weight_decay"}


def prepare(
    own: Sequence[Group], state_dict: Mapping[str, Any], on_mismatch: OnMismatch
) -> tuple[dict[str, Any], bool]:
    """Return a checked state_dict for an optimizer's own groups, and whether it was converted.

    A converted state_dict has the options of the optimizer's groups.
    """
    check_form(state_dict)
    keeps = on_mismatch == "keep_momentum" and not has_same_options(own, state_dict)
    return check_loadable(own, keep_momentum(own, state_dict) if keeps else state_dict), keeps


def keep_momentum(own: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    r"""Return a state_dict for the groups of an optimizer with the momenta of another state_dict.

    Parameters are matched by their names. Each keeps the mean m of its gradients, in the unit of
    its new algorithm: new tensor = new unit * (old tensor / old unit), with the units ::

        matrices                      1                     M <- mu M + (1 - mu) G
        matrices, error feedback      mu / (1 - mu)         M <- mu (M + G), of what is captured
        adamw, torch's AdamW, Adam    1 - beta1^step        exp_avg, before its bias correction
        sgd                           1 / (1 - mu)          M <- mu M + G
        torch.optim.SGD               (1 - dampening) / (1 - mu)
        torch.optim.Muon              1

    A group that comes to adamw from elsewhere has no second moment. It starts as AdamW that has
    seen s = 1 / (1 - beta1) gradients equal to m, as many as its average remembers: ``step`` = s,
    ``exp_avg`` = (1 - beta1^s) m, ``exp_avg_sq`` = (1 - beta2^s) m^2. Both corrected averages are
    then means of m and of the gradients to come: by Cauchy-Schwarz no entry of the first update is
    above 1.02 lr (for beta1 = .9, beta2 = .999; 1 lr for a new AdamW), and m^2 weighs as little as
    s gradients. At ``step`` = 0 the correction would multiply m by 1 / (1 - beta1), and at a large
    ``step`` the second moment would be almost 0.

    What both sides have alike is kept too: second moments and ``step`` of adamw; bases, and second
    moments of ``adapt``, where layout and splits (and ``adapt``) are the same; counts of skipped
    steps. Everything else starts anew.

    Args:
        own: Groups of the optimizer, whose options stay.
        state_dict: A state_dict of Fanion, or of torch.optim's AdamW, Adam, SGD or Muon, whose
            parameters have names: ``param_names``, or names in place of numbers.

    Raises:
        ValueError: If parameters have no names, none has the name of one here, a shape differs, or
            the groups are of an optimizer that is not known here.
    """
    saved = _saved_parameters(state_dict["param_groups"], state_dict["state"])
    named = [(group, *pair) for group in own for pair in _named(group)]
    missing = [name for _, name, _ in named if name not in saved]
    if named and len(missing) == len(named):
        raise ValueError(
            f"no parameter of the checkpoint has the name of one here ({min(saved, default='none')}"
            f" there, {missing[0]} here): it is another model's"
        )
    states = {
        number: _carried(name, p, group, *saved[name])
        for number, (group, name, p) in enumerate(named)
        if name in saved
    }
    states = {number: state for number, state in states.items() if state}
    _report(named, states, saved, missing)
    numbers = iter(range(len(named)))
    lrs = _scheduled_lrs(own, state_dict["param_groups"])
    groups = [
        {**group, "params": [next(numbers) for _ in group["params"]], "lr": lr}
        for group, lr in zip(own, lrs, strict=True)
    ]
    return {**state_dict, "state": states, "param_groups": groups}


def _scheduled_lrs(own: Sequence[Group], saved: Sequence[Group]) -> list[Any]:
    """Return the lr of each group where a schedule of the checkpoint stood, for a new initial lr.

    torch's schedulers go on from the lr of the groups, which their own state does not restore.
    """
    ratios = [
        float(group["lr"]) / float(group["initial_lr"]) if group.get("initial_lr") else 1.0
        for group in saved
    ]
    if [group.get("name") for group in saved] == [group["name"] for group in own]:
        new = ratios
    elif ratios and max(ratios) - min(ratios) <= 1e-6 * max(ratios):
        new = ratios[:1] * len(own)
    else:
        new = [1.0] * len(own)
    if new != ratios and new.count(1.0) == len(new) and any(ratio != 1 for ratio in ratios):
        warn(
            "the checkpoint's schedule had multiplied the lr of its groups by "
            f"{', '.join(f'{ratio:.4g}' for ratio in ratios)}, and they are not the groups here: "
            "every lr starts undecayed; set lr, or make a new scheduler"
        )
    lrs = []
    for group, ratio in zip(own, new, strict=True):
        lr = group["lr"]
        # Where they differ, a schedule has set the lr already.
        if ratio != 1 and "initial_lr" in group and bool(lr == group["initial_lr"]):
            value = float(group["initial_lr"]) * ratio
            lr = torch.full_like(lr, value) if isinstance(lr, Tensor) else value
        lrs.append(lr)
    return lrs


def _named(group: Group) -> list[tuple[str, Tensor]]:
    if "param_names" not in group:
        raise ValueError(
            "on_mismatch keep_momentum finds parameters by their names, which this optimizer does "
            "not have: give it (name, parameter) pairs, as model.named_parameters() does"
        )
    return named_parameters(group)


def _saved_parameters(
    groups: Sequence[Group], states: Mapping[Any, State]
) -> dict[str, tuple[Group, State]]:
    """Return the saved group and state of each parameter by its name."""
    saved: dict[str, tuple[Group, State]] = {}
    for group in groups:
        keys = group["params"]
        named = all(isinstance(key, str) for key in keys)
        names = keys if named else group.get("param_names", ())
        if len(names) != len(keys):
            raise ValueError(
                "on_mismatch keep_momentum finds parameters by their names, which the checkpoint "
                "does not have: put them into each of its groups, "
                'state_dict["param_groups"][i]["param_names"] = [...]'
            )
        complete = _completed(group)
        saved |= {n: (complete, states.get(key, {})) for n, key in zip(names, keys, strict=True)}
    return saved


def _kind(group: Group) -> str:
    """Return the row of ``AVERAGES`` of a group; refuse groups of unknown optimizers."""
    algorithm = group.get("algorithm")
    # Optimizers of other packages call an option so too.
    own = "name" in group and not {"mu", "betas"} & group.keys()
    if own and isinstance(algorithm, str) and algorithm in ALGORITHMS:
        return find_algorithm(algorithm).kind
    kinds = [kind for mark, kind in _MARKS.items() if mark in group]
    if kinds[:1] == ["torch.optim.AdamW"] and not _ADAMS & group.keys():
        kinds = []
    if "algorithm" in group or not kinds:
        raise ValueError(
            f"the checkpoint's group {group.get('name', '')!r} is of no known optimizer (algorithm "
            f"{algorithm!r}, options {', '.join(map(str, group))}): its momentum can "
            f"be kept from Fanion and {', '.join(dict.fromkeys(_MARKS.values()))}"
        )
    return kinds[0]


def _completed(group: Group) -> Group:
    """Return a saved group with the options that are younger than it, checked."""
    kind = _kind(group)
    if "algorithm" in group:
        where = f"the checkpoint's group {group.get('name', '')!r}"
        return check_group({**default_options(group["algorithm"]), **group}, where)
    complete = {"momentum": 0.0, **group}
    betas = group["betas"] if kind == "torch.optim.AdamW" else []
    if not isinstance(betas, (tuple, list)) or len(betas) == 1:
        raise ValueError(f"the checkpoint's betas must be two numbers, got {betas!r}")
    if betas:
        complete["betas"] = betas = [float(b) if isinstance(b, Tensor) else b for b in betas]
    for name, value in [("momentum", complete["momentum"]), *(("betas", beta) for beta in betas)]:
        real_number(f"the checkpoint's {name}", value, 0.0, 1.0)
    real_number("the checkpoint's dampening", complete.get("dampening", 0.0))
    return complete


def _carried(name: str, p: Tensor, group: Group, old_group: Group, old: State) -> dict[str, Any]:
    """Return the new state of a parameter; empty where there is no mean gradient to be kept."""
    check_state(name, p, old, group["nonfinite"] != "propagate")
    old_kind, kind = _kind(old_group), _kind(group)
    average = AVERAGES[old_kind]
    if not old or (old_kind == "torch.optim.SGD" and old.get(average.key) is None):
        return {}
    adamw = ("exp_avg", "exp_avg_sq", "step")
    check_complete(name, old_kind, old, adamw if average.key == "exp_avg" else (average.key,))
    step = float(old.get("step", 0))
    # Of a momentum that a schedule warms up, the value it ends with.
    own = {**group, "momentum": group.get("initial_momentum", group["momentum"])}
    configured = old_group.get("initial_momentum", old_group.get("momentum"))
    if kind == old_kind and configured == own["momentum"]:  # nothing to convert but feedback
        old_group = {**old_group, "momentum": configured}
    unit = average.unit(old_group, step)
    # Before the first step of adamw, error feedback without momentum, or SGD with dampening 1.
    if not unit:
        return {}
    buffer = placed_as(old[average.key], p)
    buffer = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
    new: dict[str, Any] = {}
    dtype = momentum_dtype(p, group) if kind == "matrix" else p.dtype
    if kind == "adamw":
        if "exp_avg_sq" in old:
            beta2 = old_group["betas"][1] if "betas" in old_group else old_group["beta2"]
            factor = (1 - group["beta2"] ** step) / (1 - beta2**step)
            new["exp_avg_sq"] = placed_as(old["exp_avg_sq"], p).mul(factor).to(dtype)
        else:
            step = max(1.0, float(round(1 / (1 - group["momentum"]))))
            square = (buffer / unit).square() * (1 - group["beta2"] ** step)
            new["exp_avg_sq"] = square.clamp(max=torch.finfo(dtype).max).to(dtype)
        new["step"] = torch.tensor(step, dtype=torch.float32, device="cpu")
    mean = buffer.mul(AVERAGES[kind].unit(own, step) / unit)
    # Sums of gradients may be larger than float16 has numbers.
    most = min(torch.finfo(x).max for x in (dtype, mean.dtype))
    new[AVERAGES[kind].key] = mean.clamp(-most, most).to(dtype)
    if kind == old_kind == "matrix":
        new |= {key: old[key] for key in old if _stays(key, group, old_group)}
    return new | {key: old[key] for key in old if key == "skipped"}


def _stays(key: str, group: Group, old_group: Group) -> bool:
    """Return whether a part of the state of matrices, beside the momentum, is kept."""
    options = ["layout", "splits", *(["adapt"] if is_moment(key) else [])]
    known = is_moment(key) or is_basis(key) or key == WARM
    return known and all(group[name] == old_group[name] for name in options)


def _report(
    named: Sequence[tuple[Group, str, Tensor]],
    states: Mapping[int, Any],
    saved: Mapping[str, tuple[Group, State]],
    missing: Sequence[str],
) -> None:
    """Warn of what was kept, of parameters that start anew, and of those that are dropped."""
    ways = Counter(
        f"{saved[name][0].get('algorithm', _kind(saved[name][0]))} to {group['algorithm']}: "
        for number, (group, name, _) in enumerate(named)
        if number in states
    )
    kept = ", ".join(f"{way}{count}" for way, count in ways.items())
    warn(
        f"on_mismatch keep_momentum: {len(states)} of {len(named)} parameters keep their momentum "
        f"({kept or 'none'}), {len(named) - len(states)} start anew; all options are the new run's"
    )
    if missing:
        warn(f"the checkpoint lacks parameters, which start anew: {_listed(missing)}")
    if dropped := saved.keys() - {name for _, name, _ in named}:
        warn(f"the checkpoint has parameters that this optimizer lacks: {_listed(sorted(dropped))}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more

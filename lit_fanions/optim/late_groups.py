"""Complete the groups that callbacks add during training without an algorithm.

Lightning's BaseFinetuning, and whatever unfreezes layers as it does, adds ``{"params": ..., "lr":
...}`` with matrices and vectors in one. The optimizer's own first group is where such callbacks
take their lr from, and its last group is the one whose lr they change later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_fanions.optim.algorithms import ANY_SHAPE, Group, is_foreign
from lit_fanions.optim.groups import configured_group
from lit_fanions.optim.options import ENTRYWISE_LR, default_options
from lit_fanions.optim.reporting import caller_level, inform

# Groups for parameters, as the factory would have made them; empty where it does not know some.
Planner = Callable[[Sequence[Tensor]], list[dict[str, Any]]]


def is_bare(group: Group) -> bool:
    """Return whether a group says nothing about how it is stepped but an lr."""
    return group.keys() <= {"params", "lr"}


def split_bare_group(
    group: Group, others: Sequence[Group], defaults: Mapping[str, Any], planner: Planner | None
) -> list[dict[str, Any]]:
    """Return the groups that a bare group is made into.

    It has ``params``, a list of parameters or of (name, parameter), and maybe ``lr``. With a
    planner, which knows the parameters, it becomes the groups of the factory. Without one, vectors
    leave a group whose algorithm steps matrices alone: they get the options of the optimizer's
    group of vectors, or AdamW.

    The last group returned is of the kind of the optimizer's first group, if some part is, and has
    the lr given. The lr of every other group is its initial lr times one factor: what the schedule
    has made of the first group's lr by now, or the lr given if that is lower, over its initial lr.
    """
    params = [*map(_tensor, group["params"])]
    parts = planner(params) if planner else []
    if not parts:
        if defaults["algorithm"] in ANY_SHAPE or all(p.ndim > 1 for p in params):
            return [dict(group)]
        parts = _apart(group["params"], others, defaults)
    first, lr = others[0], group.get("lr")
    parts.sort(key=lambda part: not is_foreign(first["algorithm"], part["algorithm"]))
    for part in parts:
        part["lr"] = float(part["lr"]) * _speed(first, lr)
    if lr is not None:
        parts[-1]["lr"] = lr
    if len(parts) > 1:
        listed = ", ".join(
            f"{len(part['params'])} in {part.get('name', part['algorithm'])!r} "
            f"({part['algorithm']}, lr {part['lr']:g})"
            for part in parts
        )
        text = "A group of %d parameters without an algorithm was added as %d groups: %s"
        inform(text, len(params), len(parts), listed)
    return parts


def _speed(first: Group, lr: Any) -> float:
    """Return the lr of the first group, or the one given if that is lower, over its initial lr."""
    now = float(first["lr"]) if lr is None else min(float(lr), float(first["lr"]))
    initial = float(first.get("initial_lr", first["lr"]))
    # A group that was added at lr 0, in the first step of a warmup, would keep it for ever.
    return now / initial if now and initial else 1.0


def _apart(
    params: Sequence[Any], others: Sequence[Group], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a group of the matrices and a group of the vectors."""
    vectors = [p for p in params if _tensor(p).ndim < 2]
    matrices = [p for p in params if _tensor(p).ndim > 1]
    of_vectors = {**_vector_options(others), "params": vectors}
    if not matrices:
        return [of_vectors]
    alike = [group for group in others if group["algorithm"] == defaults["algorithm"]]
    like = alike[0] if alike else defaults
    lr = like.get("initial_lr", like["lr"])
    return [{"params": matrices, "algorithm": defaults["algorithm"], "lr": lr}, of_vectors]


def _tensor(p: Any) -> Tensor:
    """Return the tensor of a parameter or of a (name, parameter) pair."""
    return p if isinstance(p, Tensor) else p[1]


def _vector_options(others: Sequence[Group]) -> dict[str, Any]:
    """Return the options of the group of vectors, or those of AdamW with a warning."""
    able = [group for group in others if group["algorithm"] in ANY_SHAPE]
    if not able:
        warnings.warn(
            "vectors were added without an algorithm to an optimizer that has no group for them: "
            f"AdamW steps them with an lr of at most {ENTRYWISE_LR:g}. To choose, add them as a "
            'group of their own: {"params": ..., "algorithm": "adamw", "lr": ...}',
            stacklevel=caller_level(),
        )
        return {"algorithm": "adamw", "lr": ENTRYWISE_LR}
    ranks = {"vector": 0, "other": 1}
    like = min(able, key=lambda group: ranks.get(configured_group(group), 2))
    options = {name: like[name] for name in default_options(like["algorithm"]) if name in like}
    return {
        **options,
        "algorithm": like["algorithm"],
        "lr": like.get("initial_lr", like["lr"]),
        "momentum": like.get("initial_momentum", like["momentum"]),
        "name": f"{like['name'].partition('.')[0]}.late",
        "config_group": configured_group(like),
    }

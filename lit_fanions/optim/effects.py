"""Options that are given to a group and change nothing: refused, or warned of.

A comparison of ranks for signum, which has none, would compare nothing: such options are refused.
Settings that a recipe may keep while other algorithms are tried, as those of solvers, only warn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_fanions.lmo import BALLS
from lit_fanions.lmo.balls import POLAR_OPTIONS, SOLVER_OPTIONS
from lit_fanions.optim.adapting import splits_momentum
from lit_fanions.optim.algorithms import ALGORITHMS, Group, is_entrywise, oracle
from lit_fanions.optim.matrices import matrix_shapes
from lit_fanions.optim.options import NAMES, default_options
from lit_fanions.optim.reporting import caller_level


@dataclass(frozen=True)
class _Effect:
    """When an option changes the steps of a group."""

    # Returns whether the option does in a group with all its options.
    holds: Callable[[str, Group], bool]
    hint: str  # why it does not, or what to do
    # Another option whose value may switch this one off, and which the user must not have given for
    # a complaint to be due. Empty: none.
    needs: str = ""


def _ball_reads(name: str, group: Group) -> bool:
    balls = (ALGORITHMS[group["algorithm"]].ball, group["blend"])
    return any(name in BALLS[ball].reads for ball in balls)


def _solver_reads(name: str, group: Group) -> bool:
    oracles = {
        oracle(group, *shape[-2:])
        for p in group["params"]
        for shape in matrix_shapes(p.shape, group["layout"], group["splits"])
        if shape.numel()
    }
    read = [ball.options_read(o.case) for o in oracles for ball, _ in o.parts]
    return not oracles or any(name in names for names in read)


def _adapts(name: str, group: Group) -> bool:
    return group["adapt"] != "none"


_REFUSED = {
    "rank": _Effect(_ball_reads, "leave rank out, or choose another algorithm or blend"),
    "p": _Effect(_ball_reads, "p belongs to the Schatten ball: set algorithm or blend to it"),
    "blend": _Effect(
        lambda _, group: group["alpha"] != 1, "alpha 1 leaves nothing to it: set alpha too", "alpha"
    ),
    "cautious_decay": _Effect(
        lambda _, group: group["weight_decay"] != 0, "set weight_decay too", "weight_decay"
    ),
    **{
        name: _Effect(_adapts, f"{name} belongs to adamw and to adapt: set adapt too", "adapt")
        for name in ("beta2", "eps")
    },
    **{
        name: _Effect(
            lambda _, group: splits_momentum(group), f"{name} belongs to adapt: set it to leading"
        )
        for name in ("adapt_rank", "rest_weight")
    },
}
_WARNED_OF = {
    "sign_scale": _Effect(_ball_reads, "neither its ball nor its blend is sign"),
    "nesterov": _Effect(
        lambda _, group: not group["error_feedback"], "error feedback has a momentum of its own"
    ),
    **{
        name: _Effect(_solver_reads, "the group has no directions U V^T of full rank", "rank")
        for name in POLAR_OPTIONS
    },
    **{
        name: _Effect(_solver_reads, "the group has no directions of rank k from a solver", "rank")
        for name in SOLVER_OPTIONS
    },
}
_EFFECTS = {**_REFUSED, **_WARNED_OF}


def has_effect(group: Group, name: str) -> bool:
    """Return whether an option changes the steps of a group."""
    return name in group and (name not in _EFFECTS or _EFFECTS[name].holds(name, group))


def check_effects(
    added: Sequence[tuple[Group, Mapping[str, Any]]], groups: Sequence[Group]
) -> None:
    """Refuse options that change nothing, and warn of those that a recipe may keep.

    A value that changes the steps of another group was meant for that one: groups of a recipe and
    of a constructor share their options. Each group that was ``added`` comes with the options that
    were given for it, those of the constructor included; ``groups`` are all of the optimizer.
    """
    others = [group for group in groups if not is_entrywise(group["algorithm"])]
    for group, given in added:
        if is_entrywise(group["algorithm"]):
            continue
        where = f"group {group['name']!r} ({group['algorithm']})"
        for name, effect in _without_effect(_REFUSED, group, given, others):
            raise ValueError(f"{where}: {name} {given[name]!r} has no effect: {effect.hint}")
        idle = _without_effect(_WARNED_OF, group, given, others)
        for hint in dict.fromkeys(effect.hint for _, effect in idle):
            names = ", ".join(f"{name} {given[name]!r}" for name, x in idle if x.hint == hint)
            warnings.warn(f"{where}: no effect of {names}: {hint}", stacklevel=caller_level())


def _without_effect(
    effects: Mapping[str, _Effect], group: Group, given: Mapping[str, Any], others: Sequence[Group]
) -> list[tuple[str, _Effect]]:
    """Return the given options of a group that are no defaults and change no group's steps."""
    # Nesterov is off by default where it has no effect.
    defaults = {**default_options(group["algorithm"]), "nesterov": False}
    return [
        (name, effect)
        for name, effect in effects.items()
        if given.get(name) not in (None, defaults[name])
        and effect.needs not in given
        and not effect.holds(name, group)
        and not any(other[name] == given[name] and effect.holds(name, other) for other in others)
    ]


def given_options(group: Group, *sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a checked group that some source gives, with the stored values."""
    return {n: group[n] for n in NAMES if any(s.get(n) is not None for s in sources)}

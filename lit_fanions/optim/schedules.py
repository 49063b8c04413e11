"""Schedules of lr, momentum, alpha and rank, one per parameter group."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_fanions.checks import check_choice, real_number, whole_number
from lit_fanions.optim.algorithms import Group, Rank
from lit_fanions.optim.effects import has_effect
from lit_fanions.optim.groups import check_combination
from lit_fanions.optim.options import CHECKS
from lit_fanions.optim.reporting import warn

Span = int | float
_SPANS = (
    "warmup", "cooldown", "steps", "freeze_after", "momentum_warmup", "transition_start",
    "transition",
)  # fmt: skip
_LONGEST = 10**15  # steps; a float holds each number up to there
# Stands for the length of the run at its first step, where no multiplier depends on it.
_UNKNOWN_TOTAL = 10**9


@dataclass(frozen=True)
class ScheduleConfig:
    """How lr, momentum, alpha and rank of a group change over the run.

    A length is a number of optimizer steps (an int) or a fraction of the run (a float, at most 1).

    Args:
        shape: How lr falls during the cooldown: constant (not at all), linear or cosine.
        warmup: Length over which lr rises linearly to its value.
        warmup_start: Multiple of lr at the first step of the warmup.
        cooldown: Length of the fall at the end. 1.0 is all that the warmup leaves; .45 is constant
            for the first 55 %.
        floor: Multiple of lr at which the fall ends.
        steps: Length of the whole schedule, None for the run's. Afterwards lr stays at the floor.
        freeze_after: Length after which lr is 0, None for never.
        momentum_warmup: Length over which momentum rises linearly from momentum_start to its value,
            for groups of a ball and of sgd. beta1 of adamw stays, because its bias correction takes
            beta1 to be the same in all steps.
        momentum_start: Momentum at the first step of the momentum warmup, at most the group's own.
        alpha_end: Alpha at the end of the transition, for groups of a ball; None to keep it. With
            alpha 1.1 and alpha_end .5 the steps go from Contra-Muon to Soft-Muon.
        rank_end: Rank at the end of the transition, for groups of a ball; None to keep it. A whole
            number if the group's rank is one, else a fraction (full is 1.0).
        transition_start: Length before the transition, in which alpha and rank are the group's own.
        transition: Length of the transition, over which alpha and rank change linearly.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Span = 0
    warmup_start: float = 0.0
    cooldown: Span = 1.0
    floor: float = 0.0
    steps: Span | None = None
    freeze_after: Span | None = None
    momentum_warmup: Span = 0
    momentum_start: float = 0.85
    alpha_end: float | None = None
    rank_end: int | float | None = None
    transition_start: Span = 0
    transition: Span = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_choice("shape", self.shape, ("constant", "linear", "cosine"))
        for name in _SPANS:
            span = getattr(self, name)
            if span is None:
                continue
            whole = isinstance(span, numbers.Integral)
            number = isinstance(span, numbers.Real) and not isinstance(span, bool)
            if not number or not 0 <= span <= (_LONGEST if whole else 1):
                raise ValueError(
                    f"{name} must be a number of steps (an int) or a fraction of the run (a float "
                    f"in [0, 1]), got {span!r}"
                )
            # A number of NumPy is no int and often no float, and these tell steps from fractions.
            object.__setattr__(self, name, int(span) if whole else float(span))
        for name in ("warmup_start", "floor", "momentum_start"):
            if not 0 <= real_number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("alpha", "rank"):
            if (end := getattr(self, f"{name}_end")) is not None:
                object.__setattr__(self, f"{name}_end", CHECKS[name](f"{name}_end", end))
        if self.rank_end == "full":
            raise ValueError("rank_end must be a whole number or a fraction; full is 1.0")

    @property
    def needs_total(self) -> bool:
        """Whether an option depends on the run's total number of steps."""
        spans = [self.warmup, self.momentum_warmup, self.freeze_after, self.steps]
        if self.alpha_end is not None or self.rank_end is not None:
            spans += [self.transition_start, self.transition]
        falls = self.shape != "constant" and not isinstance(self.steps, int)
        return falls or any(isinstance(span, float) and span > 0 for span in spans)


def lr_multiplier(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Return the factor, from 0 to 1, that multiplies the lr of a group after some steps.

    ``total``, the steps of the run, is only read where ``schedule.needs_total``.
    """
    if schedule.freeze_after is not None and step >= _steps(schedule.freeze_after, total):
        return 0.0
    warmup = _steps(schedule.warmup, total)
    if step < warmup:
        return schedule.warmup_start + (1 - schedule.warmup_start) * step / warmup
    if schedule.shape == "constant":
        return 1.0
    end = total if schedule.steps is None else _steps(schedule.steps, total)
    length = min(_steps(schedule.cooldown, end), end - warmup)
    begin = end - length
    progress = 1.0 if step >= end else max(0.0, step - begin) / max(1, length)
    fall = progress if schedule.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - schedule.floor) * fall


def momentum_at(schedule: ScheduleConfig, momentum: float, step: int, total: int) -> float:
    """Return the momentum after some steps of a group whose warmup ends with ``momentum``."""
    warmup = _steps(schedule.momentum_warmup, total)
    if step >= warmup:
        return momentum
    start = min(schedule.momentum_start, momentum)  # the momentum never falls
    return start + (momentum - start) * step / warmup


def alpha_at(schedule: ScheduleConfig, alpha: float, step: int, total: int) -> float:
    """Return the alpha after some steps of a group that starts with ``alpha``."""
    if schedule.alpha_end is None:
        return alpha
    return alpha + (schedule.alpha_end - alpha) * _transition(schedule, step, total)


def rank_at(schedule: ScheduleConfig, rank: Rank, step: int, total: int) -> Rank:
    """Return the rank after some steps of a group that starts with ``rank``, rounded if whole."""
    share = _transition(schedule, step, total)
    if schedule.rank_end is None or share == 0:
        return rank
    start = 1.0 if rank == "full" else rank
    now = start + (schedule.rank_end - start) * share
    return round(now) if isinstance(schedule.rank_end, int) else now


def _transition(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Return the share of the transition that is done, from 0 to 1."""
    done = step - _steps(schedule.transition_start, total)
    return min(1.0, max(0, done) / max(1, _steps(schedule.transition, total)))


def _steps(span: Span, total: int) -> int:
    return round(span * total) if isinstance(span, float) else span


_SCHEDULED: dict[str, Callable[..., Any]] = {
    "momentum": momentum_at,
    "alpha": alpha_at,
    "rank": rank_at,
}


def changed_options(schedule: ScheduleConfig, group: Group) -> list[str]:
    """Return the options of a group, beside lr, that its schedule changes."""
    return [
        name
        for name in _scheduled(schedule)
        if name in group and (name, group.get("algorithm")) != ("momentum", "adamw")
        and (name != "rank" or has_effect(group, name))
    ]  # fmt: skip


def _scheduled(schedule: ScheduleConfig) -> list[str]:
    """Return the options, beside lr, that a schedule changes in groups that use them."""
    ends = {
        "momentum": schedule.momentum_warmup or None,
        "alpha": schedule.alpha_end,
        "rank": schedule.rank_end,
    }
    return [name for name, end in ends.items() if end is not None]


def _warn_of_unused(schedules: Sequence[ScheduleConfig], groups: Sequence[Any]) -> None:
    """Warn of what a schedule changes in none of the groups that have it."""
    pairs = list(zip(schedules, groups, strict=True))
    unused = {
        name
        for schedule in schedules
        for name in _scheduled(schedule)
        if not any(name in changed_options(own, g) for own, g in pairs if own == schedule)
    }
    for name in sorted(unused):
        warn(
            f"the schedule of {name} has no effect: no group that has it uses {name}"
            + (" (beta1 of adamw is not warmed up)" if name == "momentum" else "")
        )


def _keep_initial(group: dict[str, Any], schedule: ScheduleConfig) -> None:
    """Keep the values that a group's schedule starts from, beside torch's own ``initial_lr``.

    Raises:
        ValueError: If the group cannot have the alpha or the rank that the schedule ends with.
    """
    changed = changed_options(schedule, group)
    for name in changed:
        group.setdefault(f"initial_{name}", group[name])
    ends = {"alpha": schedule.alpha_end, "rank": schedule.rank_end}
    ends = {name: end for name, end in ends.items() if name in changed}
    where = f"the schedule of group {group.get('name')!r}"
    way_out = f"; overrides.{group.get('name')}.schedule gives the group a schedule of its own"
    if "rank" in ends and isinstance(group["initial_rank"], int) != isinstance(ends["rank"], int):
        raise ValueError(
            f"{where}: rank {group['initial_rank']!r} and rank_end {ends['rank']!r} must both be "
            f"whole numbers or both fractions (full is 1.0){way_out}"
        )
    try:
        if ends:
            check_combination({**group, **ends}, where)
    except ValueError as error:
        raise ValueError(f"{error}{way_out}") from None


class GroupSchedule(LRScheduler):
    """Set lr, momentum, alpha and rank of every group of an optimizer by that group's schedule.

    A group that is added to the optimizer later (by BackboneFinetuning, for instance) follows the
    schedule of the first group whose name begins alike (``matrix`` for ``matrix.late``), else of
    the first one with the same algorithm, else the first one of all. The lr it has when it is
    added is its lr at that step; an lr that somebody sets afterwards is treated in the same way.

    Args:
        optimizer: Its groups have ``lr``. ``momentum``, ``alpha`` and ``rank`` are changed where
            a group has them and its schedule has a warmup or an end for them, and are left alone
            elsewhere.
        schedules: One for each group.
        total_steps: Optimizer steps of the schedule, or a function that returns how many are left
            (``factory.steps_left``). The function is asked after every step, never before the
            first one: a Trainer that is asked too early forgets the state of a loader that it is
            about to restore.
        last_epoch: Steps done so far, -1 at the start.

    Attributes:
        total_steps: The length by which lr was computed last, None before the first step.

    Raises:
        ValueError: If the number of schedules is not the number of groups.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedules: Sequence[ScheduleConfig],
        total_steps: int | Callable[[], int],
        last_epoch: int = -1,
    ) -> None:
        if len(schedules) != len(optimizer.param_groups):
            raise ValueError(
                f"{len(schedules)} schedules for {len(optimizer.param_groups)} parameter groups"
            )
        self.schedules = list(schedules)
        self.steps_left = total_steps if callable(total_steps) else None
        self.total_steps = None if callable(total_steps) else total_steps
        for group, schedule in zip(optimizer.param_groups, schedules, strict=True):
            _keep_initial(group, schedule)
        _warn_of_unused(schedules, optimizer.param_groups)
        self._first_groups = len(schedules)
        self._multipliers: list[float] = []
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the lr of each group at this step, and set what else its schedule changes."""
        if self.steps_left is not None and self.last_epoch > 0:
            self.total_steps = self.last_epoch + self.steps_left()
        return self._set_options()

    def _set_options(self) -> list[float]:
        """Set what the schedules change but lr, and return the lr of each group."""
        total = _UNKNOWN_TOTAL if self.total_steps is None else self.total_steps
        for i in range(self._first_groups, len(self.optimizer.param_groups)):
            self._adopt(i)
        for group, schedule in zip(self.optimizer.param_groups, self.schedules, strict=True):
            for name in changed_options(schedule, group):
                initial = group.setdefault(f"initial_{name}", group[name])
                group[name] = _SCHEDULED[name](schedule, initial, self.last_epoch, total)
        self._multipliers = [
            lr_multiplier(schedule, self.last_epoch, total) for schedule in self.schedules
        ]
        lrs = zip(self.base_lrs, self._multipliers, strict=True)
        return [float(base) * multiplier for base, multiplier in lrs]

    def _adopt(self, i: int) -> None:
        """Give a group that was added later its schedule, and take over an lr set from outside."""
        group = self.optimizer.param_groups[i]
        like = self._first_group_like(group)
        if i >= len(self.schedules):
            self.schedules.append(self.schedules[like])
        if i >= len(self.base_lrs):
            self.base_lrs.append(float(group["lr"]))
            _keep_initial(group, self.schedules[i])
        # Callbacks of fine-tuning raise the lr of their group themselves, epoch by epoch.
        if i >= len(self._last_lr) or group["lr"] != self._last_lr[i]:
            self.base_lrs[i] = float(group["lr"]) / (self._multipliers[like] or 1.0)
        group["initial_lr"] = self.base_lrs[i]

    def _first_group_like(self, group: dict[str, Any]) -> int:
        """Return the index of the group whose schedule a group added later follows."""
        first = self.optimizer.param_groups[: self._first_groups]

        def stem(group: dict[str, Any]) -> str:
            return str(group.get("name", "")).partition(".")[0]

        alike = [i for i, g in enumerate(first) if stem(g) == stem(group)]
        alike += [i for i, g in enumerate(first) if g.get("algorithm") == group.get("algorithm")]
        return alike[0] if alike else 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands; the schedules themselves are configuration."""
        configured = ("schedules", "steps_left", "_first_groups")
        return {k: v for k, v in super().state_dict().items() if k not in configured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore where a schedule stood; its length stays that of this run.

        If the optimizer has kept its own options (on_mismatch keep_momentum), only the number of
        steps is taken from the checkpoint, and this schedule's lr at that step is set.

        Args:
            state_dict: A result of ``state_dict()``, or of another scheduler of the optimizer.

        Raises:
            ValueError: If the steps done are no whole number, or the state is for another number
                of groups.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"no state_dict of a schedule: it is a {type(state_dict).__name__}")
        known = self.state_dict().keys() - {"total_steps"}
        state = {key: value for key, value in state_dict.items() if key in known}
        done = whole_number("the schedule's last_epoch", state.get("last_epoch"), 0)
        if not getattr(self.optimizer, "keeps_options", False):
            self._check_base_lrs(state.get("base_lrs"))
            super().load_state_dict(state)
            return
        if "_multipliers" not in state:
            warn(
                "the checkpoint's lr schedule is of another class: its last_epoch, "
                f"{done}, is taken for the number of optimizer steps done"
            )
        self.last_epoch, self._step_count = done, done + 1
        if self.steps_left is not None:  # until it can be asked, after the next step
            total = state_dict.get("total_steps")
            self.total_steps = total and whole_number("the schedule's total_steps", total)
        lrs = self._set_options()
        self._last_lr = [*lrs]
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _check_base_lrs(self, base_lrs: Any) -> None:
        least, most = self._first_groups, len(self.optimizer.param_groups)
        if not isinstance(base_lrs, (list, tuple)) or not least <= len(base_lrs) <= most:
            raise ValueError(
                f"the schedule's base_lrs are {base_lrs!r}, and the optimizer has {most} groups: "
                "load it with the configuration that saved it, after groups that were added"
            )
        for lr in base_lrs:
            CHECKS["lr"]("the schedule's base_lrs", lr)

"""Learning-rate and momentum schedules, one per parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Span = int | float
_LONG = 10**9


@dataclass(frozen=True)
class ScheduleConfig:
    """How lr and momentum of a group change over the run.

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
        momentum_warmup: Length over which momentum rises linearly from momentum_start to its value.
        momentum_start: Momentum at the first step of that, where the group's is not lower still.
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

    def __post_init__(self) -> None:
        """Refuses what has no meaning."""
        if self.shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"shape must be constant, linear or cosine, got {self.shape!r}")
        for name in ("warmup", "cooldown", "steps", "freeze_after", "momentum_warmup"):
            span = getattr(self, name)
            if span is None:
                continue
            number = isinstance(span, (int, float)) and not isinstance(span, bool)
            if not number or not 0 <= span <= (1 if isinstance(span, float) else math.inf):
                raise ValueError(
                    f"{name} must be a number of steps (an int) or a fraction of the run (a float "
                    f"in [0, 1]), got {span!r}"
                )
        for name in ("warmup_start", "floor", "momentum_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")

    @property
    def needs_total(self) -> bool:
        """Whether the run's total number of steps matters."""
        spans = [self.warmup, self.momentum_warmup, self.freeze_after, self.steps]
        falls = self.shape != "constant" and not isinstance(self.steps, int)
        return falls or any(isinstance(span, float) and span > 0 for span in spans)


def lr_multiplier(schedule: ScheduleConfig, step: int, total: int) -> float:
    """What multiplies the lr of a group at a step.

    Args:
        schedule: The schedule.
        step: Optimizer steps done so far.
        total: Steps of the run; only read where ``schedule.needs_total``.

    Returns:
        A number from 0 to 1.
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
    """The momentum of a group at a step.

    Args:
        schedule: The schedule.
        momentum: The group's momentum after the warmup.
        step: Optimizer steps done so far.
        total: Steps of the run.

    Returns:
        The momentum.
    """
    warmup = _steps(schedule.momentum_warmup, total)
    if step >= warmup:
        return momentum
    start = min(schedule.momentum_start, momentum)  # it rises, or stays
    return start + (momentum - start) * step / warmup


def _steps(span: Span, total: int) -> int:
    return round(span * total) if isinstance(span, float) else span


class GroupSchedule(LRScheduler):
    """Sets lr and momentum of every group of an optimizer by that group's schedule.

    Args:
        optimizer: Its groups have ``lr`` and ``momentum``.
        schedules: One for each group.
        total_steps: Optimizer steps of the run, or a function that is asked for them after the
            first step: a Trainer knows them only then, and asking earlier would make it forget
            the state of a loader that it is about to restore.
        last_epoch: Steps done so far, -1 at the start.

    Raises:
        ValueError: If there is not one schedule a group.
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
        self.schedules, self.total_steps = list(schedules), total_steps
        # Beside initial_lr, which torch keeps there.
        self.base_momentums = [
            group.setdefault("initial_momentum", group["momentum"])
            for group in optimizer.param_groups
        ]
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The lr of each group at this step; sets their momenta on the way."""
        total = self._total()
        for group, schedule, momentum in zip(
            self.optimizer.param_groups, self.schedules, self.base_momentums, strict=True
        ):
            group["momentum"] = momentum_at(schedule, momentum, self.last_epoch, total)
        return [
            float(base) * lr_multiplier(schedule, self.last_epoch, total)
            for base, schedule in zip(self.base_lrs, self.schedules, strict=True)
        ]

    def _total(self) -> int:
        if not callable(self.total_steps):
            return self.total_steps
        if self.last_epoch == 0:
            return _LONG  # where a run starts does not depend on its length
        self.total_steps = self.total_steps()
        return self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands; the schedules themselves are configuration."""
        state = super().state_dict()
        return {k: v for k, v in state.items() if k not in ("schedules", "total_steps")}

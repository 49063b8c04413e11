"""Fanion in any Lightning project, without a change of its code."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_fanions.optim.config import FanionConfig
from lit_fanions.optim.factory import configure_optimizers
from lit_fanions.optim.schedules import ScheduleConfig

_METHOD = "configure_optimizers"


class FanionOptimizer(Callback):
    """Trains the module with Fanion instead of what its ``configure_optimizers`` returns.

    In the YAML of any project with LightningCLI::

        trainer:
          callbacks:
            - class_path: lit_fanions.callbacks.FanionOptimizer
              init_args:
                optimizer:
                  matrix: {algorithm: f_muon, lr: 0.02}
                  other: {lr: 3.0e-3}

    The split of the parameters is printed when training starts, and by `params`. Lightning asks for
    a ``configure_optimizers`` before it sets callbacks up: a module that has none needs one that
    returns None.

    Args:
        optimizer: The configuration, a mapping or a FanionConfig; None for the defaults.
        keep_schedule: Keep the module's own learning-rate scheduler: every group's lr is then
            multiplied by what it makes of the lr of the module's own optimizer, which is built
            for that and steps nothing.

    Raises:
        ValueError: If the configuration has an unknown key, or a schedule beside the one kept.
    """

    def __init__(self, optimizer: FanionConfig | None = None, keep_schedule: bool = False) -> None:
        self.config = FanionConfig.from_dict(optimizer)
        self.keep_schedule = keep_schedule
        self._hidden: Any = None
        own = [self.config.schedule, *(o.schedule for o in self.config.overrides.values())]
        if keep_schedule and any(schedule not in (None, ScheduleConfig()) for schedule in own):
            raise ValueError(
                "keep_schedule keeps the module's schedule: leave out optimizer.schedule"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the factory in the place of the module's ``configure_optimizers``."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"FanionOptimizer cannot train {type(pl_module).__name__}, which steps its "
                "optimizers by hand: call lit_fanions.configure_optimizers in its own method"
            )
        original = pl_module.configure_optimizers
        attributes = vars(pl_module)  # of the instance: they come before the class's methods
        self._hidden = attributes.get(_METHOD)
        attributes[_METHOD] = functools.partial(
            _configured, pl_module, self.config, original if self.keep_schedule else None
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the module its method back."""
        attributes = vars(pl_module)
        replaced = attributes.get(_METHOD)
        if isinstance(replaced, functools.partial) and replaced.func is _configured:
            del attributes[_METHOD]
            if self._hidden is not None:  # LightningCLI puts one there
                attributes[_METHOD] = self._hidden

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same after an error."""
        self.teardown(trainer, pl_module, "fit")


def _configured(
    module: LightningModule, config: FanionConfig, original: Callable[[], Any] | None
) -> dict[str, Any]:
    made = configure_optimizers(module, config)
    if original is None:
        return made
    entry = _scheduler_entry(original())
    if entry is None:
        return {"optimizer": made["optimizer"]}
    followed = entry["scheduler"]
    return {
        "optimizer": made["optimizer"],
        "lr_scheduler": {
            "name": "lr",
            "reduce_on_plateau": isinstance(followed, ReduceLROnPlateau),
            **entry,
            "scheduler": FollowedSchedule(made["optimizer"], followed),
        },
    }


def _scheduler_entry(configured: Any) -> dict[str, Any] | None:
    """The one scheduler in what ``configure_optimizers`` returns, in Lightning's dict form."""
    schedulers: list[Any] = []
    if isinstance(configured, Mapping):
        schedulers = [configured[key] for key in ("lr_scheduler",) if configured.get(key)]
    elif isinstance(configured, (tuple, list)) and configured:
        if isinstance(configured[-1], (tuple, list)):  # [optimizers], [schedulers]
            schedulers = list(configured[-1])
        elif isinstance(configured[0], Mapping):
            schedulers = [one["lr_scheduler"] for one in configured if one.get("lr_scheduler")]
    if len(schedulers) > 1:
        raise MisconfigurationException(
            f"keep_schedule: the module has {len(schedulers)} schedulers, of which none can be "
            "chosen: leave it out and give optimizer.schedule"
        )
    if not schedulers:
        return None
    entry = dict(schedulers[0]) if isinstance(schedulers[0], Mapping) else {}
    monitor = configured.get("monitor") if isinstance(configured, Mapping) else None
    return {"scheduler": schedulers[0], **({"monitor": monitor} if monitor else {}), **entry}


class FollowedSchedule(LRScheduler):
    """Multiplies the lr of every group by what another optimizer's scheduler makes of its lr.

    Args:
        optimizer: Whose groups are scheduled.
        followed: A scheduler of an optimizer that is never stepped. The lr of its first group that
            has one, over the highest lr that the scheduler knows of (cycles), or else the initial
            one, is the multiplier.
    """

    def __init__(self, optimizer: Optimizer, followed: Any) -> None:
        self.followed = followed
        super().__init__(optimizer)

    def _multiplier(self) -> float:
        highest = getattr(self.followed, "max_lrs", None)  # of CyclicLR
        for i, group in enumerate(self.followed.optimizer.param_groups):
            reference = highest[i] if highest else group.get("max_lr", group.get("initial_lr"))
            if reference is None:  # of ReduceLROnPlateau, before its first step
                reference = group["initial_lr"] = group["lr"]
            if reference:  # a frozen group has no schedule to see
                return float(group["lr"]) / float(reference)
        raise MisconfigurationException(
            "keep_schedule: every lr of the module's own optimizer is 0, which no schedule changes"
        )

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The lr of each group."""
        multiplier = self._multiplier()
        return [float(base) * multiplier for base in self.base_lrs]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the other scheduler, with a metric if it wants one, and follows it."""
        # The first call is the constructor's own.
        if getattr(self, "_started", False):
            with warnings.catch_warnings():  # that its optimizer is never stepped
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.followed.step(*args, **kwargs)
        self._started = True
        self.last_epoch += 1
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Where both schedulers stand."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": self.base_lrs,
            "followed": self.followed.state_dict(),
            "lrs": [group["lr"] for group in self.followed.optimizer.param_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both, and the lr from which the other one goes on."""
        self.last_epoch, self.base_lrs = state_dict["last_epoch"], state_dict["base_lrs"]
        self.followed.load_state_dict(state_dict["followed"])
        for group, lr in zip(self.followed.optimizer.param_groups, state_dict["lrs"], strict=True):
            group["lr"] = lr
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

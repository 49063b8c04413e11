"""Train any Lightning module with Fanion, without changing its code."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_fanions.callbacks.lightning_interface import Callback, MisconfigurationException
from lit_fanions.checks import check_flag
from lit_fanions.optim.config import FanionConfig
from lit_fanions.optim.factory import configure_optimizers
from lit_fanions.optim.schedules import ScheduleConfig

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_METHOD = "configure_optimizers"


class FanionOptimizer(Callback):
    """Train the module with Fanion instead of the optimizer of its ``configure_optimizers``.

    In the YAML of any project with LightningCLI::

        trainer:
          callbacks:
            - class_path: lit_fanions.callbacks.FanionOptimizer
              init_args:
                optimizer:
                  matrix: {algorithm: f_muon, lr: 0.02}
                  other: {lr: 3.0e-3}

    The module's own learning-rate schedule is kept, unless ``optimizer`` has a schedule: its
    scheduler goes on with the module's own optimizer, which is built for that and never stepped,
    and every group's lr is multiplied by the factor by which the scheduler has changed that
    optimizer's lr.

    The split of the parameters is printed when training starts, and by `params`. Lightning asks for
    a ``configure_optimizers`` before it sets callbacks up: a module that has none needs one that
    returns None.

    Args:
        optimizer: The configuration, a mapping or a FanionConfig; None for the defaults.
        keep_schedule: True to keep the module's schedule, and to fail where that is impossible;
            False for the schedule of ``optimizer``, without calling the module's method; None to
            keep it where ``optimizer`` has none, with a warning where that is impossible.

    Raises:
        ValueError: If the configuration has an unknown key, or a schedule beside the one kept.
    """

    def __init__(
        self, optimizer: FanionConfig | None = None, keep_schedule: bool | None = None
    ) -> None:
        self.config = FanionConfig.from_dict(optimizer)
        if keep_schedule is not None:
            check_flag("keep_schedule", keep_schedule)
        self.keep_schedule = keep_schedule
        self._hidden: Any = None
        own = [self.config.schedule, *(o.schedule for o in self.config.overrides.values())]
        self._has_schedule = any(schedule not in (None, ScheduleConfig()) for schedule in own)
        if keep_schedule and self._has_schedule:
            raise ValueError(
                "keep_schedule keeps the module's schedule: leave out optimizer.schedule"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the module's ``configure_optimizers`` by the factory."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"FanionOptimizer cannot train {type(pl_module).__name__}, which uses manual "
                "optimization: call lit_fanions.configure_optimizers in its own method"
            )
        attributes = vars(pl_module)  # attributes of the instance precede the class's methods
        if _is_replaced(attributes):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} already has a FanionOptimizer: use one per Trainer"
            )
        keep = not self._has_schedule if self.keep_schedule is None else self.keep_schedule
        original = pl_module.configure_optimizers
        self._hidden = attributes.get(_METHOD)
        attributes[_METHOD] = functools.partial(
            _configure,
            pl_module,
            self.config,
            original=original if keep else None,
            required=bool(self.keep_schedule),
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's method."""
        attributes = vars(pl_module)
        if _is_replaced(attributes):
            del attributes[_METHOD]
            if self._hidden is not None:  # LightningCLI sets a method on the instance
                attributes[_METHOD] = self._hidden

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Restore the module's method."""
        self.teardown(trainer, pl_module, "fit")


def _is_replaced(attributes: Mapping[str, Any]) -> bool:
    method = attributes.get(_METHOD)
    return isinstance(method, functools.partial) and method.func is _configure


def _configure(
    module: LightningModule,
    config: FanionConfig,
    *,
    original: Callable[[], Any] | None,
    required: bool,
) -> dict[str, Any]:
    """Return the factory's optimizer with the schedule of the module's own method ``original``.

    Without that method the factory's schedule is used; ``required``: fail where it cannot be kept.
    """
    made = configure_optimizers(module, config)
    if original is None:
        return made
    try:
        entry = scheduler_entry(original())
        if entry is None:
            return {"optimizer": made["optimizer"]} if required else made
        scheduler = FollowedSchedule(made["optimizer"], entry["scheduler"])
    except Exception as error:
        if required:
            raise
        rank_zero_warn(
            f"FanionOptimizer cannot keep the lr schedule of {type(module).__name__} "
            f"({type(error).__name__}: {error}): lr stays constant; set optimizer.schedule, or "
            "keep_schedule: false"
        )
        return made
    rank_zero_info(
        "FanionOptimizer keeps the module's lr schedule, %s; set optimizer.schedule or "
        "keep_schedule: false to replace it",
        type(entry["scheduler"]).__name__,
    )
    made["lr_scheduler"] = {
        "name": "lr",
        "reduce_on_plateau": isinstance(entry["scheduler"], ReduceLROnPlateau),
        **entry,
        "scheduler": scheduler,
    }
    return made


def scheduler_entry(configured: Any) -> dict[str, Any] | None:
    """Return the one scheduler that ``configure_optimizers`` has returned, as a dictionary."""
    parts = configured if isinstance(configured, (tuple, list)) else [configured]
    if parts and isinstance(parts[-1], (tuple, list)):  # [optimizers], [schedulers]
        schedulers = list(parts[-1])
    else:
        mappings = [part for part in parts if isinstance(part, Mapping)]
        schedulers = [own["lr_scheduler"] for own in mappings if own.get("lr_scheduler")]
    if len(schedulers) > 1:
        raise MisconfigurationException(
            f"keep_schedule: the module has {len(schedulers)} schedulers, and one lr schedule can "
            "be kept"
        )
    if not schedulers:
        return None
    entry = dict(schedulers[0]) if isinstance(schedulers[0], Mapping) else {}
    monitor = configured.get("monitor") if isinstance(configured, Mapping) else None
    return {"scheduler": schedulers[0], **({"monitor": monitor} if monitor else {}), **entry}


class FollowedSchedule(LRScheduler):
    """Multiplies the lr of every group by the factor that another scheduler applies to its lr.

    The factor is the current lr of the other optimizer's first group with a nonzero lr, over the
    highest lr that the scheduler knows for it (cycles), or over its initial lr. That optimizer is
    never stepped. A group that is added later starts from its own lr and is changed by the same
    ratio from step to step, so that the callback that has added it may change its lr too.
    """

    def __init__(self, optimizer: Optimizer, followed: Any) -> None:
        self.followed = followed
        self._warned = False
        super().__init__(optimizer)

    def _multiplier(self) -> float:
        highest = getattr(self.followed, "max_lrs", None)  # of CyclicLR
        multipliers = []
        for i, group in enumerate(self.followed.optimizer.param_groups):
            reference = highest[i] if highest else group.get("max_lr", group.get("initial_lr"))
            if reference is None:  # before the first step of ReduceLROnPlateau
                reference = group["initial_lr"] = group["lr"]
            if reference:  # lr 0 is a frozen group, which no schedule changes
                multipliers.append(float(group["lr"]) / float(reference))
        if not multipliers:
            raise MisconfigurationException(
                "keep_schedule: every lr of the module's own optimizer is 0, and no schedule "
                "changes that"
            )
        if max(multipliers) > min(multipliers) + 1e-6 and not self._warned:
            self._warned = True
            rank_zero_warn(
                "the module's scheduler treats its parameter groups differently: FanionOptimizer "
                "applies the schedule of the first group to all"
            )
        return multipliers[0]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the lr of each group that was there from the start."""
        multiplier = self._multiplier()
        return [float(base) * multiplier for base in self.base_lrs]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the other scheduler, with a metric if it takes one, and follow it."""
        before = self._multiplier()
        # The first call comes from the constructor of LRScheduler.
        if getattr(self, "_started", False):
            with warnings.catch_warnings():  # about an optimizer that is never stepped
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.followed.step(*args, **kwargs)
        self._started = True
        self.last_epoch += 1
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self.get_lr(), strict=False):
            group["lr"] = lr
        after = self._multiplier()
        for group in groups[len(self.base_lrs) :]:
            base = group.setdefault("initial_lr", group["lr"] / before if before else group["lr"])
            group["lr"] = group["lr"] * after / before if before else base * after
        self._last_lr = [float(group["lr"]) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both schedulers."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": self.base_lrs,
            "followed": self.followed.state_dict(),
            "lrs": [group["lr"] for group in self.followed.optimizer.param_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both schedulers, and the lr from which the other one continues.

        The optimizer may keep its options (on_mismatch keep_momentum); its lr then follows from
        them. The state may be that of the other scheduler alone, of a run without the callback. If
        the module's own lr was changed since, the schedule's share of it is what is restored.

        Raises:
            ValueError: If the state is that of ``GroupSchedule``, or for another number of groups.
        """
        if "_multipliers" in state_dict:
            raise ValueError(
                "the checkpoint's lr schedule is that of configure_optimizers, and the module's "
                "own scheduler is followed here: start the schedule anew, or resume without "
                "keep_schedule"
            )
        if "followed" not in state_dict:
            state_dict = {
                "last_epoch": state_dict["last_epoch"], "base_lrs": self.base_lrs,
                "followed": state_dict, "lrs": state_dict["_last_lr"],
            }  # fmt: skip
        groups = self.followed.optimizer.param_groups
        if len(state_dict["lrs"]) != len(groups):
            raise ValueError(
                f"the checkpoint's lr schedule has {len(state_dict['lrs'])} lrs, and the module's "
                f"own optimizer {len(groups)} groups: resume with the module that saved it"
            )
        self.last_epoch = state_dict["last_epoch"]
        keeps_options = getattr(self.optimizer, "keeps_options", False)
        if not keeps_options:
            self.base_lrs = state_dict["base_lrs"]
        self.followed.load_state_dict(state_dict["followed"])
        saved = state_dict["followed"].get("base_lrs", [None] * len(groups))
        for i, (group, lr, base) in enumerate(zip(groups, state_dict["lrs"], saved, strict=True)):
            initial = group.get("initial_lr", base)
            group["lr"] = lr if not base or initial == base else lr / base * initial
            if base:
                self.followed.base_lrs[i] = initial
        if keeps_options:
            for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=False):
                group["lr"] = lr
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

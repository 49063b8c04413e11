"""From a module and a typed configuration to an optimizer and its schedule."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lit_fanions.checks import whole_number
from lit_fanions.optim.algorithms import DEFAULT_ALGORITHM, is_entrywise
from lit_fanions.optim.bases import default_seed
from lit_fanions.optim.checkpoints import keyed_by_names, load_saved
from lit_fanions.optim.config import FanionConfig, Override
from lit_fanions.optim.fanion import Fanion
from lit_fanions.optim.groups import carry_over
from lit_fanions.optim.options import ENTRYWISE_LR, RUNTIME_OPTIONS, default_options
from lit_fanions.optim.parameters import STANDARD_GROUPS, Split, assign
from lit_fanions.optim.reporting import inform, warn
from lit_fanions.optim.schedules import GroupSchedule, ScheduleConfig, changed_options

# Algorithms of ``matrix`` and of ``other`` where the configuration names none.
_ALGORITHMS = {"matrix": DEFAULT_ALGORITHM, "other": "adamw"}


def split_parameters(
    module: nn.Module, config: FanionConfig | Mapping[str, Any] | None = None
) -> Split:
    """Assign every trainable parameter to a group, with the reason.

    Matrices are weights of Linear, Conv1-3d and transposed, MultiheadAttention, RNN gates and
    stacks of experts; embeddings with what is tied to them, output heads, vectors, depthwise
    filters and positional parameters are not. A tag (``parameter.fanion_group = "head"``) or the
    config's ``overrides`` decide otherwise.

    Args:
        module: The network.
        config: The configuration; None for the defaults.

    Returns:
        A list of assignments with .name, .parameter, .group, .reason; str() is a table.

    Raises:
        TypeError: If it is no module.
        ValueError: If a selector matches nothing or a group is not known.
    """
    config = FanionConfig.from_dict(config)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a module, whose structure decides the groups, got {type(module).__name__}: "
            "give parameters alone to Fanion"
        )
    _refuse_flat_shards(module)
    selectors = {
        name: (override.parameters, override.modules)
        for name, override in config.overrides.items()
        if override.parameters or override.modules
    }
    assignments = assign(module, selectors)
    roles: dict[str, set[str]] = {}
    for assignment in assignments:
        roles.setdefault(assignment.group, set()).add(assignment.role)
    known = {*STANDARD_GROUPS, *roles}
    for name in config.overrides:
        if name not in known:
            raise ValueError(
                f"overrides.{name}: no parameter is in that group; select some by parameters or "
                f"modules, or use one of {', '.join(STANDARD_GROUPS)}"
            )
    return Split(assignments, {name: _group_options(name, roles[name], config) for name in roles})


def configure_optimizers(
    module: nn.Module,
    config: FanionConfig | Mapping[str, Any] | None = None,
    *,
    total_steps: int | None = None,
    name: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Return an optimizer for a module, and its schedule, for LightningModule.configure_optimizers.

    In another project::

        def configure_optimizers(self):
            return configure_optimizers(self, algorithm="f_muon", lr=0.02)

    Args:
        module: The network: a LightningModule, or any other together with ``total_steps``.
        config: The configuration; None for the defaults.
        total_steps: Optimizer steps of the run; None: the trainer's. Only schedules that end, or
            have lengths in fractions of the run, need it.
        name: Name of the schedule, under which LearningRateMonitor logs. Default: lr for a
            LightningModule; for a part of one none, so that Lightning numbers several optimizers.
        **overrides: Options of the matrices (algorithm, lr, ...), or parts of the configuration
            as mappings (matrix, other, overrides, schedule), or on_mismatch.

    Returns:
        {"optimizer": Fanion, "lr_scheduler": {"scheduler": ..., "interval": "step", "name": ...}}.

    Raises:
        ValueError: If an option is unknown or impossible, no parameter is trainable, or the total
            number of steps is needed and not known.
    """
    config = FanionConfig.from_dict(config).updated(overrides)
    split = split_parameters(module, config)
    if not split:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    groups = parameter_groups(split)
    exceptions = [config.overrides.get(group["config_group"]) for group in groups]
    schedules = [(own and own.schedule) or config.schedule for own in exceptions]
    _state_scheduled_options(groups, schedules)
    optimizer = _optimizer(module, groups, config)
    inform("Parameters by group:\n%s", split.summary())
    if config.matrix.given() and not any(a.group == "matrix" for a in split):
        warn(
            "no parameter is in the group 'matrix', so its options have no effect: the table of "
            "print(split_parameters(module)) gives the reasons"
        )
    total: int | Callable[[], int] = (
        0 if total_steps is None else whole_number("total_steps", total_steps)
    )
    if total_steps is None and any(schedule.needs_total for schedule in schedules):
        total = _trainer_steps(module)
    scheduler = GroupSchedule(optimizer, schedules, total)
    name = name or ("lr" if hasattr(module, "_trainer") else None)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": name},
    }


def _optimizer(module: nn.Module, groups: Sequence[dict[str, Any]], config: FanionConfig) -> Fanion:
    """Return the optimizer of a module, and prepare the strategy for its checkpoints."""
    strategy, seed = _strategy(module), default_seed()
    if strategy is not None:
        # The first rank's seed, as others may have another for their data: Lightning calls
        # configure_optimizers on all ranks at once.
        seed = int(strategy.broadcast(seed))
    ranks = _replicating_ranks(strategy)
    optimizer = Fanion(groups, process_group=ranks, on_mismatch=config.on_mismatch, seed=seed)
    _load_states_by_names(strategy)
    optimizer.planner = functools.partial(_late_parameter_groups, module, config)
    return optimizer


def _state_scheduled_options(
    groups: Sequence[dict[str, Any]], schedules: Sequence[ScheduleConfig]
) -> None:
    """Write alpha and rank into the groups whose schedule changes them, even if they are defaults.

    ``Fanion`` would refuse a blend beside a default alpha of 1, which the schedule is to change.
    """
    for group, schedule in zip(groups, schedules, strict=True):
        options = default_options(group["algorithm"])
        for name in changed_options(schedule, {**options, **group}):
            group.setdefault(name, options[name])


def parameter_groups(split: Split) -> list[dict[str, Any]]:
    """Return groups of an optimizer: one for each group, form and weight decay in a split."""
    groups: dict[str, dict[str, Any]] = {}
    for assignment in split:
        label = split.group_name(assignment)
        if label not in groups:
            group = {"name": label, "config_group": assignment.group, "params": []}
            groups[label] = {**group, **split.group_options(assignment)}
        groups[label]["params"].append((assignment.name, assignment.parameter))
    return list(groups.values())


def _late_parameter_groups(
    module: nn.Module, config: FanionConfig, parameters: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Return groups for parameters that were frozen when the optimizer was made.

    Empty where not all of them are trainable parameters of the module.
    """
    wanted = set(parameters)
    with warnings.catch_warnings():  # the optimizer's own parameters would be warned of again
        warnings.simplefilter("ignore")
        split = split_parameters(module, config)
    late = Split([a for a in split if a.parameter in wanted], split.options)
    if len(late) < len(wanted):
        return []
    inform("Parameters added:\n%s", late)
    groups = parameter_groups(late)
    for group in groups:
        stem, *rest = group["name"].split(".")
        group["name"] = ".".join([stem, "late", *rest])
    return groups


def _base(part: str, config: FanionConfig) -> dict[str, Any]:
    """Return the options of ``matrix`` or ``other``, with an algorithm and an lr."""
    given = getattr(config, part).given()
    algorithm = given.get("algorithm", _ALGORITHMS[part])
    options = default_options(algorithm)
    lr = ENTRYWISE_LR if is_entrywise(algorithm) else options["lr"]
    runtime = options.keys() & RUNTIME_OPTIONS
    common = {name: value for name, value in config.matrix.given().items() if name in runtime}
    return {"algorithm": algorithm, "lr": lr, **common, **given}


def _strategy(module: nn.Module) -> Any:
    """Return the strategy of the module's Lightning Trainer; None without one."""
    return getattr(getattr(module, "_trainer", None), "strategy", None)


def _refuse_flat_shards(module: nn.Module) -> None:
    names = {cls.__name__ for m in module.modules() for cls in type(m).__mro__}
    if type(_strategy(module)).__name__ == "FSDPStrategy" or "FullyShardedDataParallel" in names:
        raise ValueError(
            "FSDP1 flattens matrices into vectors, which have no directions: use "
            "ModelParallelStrategy with fully_shard (FSDP2), or DDP"
        )


def _group_options(name: str, roles: set[str], config: FanionConfig) -> dict[str, Any]:
    """Return the options of a group: those of matrix or other, then those of its override."""
    own = config.overrides.get(name, Override()).given()
    # A group that the user has made counts as one of matrices if all its parameters are matrices.
    is_matrix = name == "matrix" or (name not in STANDARD_GROUPS and roles == {"matrix"})
    natural = "matrix" if is_matrix else "other"
    bases = {part: _base(part, config) for part in _ALGORITHMS}
    algorithm = own.get("algorithm", bases[natural]["algorithm"])
    part = natural
    if is_entrywise(algorithm) != is_entrywise(bases[natural]["algorithm"]):
        part = "other" if natural == "matrix" else "matrix"
    base = bases[part]
    options = {**carry_over(base, base["algorithm"], algorithm), **own, "algorithm": algorithm}
    if "lr" not in options:
        raise ValueError(
            f"overrides.{name}: set lr; that of {part!r} is meant for {base['algorithm']}, not for "
            f"{algorithm}"
        )
    if "lr" not in own and (part != natural or (part == "other" and "matrix" in roles)):
        warn(
            f"group {name!r} ({algorithm}) has no lr of its own and takes that of {part!r}, "
            f"{base['lr']:g}: set overrides.{name}.lr"
        )
    return options


def _replicating_ranks(strategy: Any) -> dist.ProcessGroup | None:
    """Return the ranks that hold the same parameters under Lightning's DDP; None elsewhere."""
    names = [cls.__name__ for cls in type(strategy).__mro__]
    # These build on DDPStrategy but step parameters of their own.
    others = {"DeepSpeedStrategy", "XLAStrategy"}
    if "DDPStrategy" not in names or others & {*names} or not dist.is_initialized():
        return None
    return dist.group.WORLD


def _load_states_by_names(strategy: Any) -> None:
    """Let Lightning's ModelParallelStrategy load checkpoints of one process and of DDP.

    The strategy takes the number of a parameter in a checkpoint for its place in
    ``module.parameters()``, which is wrong for every optimizer with several groups.
    Those of another configuration it cannot load at all.
    """
    if type(strategy).__name__ != "ModelParallelStrategy":
        return
    strategy.load_checkpoint = functools.partial(_load_checkpoint, strategy)
    load = type(strategy).load_checkpoint.__globals__["_load_checkpoint"]
    rekey = load.__globals__["_rekey_optimizer_state_if_needed"]
    if not hasattr(rekey, "by_numbers"):

        def rekey_by_names(state: Mapping[str, Any], module: nn.Module) -> Any:
            return rekey(keyed_by_names(state), module)

        rekey_by_names.by_numbers = rekey  # type: ignore[attr-defined]
        load.__globals__["_rekey_optimizer_state_if_needed"] = rekey_by_names


def _load_checkpoint(strategy: Any, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
    """Load a checkpoint as ModelParallelStrategy does; convert states that keep the momentum.

    Those are read whole on each rank.
    """
    load, optimizers = type(strategy).load_checkpoint, strategy.optimizers
    if all(getattr(o, "on_mismatch", "error") == "error" for o in optimizers):
        return load(strategy, checkpoint_path, weights_only)
    strategy.optimizers = []
    try:
        checkpoint = load(strategy, checkpoint_path, weights_only)
    finally:
        strategy.optimizers = optimizers
    path = Path(strategy.broadcast(checkpoint_path))
    names = [f"optimizer_{i}" for i in range(len(optimizers))]
    saved = load_saved(path, names) if path.is_dir() else None
    states = checkpoint["optimizer_states"] if saved is None else [saved[name] for name in names]
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return checkpoint


def _trainer_steps(module: nn.Module) -> Callable[[], int]:
    """Return a function that asks the module's trainer for the optimizer steps left."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        raise ValueError(
            "the schedule needs the number of steps of the run: pass total_steps=..., or attach "
            "the module to a Trainer first"
        )
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        steps_left(trainer)  # raises: better before the first step than after it
    return functools.partial(steps_left, trainer)


def steps_left(trainer: Any) -> int:
    """Return how many optimizer steps a Lightning Trainer will take after the batch it is at.

    Counted from where the trainer stands, with the accumulation of every epoch to come, because
    what it depends on may change during a run: trials of BatchSizeFinder and lr_find set their own
    ``max_steps``, loaders are reloaded with another length, and a resumed run may have another
    batch size or number of devices. Meaningful at the end of a training batch. The Trainer is one
    of ``lightning.pytorch`` or ``pytorch_lightning`` that is fitting.

    Raises:
        ValueError: If the run has no end that can be computed.
    """
    bounds = []
    if trainer.max_steps != -1:
        # Under manual optimization, global_step counts the steps of every optimizer.
        automatic = getattr(trainer.lightning_module, "automatic_optimization", True)
        steppers = 1 if automatic else max(1, len(trainer.optimizers))
        bounds.append((trainer.max_steps - trainer.global_step) // steppers)
    if trainer.max_epochs != -1:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        if trainer.num_training_batches != math.inf:
            bounds.append(_steps_left_in_epochs(trainer))
    if not bounds:
        raise ValueError(
            "the schedule needs the number of steps of the run, which a Trainer cannot tell for a "
            "loader without a length or an endless run: set trainer.max_steps"
        )
    return max(0, min(bounds))


def _steps_left_in_epochs(trainer: Any) -> int:
    """Return the optimizer steps left before ``max_epochs``, accumulation taken into account."""
    # By method, not by class: Lightning has two names, and the class exists once under each.
    by_epoch = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]

    def steps(batches: int, epoch: int) -> int:
        accumulate = trainer.accumulate_grad_batches
        if by_epoch:
            accumulate = by_epoch[-1].get_accumulate_grad_batches(epoch)
        return math.ceil(batches / accumulate)

    batches, current = trainer.num_training_batches, trainer.current_epoch
    begun = min(batches, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    epochs = range(current + 1, trainer.max_epochs)
    # Schedules ask after every step: one product where all epochs are alike.
    later = (
        sum(steps(batches, epoch) for epoch in epochs)
        if by_epoch
        else len(epochs) * steps(batches, current)
    )
    return steps(batches, current) - steps(begun, current) + later

"""From a module and a typed configuration to an optimizer and its schedule."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_fanions.lmo import BlendName, PolarMethod, Solver
from lit_fanions.optim.fanion import (
    Algorithm,
    Fanion,
    MomentumDtype,
    Nonfinite,
    algorithm_options,
    is_entrywise,
    named_options,
)
from lit_fanions.optim.functional import Scale
from lit_fanions.optim.parameters import STANDARD_GROUPS, Split, assign
from lit_fanions.optim.schedules import GroupSchedule, ScheduleConfig


@dataclass(frozen=True)
class GroupOptions:
    """Options of a parameter group. What is left out is what the algorithm says (``Fanion``).

    Args:
        algorithm: The norm ball: muon, neon, fanion, kyfan, nsgd, signum, coordinate, dion; f_ and
            s_ blends of the first three; or torch's adamw and sgd. Default: muon for matrices,
            adamw for others.
        lr: Learning rate. Default: .02 for matrices, 1e-3 for others.
        momentum: Of the gradient average; beta_1 of adamw. Default: .95, .9 for adamw and sgd.
        nesterov: Nesterov momentum. Default: on, off for sgd.
        weight_decay: Decoupled; coupled for sgd. Default: 0.
        beta2: Of adamw. Default: .999.
        eps: Of adamw. Default: 1e-8.
        rank: Of the direction: a whole number, a fraction of the matrix, or full.
        alpha: Weight of the direction in a blend, 1 - alpha for the rest. Default: 1, .5 for f_
            and s_.
        blend: What has the rest: frobenius (normalised SGD) or sign.
        sign_scale: Size of the entries of the sign part. Default: 1.
        polar: Solver for full rank. Default: auto.
        polar_steps: Steps of that solver. Default: the method's own.
        solver: Solver for rank k. Default: auto.
        solver_steps: Steps of that solver. Default: its own.
        oversampling: Columns of that solver's basis beyond the rank. Default: 8.
        stack_entries: How many entries matrices solved together may have. Default: 2**26, and
            5 * 2**20 on CPUs.
        scale: Step-size rule, by torch's names. Default: original.
        renormalize: Scale the weight to Frobenius norm sqrt(out) before each step. Default: off.
        error_feedback: Keep what a step of low rank leaves behind. Default: off, on for dion.
        splits: A fused parameter as several matrices: number or sizes of parts.
        nonfinite: What a NaN or an infinity in a gradient does: skip the parameter's step, error,
            or propagate. Default: skip.
        momentum_dtype: Of the momentum. Default: the parameter's.
    """

    algorithm: Algorithm | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    beta2: float | None = None
    eps: float | None = None
    rank: int | float | Literal["full"] | None = None
    alpha: float | None = None
    blend: BlendName | None = None
    sign_scale: float | None = None
    polar: PolarMethod | None = None
    polar_steps: int | None = None
    solver: Solver | None = None
    solver_steps: int | None = None
    oversampling: int | None = None
    stack_entries: int | None = None
    scale: Scale | None = None
    renormalize: bool | None = None
    error_feedback: bool | None = None
    splits: int | list[int] | None = None
    nonfinite: Nonfinite | None = None
    momentum_dtype: MomentumDtype | None = None


@dataclass(frozen=True)
class Override(GroupOptions):
    """Exceptions for one group, and which parameters belong to it.

    A standard group (matrix, embedding, head, vector, other) needs no selector; with one, the
    parameters selected join it.

    Args:
        parameters: Patterns of parameter names, * for anything.
        modules: Names of module classes, whose own parameters are meant.
        schedule: A schedule of the group's own.
    """

    parameters: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    schedule: ScheduleConfig | None = None


@dataclass(frozen=True)
class FanionConfig:
    """The optimizer of a whole network.

    Args:
        matrix: Options of the matrices.
        other: Options of everything else: embeddings, output heads, biases and gains.
        overrides: Exceptions by group name, for one of the standard groups (matrix, embedding,
            head, vector, other) or for a group of your own, selected by ``parameters`` (name
            patterns) or ``modules`` (class names). It starts from ``matrix`` or from ``other``,
            whichever its algorithm is of.
        schedule: Of lr and momentum, for groups without one of their own.
    """

    matrix: GroupOptions = field(default_factory=GroupOptions)
    other: GroupOptions = field(default_factory=GroupOptions)
    overrides: dict[str, Override] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @classmethod
    def from_dict(cls, config: FanionConfig | Mapping[str, Any] | None) -> FanionConfig:
        """A configuration from nested mappings, such as a checkpoint's hyperparameters.

        Args:
            config: A mapping with some of the fields; a FanionConfig, returned as it is; or None
                for the defaults.

        Returns:
            The configuration.

        Raises:
            ValueError: If there is a key that the configuration does not have.
        """
        if config is None or isinstance(config, FanionConfig):
            return config or cls()
        return _build(cls, config, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts without what is left open, for checkpoints and YAML."""
        return _plain(self)


# A module that takes a configuration and calls save_hyperparameters() puts it into its checkpoints.
torch.serialization.add_safe_globals([FanionConfig, GroupOptions, Override, ScheduleConfig])


def split_parameters(
    module: nn.Module, config: FanionConfig | Mapping[str, Any] | None = None
) -> Split:
    """Assigns every trainable parameter to a group, with the reason.

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
        ValueError: If a selector matches nothing or a group is not known.
    """
    config = FanionConfig.from_dict(config)
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
    **overrides: Any,
) -> dict[str, Any]:
    """One optimizer for a module, and its schedule, as LightningModule.configure_optimizers wants.

    In another project::

        def configure_optimizers(self):
            return configure_optimizers(self, algorithm="f_muon", lr=0.02)

    Args:
        module: The network: a LightningModule, or any other together with ``total_steps``.
        config: The configuration; None for the defaults.
        total_steps: Optimizer steps of the run; None: the trainer's. Only schedules that end, or
            have lengths in fractions of the run, need it.
        **overrides: Options of the matrices (algorithm, lr, ...), or parts of the configuration
            as mappings: matrix, other, overrides, schedule.

    Returns:
        {"optimizer": Fanion, "lr_scheduler": {"scheduler": ..., "interval": "step", "name": "lr"}}.

    Raises:
        ValueError: If an option is unknown or impossible, no parameter is trainable, or the total
            number of steps is needed and not known.
    """
    config = _merge(FanionConfig.from_dict(config), overrides)
    split = split_parameters(module, config)
    if not split:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    groups: dict[str, dict[str, Any]] = {}
    schedules: list[ScheduleConfig] = []
    for assignment in split:
        options = split.group_options(assignment)
        name = assignment.group + _suffix(options)
        if name not in groups:
            groups[name] = {"name": name, "params": [], **options}
            own = config.overrides.get(assignment.group)
            schedules.append((own and own.schedule) or config.schedule)
        groups[name]["params"].append((assignment.name, assignment.parameter))
    optimizer = Fanion(list(groups.values()))
    rank_zero_info("Parameters by group:\n%s", split)
    total: int | Callable[[], int] = total_steps or 0
    if total_steps is None and any(schedule.needs_total for schedule in schedules):
        total = _trainer_steps(module)
    scheduler = GroupSchedule(optimizer, schedules, total)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
    }


# The algorithm of `matrix` and of `other` where the configuration is silent.
_DEFAULTS = {"matrix": "muon", "other": "adamw"}


def _base(part: str, config: FanionConfig) -> dict[str, Any]:
    given = _given(getattr(config, part))
    algorithm = given.get("algorithm", _DEFAULTS[part])
    return {"algorithm": algorithm, "lr": 1e-3 if is_entrywise(algorithm) else 0.02, **given}


def _refuse_flat_shards(module: nn.Module) -> None:
    strategy = getattr(getattr(module, "_trainer", None), "strategy", None)
    if type(strategy).__name__ == "FSDPStrategy" or any(
        isinstance(m, FullyShardedDataParallel) for m in module.modules()
    ):
        raise ValueError(
            "FSDP1 flattens matrices into vectors, which have no directions: use "
            "ModelParallelStrategy with fully_shard (FSDP2), or DDP"
        )


def _group_options(name: str, roles: set[str], config: FanionConfig) -> dict[str, Any]:
    """What the configuration says of a group: of matrix or other, then of its override."""
    own = _given(config.overrides.get(name, GroupOptions()))
    bases = {part: _base(part, config) for part in _DEFAULTS}
    # A group of the user's own is one of matrices if all that it holds would be.
    is_matrix = name == "matrix" or (name not in STANDARD_GROUPS and roles == {"matrix"})
    natural = "matrix" if is_matrix else "other"
    algorithm = own.get("algorithm", bases[natural]["algorithm"])
    part = natural
    if is_entrywise(algorithm) != is_entrywise(bases[natural]["algorithm"]):
        part = "other" if natural == "matrix" else "matrix"
    base = bases[part]
    if algorithm != base["algorithm"]:
        # What the base's algorithm was tuned with, or stands for, is not another's.
        allowed = algorithm_options(algorithm).keys() - named_options(algorithm)
        base = {key: value for key, value in base.items() if key in allowed or key == "lr"}
    if "lr" not in own and (part != natural or (part == "other" and "matrix" in roles)):
        rank_zero_warn(
            f"group {name!r} ({algorithm}) has no lr of its own and takes that of {part!r}, "
            f"{base['lr']:g}: set overrides.{name}.lr"
        )
    return {**base, **own, "algorithm": algorithm}


def _suffix(options: dict[str, Any]) -> str:
    """What tells a group's parameters of one matrix form from those of another."""
    layout, splits = options.get("layout", "flatten"), options.get("splits")
    form = [layout] if layout != "flatten" else []
    form += [] if splits is None else [f"splits{splits}".replace(" ", "")]
    return "".join(f".{part}" for part in form)


def configured_group(name: str) -> str:
    """The group of the configuration that a group of the optimizer was made from.

    The factory makes several of one where its parameters differ in their matrix form.
    """
    return re.sub(r"(\.(transposed|batch|splits[\d\[\],]+))+$", "", name)


def _trainer_steps(module: nn.Module) -> Callable[[], int]:
    """How to ask the trainer for the run's steps once it knows them."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        raise ValueError(
            "the schedule needs the number of steps of the run: pass total_steps=..., or attach "
            "the module to a Trainer first"
        )

    def steps() -> int:
        estimate = trainer.estimated_stepping_batches
        if not 0 < estimate < math.inf:
            raise ValueError(
                "the schedule needs the number of steps of the run, which a Trainer cannot tell "
                "for a loader without a length or an endless run: set trainer.max_steps"
            )
        return int(estimate)

    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        steps()  # endless: say so before anything is trained
    return steps


# Configurations as mappings.

_PARTS: dict[str, type] = {
    "matrix": GroupOptions,
    "other": GroupOptions,
    "schedule": ScheduleConfig,
}


def _given(options: GroupOptions) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(GroupOptions)]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _build(cls: type, values: Any, where: str) -> Any:
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the configuration'} must be a mapping, got {values!r}")
    names = [f.name for f in dataclasses.fields(cls)]
    built = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} is no option (allowed: {', '.join(names)}){hint}")
        if value is None and key in (*_PARTS, "overrides"):
            continue  # an empty section of a YAML file
        if key == "overrides":
            if not isinstance(value, Mapping):
                raise ValueError(f"{path} must be a mapping of group names, got {value!r}")
            value = {name: _build(Override, part, f"{path}.{name}") for name, part in value.items()}
        elif key in _PARTS:
            value = _build(_PARTS[key], value, path)
        built[key] = value
    return cls(**built)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(v) for name, v in fields.items() if v is not None}
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value


def _merge(config: FanionConfig, overrides: dict[str, Any]) -> FanionConfig:
    """The configuration with parts replaced by keyword: whole parts, or options of the matrices."""
    parts = {f.name for f in dataclasses.fields(FanionConfig)}
    merged = config.to_dict()
    for part, value in overrides.items():
        if part in parts and value is not None:
            if not isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
                raise ValueError(f"{part} must be a mapping, got {value!r}")
            merged[part] = {**merged[part], **_plain(value)}
    options = {key: value for key, value in overrides.items() if key not in parts}
    merged["matrix"] = {**merged["matrix"], **options}
    return FanionConfig.from_dict(merged)

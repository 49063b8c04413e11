"""The configuration of a whole network's optimizer: typed, nested, from YAML or mappings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from lit_fanions.checks import check_choice, did_you_mean
from lit_fanions.optim.conversion import OnMismatch
from lit_fanions.optim.options import NAMES, GroupOptions
from lit_fanions.optim.schedules import ScheduleConfig


@dataclass(frozen=True)
class Override(GroupOptions):
    """Exceptions for one group, and which parameters belong to it."""

    parameters: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    schedule: ScheduleConfig | None = None

    def __post_init__(self) -> None:
        """Check every option, and that selectors are lists of names."""
        super().__post_init__()
        for name in ("parameters", "modules"):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(isinstance(x, str) for x in given):
                raise ValueError(f"{name} must be a list of names, got {given!r}")
        if not isinstance(self.schedule, (ScheduleConfig, type(None))):
            raise ValueError(f"schedule must be a ScheduleConfig, got {self.schedule!r}")


Override.__doc__ = f"""{Override.__doc__}

    A standard group (matrix, embedding, head, vector, other) needs no selector; with one, the
    selected parameters join it.

    Args:
        parameters: Patterns of parameter names, * for anything.
        modules: Names of module classes; their own parameters are selected.
        schedule: Schedule of this group. Default: the configuration's.
{(GroupOptions.__doc__ or "").partition("Args:")[2].lstrip(chr(10))}"""


@dataclass(frozen=True)
class FanionConfig:
    """The optimizer of a whole network.

    Args:
        matrix: Options of the matrices.
        other: Options of everything else: embeddings, output heads, biases and gains. How a step
            is made (nonfinite, capturable, share_work) is taken from ``matrix`` unless given.
        overrides: Exceptions by group name, for one of the standard groups (matrix, embedding,
            head, vector, other) or for a group of your own, selected by ``parameters`` (name
            patterns) or ``modules`` (class names). One of adamw or sgd starts from ``other``, any
            other from ``matrix``.
        schedule: Schedule of lr and momentum, for groups without one of their own.
        on_mismatch: What resuming from a checkpoint of another configuration does: error, or
            keep_momentum, which keeps each parameter's momentum and takes the options of this
            configuration.
    """

    matrix: GroupOptions = field(default_factory=GroupOptions)
    other: GroupOptions = field(default_factory=GroupOptions)
    overrides: dict[str, Override] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    on_mismatch: OnMismatch = "error"

    def __post_init__(self) -> None:
        """Refuse an unknown ``on_mismatch``."""
        check_choice("on_mismatch", self.on_mismatch, get_args(OnMismatch))

    @classmethod
    def from_dict(cls, config: FanionConfig | Mapping[str, Any] | None) -> FanionConfig:
        """Return a configuration from nested mappings, such as a checkpoint's hyperparameters.

        Args:
            config: A mapping with some of the fields, where None stands for an empty section; a
                FanionConfig, returned as it is; or None for the defaults.

        Raises:
            ValueError: If there is a key that the configuration does not have.
        """
        if config is None or isinstance(config, FanionConfig):
            return config or cls()
        return _build(cls, config, "")

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts without the options that are None."""
        return _plain(self)

    def updated(self, changes: Mapping[str, Any]) -> FanionConfig:
        """Return the configuration with parts replaced.

        Args:
            changes: Options of the matrices by name, parts (matrix, other, overrides, schedule) as
                mappings, whose options replace those of the part, or on_mismatch.

        Raises:
            ValueError: If there is a key that the configuration does not have.
        """
        parts = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        known = [*parts, *NAMES]
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"{name} is no option{did_you_mean(name, known)}")
            if name == "on_mismatch":
                parts[name] = value
            elif name not in parts:
                parts["matrix"][name] = value
            elif value is not None:
                parts[name] |= _mapping(_plain(value), name)
        return _build(FanionConfig, parts, "")


# A module that takes a configuration and calls save_hyperparameters() puts it into its checkpoints,
# which torch.load reads with weights_only.
torch.serialization.add_safe_globals([FanionConfig, GroupOptions, Override, ScheduleConfig])

_PARTS: dict[str, type] = {
    "matrix": GroupOptions,
    "other": GroupOptions,
    "schedule": ScheduleConfig,
}


def _build(cls: type, values: Any, where: str) -> Any:
    """Return an instance of a configuration class from a mapping at a path of the configuration."""
    if isinstance(values, cls):
        return values
    names = [f.name for f in dataclasses.fields(cls)]
    built = {}
    for key, value in _mapping(values, where or "the configuration").items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            hint = did_you_mean(key, names)
            raise ValueError(f"{path} is no option (allowed: {', '.join(names)}){hint}")
        if key in _PARTS:
            value = _build(_PARTS[key], {} if value is None else value, path)
        elif key == "overrides":
            groups = _mapping({} if value is None else value, path, " of group names")
            value = {
                group: _build(Override, {} if own is None else own, f"{path}.{group}")
                for group, own in groups.items()
            }
        built[key] = value
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if where else str(error)) from None


def _mapping(value: Any, where: str, content: str = "") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping{content}, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(v) for name, v in fields.items() if v is not None}
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return value

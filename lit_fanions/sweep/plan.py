"""Describe a sweep: the values of its options, and the trainings that it asks for."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from lit_fanions.cli.console import Refused

if TYPE_CHECKING:
    from optuna.trial import Trial

Sampler = Literal["grid", "random", "tpe"]
Settings = dict[str, str]  # values as fit is given them, by the short names of the options


@dataclass(frozen=True)
class Choice:
    """Values to try, as they are passed to fit."""

    values: tuple[str, ...]

    def suggest(self, trial: Trial, name: str) -> str:
        """Return a value that the sampler of a study chooses."""
        return trial.suggest_categorical(name, self.values)

    def examples(self) -> tuple[str, ...]:
        """Return values that fit must accept."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A range of numbers to search, on a logarithmic scale or among the integers if asked for."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Trial, name: str) -> str:
        """Return a value that the sampler of a study chooses."""
        if self.whole:
            return str(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(name, self.low, self.high, log=self.log))

    def examples(self) -> tuple[str, ...]:
        """Return values that fit must accept."""
        return tuple(str(int(end)) if self.whole else repr(end) for end in (self.low, self.high))


Values = Choice | Range
Space = dict[str, Values]  # by the name of the option


@dataclass(frozen=True)
class Plan:
    """The options of a sweep."""

    recipe: tuple[str, ...]  # arguments of fit
    space: Space
    sampler: Sampler
    metric: str  # the scalar whose last value counts
    direction: Literal["minimize", "maximize"]
    prune: bool  # whether a search ends trainings that fall behind
    retry_failed: bool
    out: Path
    study: str  # name in the storage
    storage: str | None  # URL of a database; None for a journal in `out`
    jobs: int  # trainings at a time
    devices: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them; empty for the processor

    @property
    def searches(self) -> bool:
        """True if a sampler chooses the settings."""
        return self.sampler != "grid"

    def loss(self, value: float) -> float:
        """Return a value of the metric with the sign that makes less better."""
        return value if self.direction == "minimize" else -value


@dataclass(frozen=True)
class Request:
    """A training that a sweep asks for."""

    seed: int
    settings: Settings  # empty if a sampler chooses them
    trial: int | None = None  # number of the setting in a search

    @property
    def key(self) -> str:
        """Name of the training, unique in the study; equal numbers give equal keys."""
        if self.trial is not None:
            return f"trial {self.trial}"
        values = {name: number(value) for name, value in sorted(self.settings.items())}
        return json.dumps([values, self.seed])


def grid_requests(space: Space, seeds: int) -> list[Request]:
    """Return all combinations of values with seeds 0 to seeds - 1, seed by seed."""
    names = list(map(short, space))
    points = list(itertools.product(*(values.examples() for values in space.values())))
    settings = [dict(zip(names, point, strict=True)) for point in points]
    return [Request(seed, own) for seed in range(seeds) for own in settings]


def run_name(trial: int, settings: Mapping[str, str], seed: int) -> str:
    """Return the name of a training's folder: number, values and seed."""
    label = ",".join(
        f"{name.rpartition('.')[2]}={format_value(number(value))}"
        for name, value in settings.items()
    )
    safe = re.sub(r"[^\w.,=+-]", "_", label)[:120]
    return "-".join(filter(None, [f"{trial:03d}", safe, f"seed{seed}"]))


def short(name: str) -> str:
    """Return the name of an option without `init_args`, which fit adds by itself."""
    return name.replace(".init_args", "")


def number(text: str) -> float | str:
    """Return a text as a number if it is one, so that 1 and 1.0 are the same value."""
    try:
        return float(text)
    except ValueError:
        return text


def format_value(value: float | str) -> str:
    """Return a value of an option for people."""
    return value if isinstance(value, str) else f"{value:.4g}"


def parse(choices: Iterable[str], ranges: Iterable[str]) -> Space:
    """Parse the arguments of --set, NAME=VALUE,VALUE,... and --tune, NAME=LOW:HIGH[:log][:int]."""
    space: Space = {}
    for text in choices:
        _add(space, "--set", text, _choice, "NAME=1,2,3")
    for text in ranges:
        _add(space, "--tune", text, _range, "NAME=1e-3:1:log")
    return space


def _add(space: Space, option: str, text: str, read: Callable[[str], Values], example: str) -> None:
    name, _, values = text.partition("=")
    name = name.removeprefix("--")
    if not (name and values):
        raise Refused(f"{option} {text}: write it like {option} {example}")
    if short(name) in map(short, space):
        raise Refused(f"{option} {text}: the option is given twice; list all its values at once")
    try:
        space[name] = read(values)
    except ValueError as error:
        raise Refused(f"{option} {text}: {error}") from None


def _choice(text: str) -> Choice:
    """Split a text at the commas that are outside of brackets and quotes, as YAML does."""
    listed = f"[{text}]"
    try:
        nodes = yaml.compose(listed, Loader=yaml.SafeLoader).value
    except yaml.YAMLError:
        nodes = []
    if not nodes or text.rstrip().endswith(","):
        raise ValueError("close brackets and quotes, and give a value on both sides of a comma")
    values = tuple(listed[node.start_mark.index : node.end_mark.index].strip() for node in nodes)
    if len(set(map(number, values))) < len(values):
        raise ValueError("a value occurs twice")
    return Choice(values)


def _range(text: str) -> Range:
    low_text, _, rest = text.partition(":")
    high_text, *flags = rest.split(":")
    if not set(flags) <= {"log", "int"}:
        raise ValueError("LOW:HIGH can be followed by :log, :int or both")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise ValueError("LOW:HIGH must be two numbers") from None
    log, whole = "log" in flags, "int" in flags
    if not -math.inf < low < high < math.inf:
        raise ValueError("LOW must be below HIGH")
    if log and low <= 0:
        raise ValueError("LOW must be above 0 with :log")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ValueError("LOW and HIGH must be integers with :int")
    return Range(low, high, log, whole)

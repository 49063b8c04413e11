"""Describe a sweep: what it trains, and which trainings it asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_fanions.sweep.space import Choice, Space, number, short

Sampler = Literal["grid", "random", "tpe"]
Settings = dict[str, str]  # values as fit is given them, by the short names of the options


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
    combinations: list[Settings] = [{}]
    for name, values in space.items():
        assert isinstance(values, Choice)
        combinations = [{**c, short(name): value} for c in combinations for value in values.values]
    return [Request(seed, settings) for seed in range(seeds) for settings in combinations]


def run_name(trial: int, settings: Mapping[str, str], seed: int) -> str:
    """Return the name of a training's folder: number, values and seed."""
    values = {name.rpartition(".")[2]: number(value) for name, value in settings.items()}
    label = ",".join(
        f"{name}={f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )
    safe = re.sub(r"[^\w.,=+-]", "_", label)[:120]
    return "-".join(filter(None, [f"{trial:03d}", safe, f"seed{seed}"]))

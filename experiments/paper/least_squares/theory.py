"""Iterations that theory promises, and how many are needed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.paper.bounds.article import ALGORITHMS, PRINTED, SIZE
from experiments.paper.least_squares.traces import (
    THEORY,
    Setting,
    Trace,
    Traces,
    setting_traces,
)
from lit_fanions import bounds

_FACTOR = 2  # a promise is wrong if it is off by more than this factor


class Promise(NamedTuple):
    """A number of iterations that theory promises, and how many were needed.

    Attributes:
        name: Recipe.
        source: Where the promise comes from.
        lr: The step size.
        smoothness: L behind it, of each problem or printed.
        precision: Target for the dual norm of the gradient.
        promised: Promised number of iterations.
        needed: Iterations to the precision, per problem; infinity if it was not reached.
        spectral: Iterations to 1 in the spectral norm, per problem.
        last: The last step of the run.
    """

    name: str
    source: Setting
    lr: float
    smoothness: np.ndarray
    precision: float
    promised: int
    needed: np.ndarray
    spectral: np.ndarray
    last: int

    def count_wrong(self) -> int | None:
        """Return in how many problems the promise is off by more than a factor of 2.

        None if the run was too short to tell.
        """
        if self.last < _FACTOR * self.promised and not np.isfinite(self.needed).all():
            return None
        ratio = self.promised / np.maximum(self.needed, 1)
        return int(((ratio < 1 / _FACTOR) | (ratio > _FACTOR)).sum())


def plan(name: str, trace: Trace) -> bounds.Plan:
    """Return the plan of Lemma 7 that suits all problems: the smallest lr and the most steps.

    Args:
        name: Recipe.
        trace: A run of it, from which L and the first loss are read.
    """
    plans = [
        bounds.plan(float(smoothness), float(gap), _precision(name))
        for smoothness, gap in zip(trace.smoothness, trace.values["loss"][0], strict=True)
    ]
    return bounds.Plan(min(p.lr for p in plans), max(p.steps for p in plans), 0.0)


def list_promises(traces: Traces) -> list[Promise]:
    """Return the article's printed promises and those of Lemma 7, with what was needed."""
    promises = []
    sources: tuple[Setting, ...] = ("printed", "lemma 7")
    for source in sources:
        for name, trace in setting_traces(traces, source).items():
            precision = _precision(name)
            printed = PRINTED[THEORY[name]] if source == "printed" else None
            promises.append(
                Promise(
                    name,
                    source,
                    trace.lr,
                    np.array([printed.smoothness]) if printed else trace.smoothness,
                    precision,
                    printed.steps if printed else plan(name, trace).steps,
                    trace.first_step_below("best_dual", precision),
                    trace.first_step_below("best_spectral", 1.0),
                    trace.steps[-1],
                )
            )
    return promises


def _precision(name: str) -> float:
    """Return the target for the dual norm that stands for 1 in the spectral norm."""
    return ALGORITHMS[THEORY[name]].precision(SIZE)

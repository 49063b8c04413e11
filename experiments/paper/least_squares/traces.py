"""What was logged of the runs, and which algorithm leads by which reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

NORMS = ("spectral", "frobenius", "nuclear", "dual")
QUANTITIES = ("loss", *NORMS, *(f"best_{norm}" for norm in NORMS))
FIVE = ("nsgd", "muon", "f_muon", "neon", "f_neon")  # recipes of the article's figure
# Recipes whose step sizes the article prints, and their names there.
THEORY = {"nsgd": "NSGD", "muon": "Muon", "neon": "Neon"}
Setting = Literal["article", "text", "draft", "printed", "lemma 7"]
Leads = Mapping[str, Mapping[str, int]]  # reading -> recipe -> problems in which it is first


@dataclass(frozen=True)
class Trace:
    """One run on all problems.

    Attributes:
        lr: Step size.
        steps: The logged steps.
        values: Values by the names of ``QUANTITIES``, each (logged steps, problems).
        smoothness: L of each problem in the norm of the algorithm.
    """

    lr: float
    steps: Sequence[int]
    values: Mapping[str, np.ndarray]
    smoothness: np.ndarray

    def last(self, quantity: str) -> np.ndarray:
        """Return a quantity of each problem after the last step."""
        return np.asarray(self.values[quantity][-1])

    def first_step_below(self, quantity: str, target: float | np.ndarray) -> np.ndarray:
        """Return the first logged step at which each problem is down to its target.

        Infinity where the target is never reached.
        """
        below = self.values[quantity] <= target
        first = np.asarray(self.steps, float)[below.argmax(0)]
        return np.where(below.any(0), first, np.inf)


Traces = dict[tuple[Setting, str], Trace]  # by setting and recipe


def setting_traces(traces: Traces, setting: Setting) -> dict[str, Trace]:
    """Return the traces of one setting by recipe."""
    return {name: trace for (s, name), trace in traces.items() if s == setting}


def ranked_traces(traces: Traces, setting: Setting) -> dict[str, Trace]:
    """Return the traces that the article compares in a setting, or none if one is missing."""
    found = setting_traces(traces, setting)
    names = tuple(THEORY) if setting in ("printed", "lemma 7") else FIVE
    return {name: found[name] for name in names} if found.keys() >= {*names} else {}


def count_leads(found: Mapping[str, Trace]) -> dict[str, dict[str, int]]:
    """Return in how many problems each recipe has the smallest gradient, by reading.

    A reading is a norm of the gradient and a point of the run at which recipes are compared.
    """
    return {reading: count_firsts(values) for reading, values in _readings(found).items()}


def count_firsts(values: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return in how many problems each recipe has the smallest value.

    Args:
        values: One value per problem, by recipe.
    """
    order = np.argsort(np.stack([*values.values()]), axis=0)[0]
    return {name: int((order == i).sum()) for i, name in enumerate(values)}


def _readings(found: Mapping[str, Trace]) -> dict[str, dict[str, np.ndarray]]:
    """Return the values that are compared, one per problem, by reading and recipe."""

    def last(quantity: str) -> dict[str, np.ndarray]:
        return {name: trace.last(quantity) for name, trace in found.items()}

    readings = {f"{norm} norm, last": last(norm) for norm in NORMS}
    readings |= {f"{norm} norm, smallest so far": last(f"best_{norm}") for norm in NORMS}
    for norm in NORMS[:-1]:
        for step in (10, 100, 1000):
            if all(step in trace.steps for trace in found.values()):
                readings[f"{norm} norm, step {step:,}"] = {
                    name: trace.values[norm][trace.steps.index(step)]
                    for name, trace in found.items()
                }
    # The smallest loss of each problem that every recipe has reached.
    loss = np.max([trace.values["loss"].min(0) for trace in found.values()], axis=0)
    for norm in NORMS[:-1]:
        readings[f"{norm} norm, at equal loss"] = {
            name: value_at_loss(trace, norm, loss) for name, trace in found.items()
        }
    return {name.replace("dual norm", "own dual norm"): found for name, found in readings.items()}


def value_at_loss(trace: Trace, quantity: str, losses: np.ndarray) -> np.ndarray:
    """Return a quantity where each problem first reaches a loss, interpolated between logs.

    Args:
        trace: The run.
        quantity: Name of the quantity.
        losses: Loss of each problem, none above the first logged one.
    """
    found = []
    with np.errstate(all="ignore"):  # diverged values and zeros have no logarithm
        curves, values = np.log(trace.values["loss"]), np.log(trace.values[quantity])
        for problem, loss in enumerate(np.log(losses)):
            after = max(1, int((curves[:, problem] <= loss).argmax()))
            start, end = curves[after - 1 : after + 1, problem]
            part = (start - loss) / (start - end)
            low, high = values[after - 1 : after + 1, problem]
            found.append(np.exp(low + part * (high - low)))
    return np.array(found)

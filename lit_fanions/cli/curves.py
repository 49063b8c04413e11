"""Read the curves that trainings write for TensorBoard, and average them over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_fanions.checks import did_you_mean
from lit_fanions.cli.console import Refused

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = list[tuple[int, float]]  # (optimizer step, value)
Curves = dict[str, Curve]  # by the name of the scalar


def open_events(logs: Path) -> EventAccumulator:
    """Return TensorBoard's reader of a folder; each ``Reload`` reads what is new there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # All scalars (0 means no limit), and the last of everything else.
    limits = {"scalars": 0, "histograms": 1, "images": 1, "tensors": 1}
    return EventAccumulator(str(logs), limits)


def read_curve(reader: EventAccumulator, metric: str) -> Curve:
    """Return a scalar as far as it has been logged; non-finite values become infinity.

    One that is not logged has an empty curve.
    """
    if metric not in reader.Reload().Tags()["scalars"]:
        return []
    scalars = [(event.step, event.value) for event in reader.Scalars(metric)]
    return [(step, value if math.isfinite(value) else math.inf) for step, value in scalars]


def read_curves(logs: Path, metrics: Sequence[str]) -> Curves:
    """Return the curves of a training that has ended, see ``read_curve``.

    Raises:
        Refused: If one of them was not logged.
    """
    reader = open_events(logs)
    curves = {metric: read_curve(reader, metric) for metric in metrics}
    for metric, curve in curves.items():
        if not curve:
            raise Refused(f"{logs} has no {metric}{_alternatives(metric, reader)}")
    return curves


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a sample.

    The deviation is 0 for a single value, and where the mean is not finite.
    """
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return mean, 0.0
    return mean, statistics.stdev(values)


def _alternatives(metric: str, reader: EventAccumulator) -> str:
    """Return a hint at the scalars that are logged."""
    known = reader.Tags()["scalars"]
    plain = sorted(tag for tag in known if tag.count("/") < 2)  # monitors log dozens below those
    logged = f"; logged are {', '.join(plain)}" if plain else "; nothing is logged"
    return did_you_mean(metric, known) or logged

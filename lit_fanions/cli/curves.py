"""Read what trainings write for TensorBoard: curves, spectra, and the settings beside them."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_fanions.callbacks.figures import Sample
from lit_fanions.callbacks.quantities import PREFIX, parse_tag
from lit_fanions.checks import did_you_mean
from lit_fanions.cli.console import Refused
from lit_fanions.cli.tensors import flatten

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = list[tuple[int, float]]  # (optimizer step, value)
Curves = dict[str, Curve]  # by the name of the scalar

_HISTOGRAMS = {"momentum_spectrum": "momentum", "gradient_spectrum": "gradient"}
# Files with a run's settings, the more complete first.
_SETTINGS = ("config.yaml", "hparams.yaml")
# Settings that name a run's files and so differ between any two runs.
_PATHS = ("trainer.logger", "trainer.default_root_dir", "dirpath", "save_dir")
# Words of the tags of metrics, and of counts that are no results of a training.
_HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "auc", "psnr", "bleu", "iou", "precision", "recall"}
_LOWER_IS_BETTER = {
    "loss", "err", "error", "perplexity", "ppl", "bpb", "nll", "mse", "mae", "rmse",
}  # fmt: skip
_STAGES = {"train", "val", "valid", "validation", "test"}
_COUNTS = {"batches", "samples", "time", "epoch", "device", "flops", "mfu", "total", "throughput"}


@dataclass(frozen=True)
class Run:
    """The logs of one folder of event files."""

    name: str  # path below the folder that was asked for
    curves: Curves
    folder: Path = Path()
    spectra: dict[str, Sample] = field(default_factory=dict)  # the latest of each matrix
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key, from its YAML file

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(curve[-1][0] for curve in self.curves.values())


def print_progress(line: str) -> None:
    """Say what is being done, on stderr."""
    print(line, file=sys.stderr, flush=True)


def open_events(logs: Path) -> EventAccumulator:
    """Return TensorBoard's reader of a folder; each ``Reload`` reads what is new there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # All scalars (0 means no limit), and the last of everything else.
    limits = {"scalars": 0, "histograms": 1, "images": 1, "tensors": 1}
    return EventAccumulator(str(logs), limits)


def read_curve(reader: EventAccumulator, metric: str) -> Curve:
    """Return a scalar as far as it has been logged; non-finite values become infinity."""
    if metric not in reader.Reload().Tags()["scalars"]:
        return []
    scalars = [(event.step, event.value) for event in reader.Scalars(metric)]
    return [(step, value if math.isfinite(value) else math.inf) for step, value in scalars]


def read_curves(logs: Path, metrics: Sequence[str]) -> Curves:
    """Return the curves of a training that has ended, see ``read_curve``; refuse one not logged."""
    reader = open_events(logs)
    curves = {metric: read_curve(reader, metric) for metric in metrics}
    known = reader.Tags()["scalars"]
    plain = sorted(tag for tag in known if tag.count("/") < 2)  # monitors log dozens below those
    logged = f"; logged are {', '.join(plain)}" if plain else "; nothing is logged"
    for metric, curve in curves.items():
        if not curve:
            raise Refused(f"{logs} has no {metric}{did_you_mean(metric, known) or logged}")
    return curves


def read_runs(folder: Path) -> list[Run]:
    """Return every run at or below a folder, by name; refuse a folder without one."""
    if not folder.is_dir():
        raise Refused(f"there is no folder {folder}")
    places = sorted({path.parent for path in folder.rglob("*tfevents*") if path.is_file()})
    if not places:
        raise Refused(f"no TensorBoard event file in {folder}: give the folder of a run's logs")
    runs = []
    for i, place in enumerate(places):
        name = str(place.relative_to(folder)) if place != folder else folder.resolve().name
        size = sum(path.stat().st_size for path in place.glob("*tfevents*"))
        print_progress(f"reading {name} ({i + 1} of {len(places)}, {size / 1e6:.1f} MB)")
        runs.append(_read_run(place, name))
    if not any(run.curves for run in runs):
        raise Refused(f"the event files in {folder} hold no scalars")
    return [run for run in runs if run.curves]


def _read_run(place: Path, name: str) -> Run:
    events = open_events(place).Reload()
    curves = {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }
    spectra = {}
    for tag in events.Tags()["histograms"]:
        kind, _, matrix = tag.removeprefix(PREFIX).partition("/")
        if kind in _HISTOGRAMS and (logarithms := events.Histograms(tag)[-1].histogram_value).num:
            pairs = zip(logarithms.bucket_limit, logarithms.bucket, strict=True)
            filled = [(10**limit, count) for limit, count in pairs if count > 0]
            values, counts = map(list, zip(*reversed(filled), strict=True))
            spectra[matrix] = Sample(values, counts, _HISTOGRAMS[kind])
    return Run(name, curves, place, spectra, _read_settings(place))


def _read_settings(place: Path) -> dict[str, Any]:
    for name in _SETTINGS:
        try:
            settings = yaml.safe_load((place / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):  # missing, or with Python objects
            continue
        if settings:
            return flatten(settings)
    return {}


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the keys of the settings that differ between the runs that have settings."""
    settings = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for own in settings for key in own)
    return [
        key
        for key in keys
        if not any(part in key for part in _PATHS)
        and any(own.get(key) != settings[0].get(key) for own in settings)
    ]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation: 0 for one value or a mean that is not finite."""
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return mean, 0.0
    return mean, statistics.stdev(values)


def is_metric(tag: str) -> bool:
    """Return True for the tag of a loss or another metric of the task.

    Learning rates, epochs, throughput, devices and the quantities of SpectralMonitor are none.
    """
    if parse_tag(tag) is not None or is_count(tag):
        return False
    return stage(tag) in _STAGES or direction(tag) != 0


def is_count(tag: str) -> bool:
    """Return True for the tag of a time, a throughput or another count."""
    return bool(_COUNTS.intersection(_words(tag)))


def stage(tag: str) -> str:
    """Return the first word of a tag: train, val or test for a metric of a stage."""
    return _words(tag)[0]


def direction(tag: str) -> int:
    """Return 1 if higher is better, -1 if lower is better, 0 if unknown."""
    words = set(_words(tag))
    return bool(words & _HIGHER_IS_BETTER) - bool(words & _LOWER_IS_BETTER)


def metric_order(tag: str) -> tuple[bool, bool, str]:
    """Return a sort key: losses first, then by name, test metrics last."""
    return "loss" not in tag.lower(), stage(tag) == "test", tag


def _words(tag: str) -> list[str]:
    return re.findall("[a-z0-9]+", tag.lower()) or [""]

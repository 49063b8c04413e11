"""Read TensorBoard's event files and the settings of runs, and summarise them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_fanions.callbacks.figures import Sample
from lit_fanions.callbacks.quantities import PREFIX, parse_tag
from lit_fanions.cli.console import Refused
from lit_fanions.cli.curves import Curve, open_events

_HISTOGRAMS = {"momentum_spectrum": "momentum", "gradient_spectrum": "gradient"}
# Files with a run's settings, the more complete first.
_SETTINGS = ("config.yaml", "hparams.yaml")
# Settings that name a run's files and so differ between any two runs.
_PATHS = ("trainer.logger", "trainer.default_root_dir", "dirpath", "save_dir")
_HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "auc", "psnr", "bleu", "iou", "precision", "recall"}
_LOWER_IS_BETTER = {
    "loss", "err", "error", "perplexity", "ppl", "bpb", "nll", "mse", "mae", "rmse",
}  # fmt: skip
_STAGES = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Run:
    """The logs of one folder of event files."""

    name: str  # path below the folder that was asked for
    curves: dict[str, Curve]  # by tag
    spectra: dict[str, Sample] = field(default_factory=dict)  # the latest of each matrix
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key, from its YAML file

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(curve[-1][0] for curve in self.curves.values())


def print_progress(line: str) -> None:
    """Say what is being done, on stderr."""
    print(line, file=sys.stderr, flush=True)


def read_runs(folder: Path) -> list[Run]:
    """Return every run at or below a folder, by name.

    Raises:
        Refused: If there is no such folder, no event file in it, or no scalar in any.
    """
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
        runs.append(_read(place, name))
    runs = [run for run in runs if run.curves]
    if not runs:
        raise Refused(f"the event files in {folder} hold no scalars")
    return runs


def _read(place: Path, name: str) -> Run:
    events = open_events(place).Reload()
    curves = {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }
    spectra = {}
    for tag in events.Tags()["histograms"]:
        kind, _, matrix = tag.removeprefix(PREFIX).partition("/")
        if kind in _HISTOGRAMS and (values := events.Histograms(tag)[-1].histogram_value).num:
            spectra[matrix] = _singular_values(values, _HISTOGRAMS[kind])
    return Run(name, curves, spectra, _read_settings(place))


def _singular_values(histogram: Any, source: str) -> Sample:
    """Return singular values, descending, from a histogram of their logarithms."""
    pairs = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    filled = [(10**limit, count) for limit, count in pairs if count > 0]
    values, counts = zip(*reversed(filled), strict=True)
    return Sample(list(values), list(counts), source)


def _read_settings(place: Path) -> dict[str, Any]:
    for name in _SETTINGS:
        try:
            settings = yaml.safe_load((place / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):  # missing, or with Python objects
            continue
        if settings:
            return _flatten(settings)
    return {}


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list):
        items = [(str(i), part) for i, part in enumerate(value)]
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, part in items:
        flat |= _flatten(part, f"{key}.{name}" if key else name)
    return flat


def is_metric(tag: str) -> bool:
    """Return True for the tag of a loss or another metric of the task.

    Learning rates, epochs, throughput, devices and the quantities of SpectralMonitor are none.
    """
    if parse_tag(tag) is not None or tag.startswith(_THROUGHPUT):
        return False
    return _words(tag)[0] in _STAGES or _direction(tag) != 0


# Counts of ThroughputMonitor, which are no results of the training.
_THROUGHPUT = (
    "train/batches", "train/samples", "train/time", "train/epoch", "train/device", "train/flops",
    "train/mfu", "train/total",
)  # fmt: skip


def _words(tag: str) -> list[str]:
    return re.findall("[a-z0-9]+", tag.lower()) or [""]


def metric_order(tag: str) -> tuple[bool, bool, str]:
    """Return a sort key: losses first, then by name, test metrics last."""
    return "loss" not in tag.lower(), tag.lower().startswith("test"), tag


def _direction(tag: str) -> int:
    """Return 1 if higher is better, -1 if lower is better, 0 if unknown."""
    words = _HIGHER_IS_BETTER.intersection(_words(tag)), _LOWER_IS_BETTER.intersection(_words(tag))
    return bool(words[0]) - bool(words[1])


def summarise(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the runs: last and best metrics, settings that differ."""
    metrics = sorted({t for run in runs for t in run.curves if is_metric(t)}, key=metric_order)
    headings = ["run", "last step"]
    for tag in metrics:
        headings += [tag, *([f"best {tag}"] if _has_best(tag) else [])]
    different = differing_settings(runs)
    rows = []
    for run in runs:
        cells = [run.name, str(run.last_step)]
        for tag in metrics:
            curve = run.curves.get(tag)
            cells.append(f"{curve[-1][1]:.4g}" if curve else "–")
            if _has_best(tag):
                cells.append(_best(curve, _direction(tag)) if curve else "–")
        rows.append([*cells, *(str(run.settings.get(key, "–")) for key in different)])
    return [*headings, *different], rows


def _has_best(tag: str) -> bool:
    return _direction(tag) != 0 and _words(tag)[0] not in ("train", "test")


def _best(curve: Curve, direction: int) -> str:
    finite = [(direction * value, step) for step, value in curve if math.isfinite(value)]
    if not finite:
        return "–"
    best, step = max(finite, key=lambda point: point[0])
    return f"{direction * best:.4g} at {step}"


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the keys of the settings that differ between the runs that have settings."""
    settings = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [
        key
        for key in keys
        if not any(part in key for part in _PATHS)
        and any(one.get(key) != settings[0].get(key) for one in settings)
    ]

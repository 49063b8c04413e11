"""What TensorBoard and the report show: spectra and stable ranks, histograms and charts.

matplotlib is imported by the first drawing, because that takes a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lit_fanions.callbacks.quantities import PREFIX, QUANTITIES, Tag, parse_tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 100
# Most rows of a heat map and most names of a legend; of more matrices, evenly chosen ones.
_MAX_ROWS, _MAX_NAMES = 120, 30
_MAX_LETTERS = 48
# Bounds and width of a histogram's buckets, in powers of ten of the largest singular value.
_LOWEST, _BUCKET = -6.0, 0.1

# Sections of TensorBoard's custom scalars: title -> quantities.
SECTIONS = {
    "The group's own norm": ["gradient_dual", "momentum_dual", "oracle_quality", "update_lr"],
    "Nuclear norm": [
        "gradient_nuclear", "momentum_nuclear", "gradient_nuclear_rank", "momentum_nuclear_rank",
    ],
    "Ky Fan k norm": ["gradient_kyfan", "momentum_kyfan", "gradient_energy", "momentum_energy"],
    "Frobenius norm": ["gradient_frobenius", "momentum_frobenius", "update_rms", "update_relative"],
    "Spectral norm": [
        "gradient_spectral", "momentum_spectral", "update_spectral", "weight_spectral",
        "weight_stable_rank",
    ],
}  # fmt: skip


class Sample(NamedTuple):
    """Singular values of one matrix, as in ``spectrum.Spectrum``."""

    values: list[float]  # descending
    weights: list[float]  # number of singular values that each value stands for
    source: str  # "momentum" or "gradient"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, of a size in inches, that needs no graphical interface."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def pixels(figure: Figure) -> np.ndarray:
    """Return a figure as an image, uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def stable_ranks(history: Mapping[int, Mapping[str, float]]) -> Figure:
    """Return a heat map of step -> matrix -> stable rank: a row a matrix, a column a step."""
    steps = sorted(history)
    # In the order of the last step, where weights that began as zero have a value too.
    names = list(dict.fromkeys(name for step in reversed(steps) for name in history[step]))
    names = list(_choose_evenly(names, _MAX_ROWS))
    table = np.array([[history[step].get(name, np.nan) for step in steps] for name in names])
    figure = new_figure(9, max(4.0, 1.5 + 0.22 * len(names)))
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
    shown = range(0, len(steps), -(-len(steps) // 8))
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set_yticks(range(len(names)), list(map(_shorten, names)), fontsize=8, parse_math=False)
    axes.set(xlabel="step", title="stable rank of the weights")
    figure.colorbar(image, ax=axes)
    return figure


def spectra(samples: Mapping[str, Sample]) -> Figure:
    """Return a plot of spectra by matrix, relative to the largest value, on logarithmic axes."""
    figure = new_figure(10, max(5.0, legend_height(len(samples))))
    axes = figure.subplots()
    for i, (name, sample) in enumerate(samples.items()):
        weights = np.asarray(sample.weights)
        indices = np.maximum(np.cumsum(weights) - (weights - 1) / 2, 1)
        relative = np.maximum(np.asarray(sample.values) / sample.values[0], 1e-8)
        axes.loglog(indices, relative, color=color(i, len(samples)), linewidth=1.2, label=name)
    sources = " and ".join(sorted({sample.source for sample in samples.values()}))
    axes.set_title(f"singular values of the {sources}, relative to the largest")
    axes.set_xlabel("index of the singular value")
    axes.grid(alpha=0.3)
    add_legend(figure, [axes])
    return figure


def legend_height(names: int) -> float:
    """Return the inches that a legend of some names takes."""
    return 0.8 + 0.18 * min(_MAX_NAMES, names)


def add_legend(figure: Figure, panels: Sequence[Any]) -> None:
    """Name the lines of some axes, at most thirty of them, to the right of the figure."""
    lines: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        lines = dict(zip(labels, handles, strict=True)) | lines
    if not lines:
        return
    names = _choose_evenly(list(lines), _MAX_NAMES)
    legend = figure.legend(
        [lines[name] for name in names],
        list(map(_shorten, names)),
        loc="outside right upper", fontsize=8, frameon=False,
        title=None if len(names) == len(lines) else f"{len(names)} of {len(lines)}",
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def color(i: int, count: int) -> Any:
    """Return a colour for the i-th of some lines: the first are dark, the last bright."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * i / max(1, count - 1))


def _shorten(name: str) -> str:
    """Return a name without its beginning if it would leave too little space to the plot."""
    return name if len(name) <= _MAX_LETTERS else "…" + name[1 - _MAX_LETTERS :]


def _choose_evenly(items: Sequence[Any], most: int) -> Sequence[Any]:
    return items[:: -(-len(items) // most)] if items else items


def custom_scalars(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's layout of custom scalars for the means over groups.

    A chart has one tag, because TensorBoard draws all tags of a run in the colour of the run.
    """
    parsed = [tag for tag in map(parse_tag, tags) if tag is not None and tag.is_group]
    groups = list(dict.fromkeys(tag.matrix for tag in parsed))
    layout: dict[str, dict[str, list[Any]]] = {}
    for section, quantities in SECTIONS.items():
        for tag in (Tag(q, group, True) for q in quantities for group in groups):
            if tag in parsed:
                title = f"{QUANTITIES[tag.quantity].title} ({tag.matrix})"
                chart = ["Multiline", [f"^{re.escape(str(tag))}$"]]
                layout.setdefault(section, {})[title] = chart
    return layout


def add_histogram(writer: Any, name: str, sample: Sample, step: int) -> None:
    """Write a histogram of singular values relative to the largest, in powers of ten."""
    values = torch.tensor(sample.values, dtype=torch.float64, device="cpu")
    weights = torch.tensor(sample.weights, dtype=torch.float64, device="cpu")
    powers = (values / values[0]).clamp(min=10**_LOWEST).log10()
    limits = torch.arange(_LOWEST, _BUCKET / 2, _BUCKET, dtype=torch.float64, device="cpu")
    buckets = torch.bucketize(powers, limits + 1e-9).clamp(max=len(limits) - 1)
    counts = torch.zeros_like(limits).index_add_(0, buckets, weights)
    writer.add_histogram_raw(
        f"{PREFIX}{sample.source}_spectrum/{name}",
        min=float(powers.min()),
        max=0.0,
        num=int(weights.sum().round()),
        sum=float((weights * powers).sum()),
        sum_squares=float((weights * powers.square()).sum()),
        bucket_limits=limits.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def add_figure(writer: Any, name: str, figure: Figure, step: int) -> None:
    """Write a figure as an image.

    ``writer.add_figure`` would load pyplot, which keeps global state in the user's process.
    """
    writer.add_image(f"{PREFIX}{name}", pixels(figure), step, dataformats="HWC")

"""Drawings of spectra and of stable ranks, for TensorBoard and for the report.

matplotlib is imported where it is needed: without it everything but the drawings works.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 100
# Rows of a heat map; of more matrices, evenly chosen ones.
_ROWS = 160


class Sample(NamedTuple):
    """Singular values of one matrix, as in ``spectrum.Spectrum``.

    Attributes:
        values: Descending.
        weights: How many each stands for.
        of: Of the momentum or of the gradient.
    """

    values: list[float]
    weights: list[float]
    of: str


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, of no graphical interface."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def pixels(figure: Figure) -> np.ndarray:
    """A figure as an image, uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def stable_ranks(history: Mapping[int, Mapping[str, float]]) -> Figure:
    """A heat map, matrices x time.

    Args:
        history: Step -> matrix -> stable rank.
    """
    rows = min(_ROWS, max(map(len, history.values())))
    figure = new_figure(7, max(4.0, 1.5 + 0.16 * rows))
    axes = figure.subplots()
    heat_map(axes, history)
    axes.set_title("stable rank of the weights")
    return figure


def spectra(samples: Mapping[str, Sample]) -> Figure:
    """The latest spectra, on log axes.

    Args:
        samples: Matrix -> singular values.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    draw_spectra(axes, samples)
    kinds = " and ".join(sorted({sample.of for sample in samples.values()}))
    axes.set_title(f"singular values of the {kinds} over the largest")
    return figure


def heat_map(axes: Any, history: Mapping[int, Mapping[str, float]]) -> None:
    """Draws matrices x time: a row for each matrix, a column for each step.

    Args:
        axes: Where to draw.
        history: Step -> matrix -> value.
    """
    steps = sorted(history)
    # The order of the last step, in which weights that begin as zero have a value too.
    names = list(dict.fromkeys(name for step in reversed(steps) for name in history[step]))
    names = names[:: -(-len(names) // _ROWS)]
    table = np.array([[history[step].get(name, np.nan) for step in steps] for name in names])
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
    shown = range(0, len(steps), -(-len(steps) // 8))
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("step")
    axes.figure.colorbar(image, ax=axes)


def draw_spectra(axes: Any, samples: Mapping[str, Sample]) -> None:
    """Draws each spectrum over its largest value against the place in it, on log axes.

    Args:
        axes: Where to draw.
        samples: Matrix -> singular values.
    """
    for i, sample in enumerate(samples.values()):
        places = np.cumsum(sample.weights) - (np.asarray(sample.weights) - 1) / 2
        relative = np.maximum(np.asarray(sample.values) / sample.values[0], 1e-8)
        axes.plot(np.maximum(places, 1), relative, color=color(i, len(samples)), linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of the singular value (first matrices dark)")
    axes.grid(alpha=0.3)


def color(i: int, count: int) -> Any:
    """A colour for the i-th of some matrices, dark for the first ones."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * i / max(1, count - 1))

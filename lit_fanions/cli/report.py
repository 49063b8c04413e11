"""`python -m lit_fanions report LOGDIR`: TensorBoard's logs as figures, for people without it.

One figure for each family of quantities of ``SpectralMonitor``, one of everything else that was
logged, and two of the stable ranks over time and of the spectra; of every run below the folder.
It reads event files alone.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_fanions.callbacks import figures
from lit_fanions.callbacks.quantities import QUANTITIES
from lit_fanions.cli.console import Refused

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[int, float]]  # (step, value)

USAGE_ERROR = 2
TRAINING, STABLE_RANKS, SPECTRA = "training", "stable ranks", "spectra"
_COLUMNS = 3
_NAMED = 10  # so many matrices are told apart by a legend
_GROUP = "group/"
_OTHER_FILES = (".png", ".htm", ".pdf", ".svg")
_HISTOGRAMS = {"momentum_spectrum": "momentum", "gradient_spectrum": "gradient"}


@dataclass(frozen=True)
class Run:
    """What one folder of event files holds.

    Attributes:
        name: Its path below the folder that was asked for.
        curves: Tag -> values.
        spectra: Matrix -> the latest singular values of its momentum or gradient, over the largest.
    """

    name: str
    curves: dict[str, Curve]
    spectra: dict[str, figures.Sample]


def read_runs(folder: Path) -> list[Run]:
    """Every run at or below a folder.

    Args:
        folder: Of logs.

    Returns:
        The runs that have scalars, by name.

    Raises:
        Refused: If there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise Refused(f"there is no folder {folder}")
    places = sorted({path.parent for path in folder.rglob("*tfevents*") if path.is_file()})
    if not places:
        raise Refused(f"no TensorBoard event file in {folder}: give the folder of a run's logs")
    runs = [_read(place, _name(place, folder)) for place in places]
    runs = [run for run in runs if run.curves]
    if not runs:
        raise Refused(f"the event files in {folder} hold no scalars")
    return runs


def _name(place: Path, folder: Path) -> str:
    return str(place.relative_to(folder)) if place != folder else folder.resolve().name


def _read(place: Path, name: str) -> Run:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Of histograms the last one is enough; of scalars all.
    events = EventAccumulator(
        str(place), {"scalars": 0, "histograms": 1, "images": 1, "tensors": 1}
    ).Reload()
    curves = {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }
    spectra = {}
    for tag in events.Tags()["histograms"]:
        kind, _, matrix = tag.partition("/")
        if kind in _HISTOGRAMS and (values := events.Histograms(tag)[-1].histogram_value).num:
            spectra[matrix] = _sample(values, _HISTOGRAMS[kind])
    return Run(name, curves, spectra)


def _sample(histogram: Any, of: str) -> figures.Sample:
    """Singular values, descending, from a histogram of their logarithms."""
    pairs = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    filled = [(10**limit, count) for limit, count in pairs if count > 0]
    values, counts = zip(*reversed(filled), strict=True)
    return figures.Sample(list(values), list(counts), of)


def family_of(tag: str) -> str:
    """The figure that a tag belongs to: gradient, momentum, oracle, update, weight or training."""
    quantity = tag.partition("/")[0]
    return quantity.partition("_")[0] if quantity in QUANTITIES else TRAINING


def draw(run: Run) -> dict[str, Figure]:
    """The figures of a run, by family.

    Args:
        run: The run.
    """
    families: dict[str, dict[str, dict[str, Curve]]] = {}  # family -> panel -> line -> curve
    for tag, curve in run.curves.items():
        family = family_of(tag)
        panel, _, line = tag.partition("/") if family != TRAINING else (tag, "", "")
        families.setdefault(family, {}).setdefault(panel, {})[line] = curve
    order = [*dict.fromkeys(name.partition("_")[0] for name in QUANTITIES)]
    drawn = {
        name: _grid(families[name], single=name == TRAINING)
        for name in (TRAINING, *order)
        if name in families
    }
    history: dict[int, dict[str, float]] = {}
    for tag, curve in run.curves.items():
        quantity, _, matrix = tag.partition("/")
        if quantity == "weight_stable_rank" and not matrix.startswith(_GROUP):
            for step, value in curve:
                history.setdefault(step, {})[matrix] = value
    if history:
        drawn[STABLE_RANKS] = figures.stable_ranks(history)
    if run.spectra:
        drawn[SPECTRA] = figures.spectra(run.spectra)
    return drawn


def _grid(panels: Mapping[str, Mapping[str, Curve]], *, single: bool) -> Figure:
    """A panel for each quantity: thin lines for matrices, thick ones for the groups' means."""
    names = [name for name in QUANTITIES if name in panels] or sorted(panels)
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = figures.new_figure(5.0 * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        lines = panels[name]
        matrices = [line for line in lines if not line.startswith(_GROUP)]
        for i, line in enumerate(matrices):
            color = "tab:blue" if single else figures.color(i, len(matrices))
            marker = "o" if len(lines[line]) == 1 else None  # a line has two ends
            width = 1.2 if single else 0.6
            axes.plot(
                *_points(lines[line]), color=color, linewidth=width, marker=marker, label=line
            )
        if not single and axes is grid.flat[0] and len(matrices) <= _NAMED:
            axes.legend(fontsize=6)
        for line, curve in lines.items():
            if line.startswith(_GROUP):
                label = line.removeprefix(_GROUP)
                style = "o" if len(curve) == 1 else "--"
                axes.plot(*_points(curve), style, color="tab:red", linewidth=1.8)
                axes.annotate(label, curve[-1], fontsize=7, color="tab:red", parse_math=False)
        axes.set_title(QUANTITIES.get(name, name), fontsize=9, parse_math=False)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if _spans_decades(lines.values()):
            axes.set_yscale("log")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_axis_off()
    return figure


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _spans_decades(curves: Any) -> bool:
    """Whether most values do: a single matrix far off shall not flatten the others."""
    values = sorted(value for curve in curves for _, value in curve)
    if not values or values[0] <= 0:
        return False
    low, high = values[len(values) // 10], values[-1 - len(values) // 10]
    return high > 30 * low


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def page(runs: Sequence[Run]) -> str:
    """A stand-alone HTML page of all figures of some runs."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>lit_fanions report"
        "</title><style>body{font-family:sans-serif;margin:2em}img{max-width:100%}</style></head>"
        "<body><h1>What the optimizer did</h1><p>Thin lines are matrices, the first ones dark and "
        "the last ones bright; dashed red lines are means over a parameter group.</p>"
    ]
    for run in runs:
        parts.append(f"<h2>{html.escape(run.name)}</h2>")
        for family, figure in draw(run).items():
            image = base64.b64encode(png(figure)).decode()
            name = html.escape(f"{run.name}: {family}")
            parts.append(
                f"<h3>{html.escape(family)}</h3>"
                f"<img alt='{name}' src='data:image/png;base64,{image}'>"
            )
    return "\n".join([*parts, "</body></html>\n"])


def write(runs: Sequence[Run], output: Path) -> list[Path]:
    """Writes the figures of some runs.

    Args:
        runs: The runs.
        output: A file of suffix .html for one page, or a folder for PNG files.

    Returns:
        What was written.

    Raises:
        Refused: If it is a file of another kind.
    """
    is_page = output.suffix.lower() == ".html"
    if not is_page and (output.is_file() or output.suffix.lower() in _OTHER_FILES):
        raise Refused(f"--output {output}: give a .html file, or a folder for PNGs")
    if is_page:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(runs), encoding="utf-8")
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    written = []
    places = [re.sub(r"[^\w.-]+", "_", run.name) + "_" for run in runs]
    for i, run in enumerate(runs):
        prefix = "" if len(runs) == 1 else places[i]
        if prefix in places[:i]:  # a/b and a_b
            prefix = f"{prefix}{i}_"
        for family, figure in draw(run).items():
            path = output / f"{prefix}{family.replace(' ', '_')}.png"
            path.write_bytes(png(figure))
            written.append(path)
    return written


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def main(args: Sequence[str], prog: str = "report") -> int:
    """Write a report.

    Args:
        args: The arguments after ``report``.
        prog: What the help calls the program.

    Returns:
        The exit status: 0, or 2 for something that the user can put right.
    """
    parser = _Parser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="folder of one or more runs")
    parser.add_argument(
        "--output", type=Path, help="a .html file, or a folder for PNGs (LOGDIR/report.html)"
    )
    options = parser.parse_args(args)
    try:
        if not figures.available():
            raise Refused("the report needs matplotlib: pip install matplotlib")
        runs = read_runs(options.logdir)
        for path in write(runs, options.output or options.logdir / "report.html"):
            print(path)
    except (Refused, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0

"""`python -m lit_fanions report LOGDIR`: TensorBoard's logs as one page, for people without it.

The page has a summary of the runs below the folder, their losses, a figure for each family of
quantities of SpectralMonitor, the stable ranks over time, the latest spectra, and everything else
that was logged. All runs are drawn into the same figures. It reads event files, and config.yaml or
hparams.yaml beside them.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lit_fanions.callbacks.quantities import QUANTITIES
from lit_fanions.cli import curves
from lit_fanions.cli.console import CommandParser, Refused
from lit_fanions.cli.curves import Curve, Run
from lit_fanions.cli.report_figures import Drawing, draw, png
from lit_fanions.cli.results import plural

_OTHER_FILES = (".png", ".htm", ".pdf", ".svg")
_HEAD = """<!doctype html>
<html lang='en'><head><meta charset='utf-8'><title>lit_fanions report</title><style>
body{font-family:sans-serif;margin:2em}
img{max-width:100%}
table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
.wide{overflow-x:auto}
dt{font-weight:bold;margin-top:.5em}
</style></head><body>
"""
_NOTATION = (
    "G is the gradient as the step found it, clipped and accumulated; M is the momentum whose "
    "oracle gives the direction D; W is the weight, ΔW its change; σ₁ is the largest singular "
    "value of a matrix and n its smaller side. k is the group's rank, or a quarter of n if that "
    "is full. Norms and sizes of updates have logarithmic scales."
)
_LEGEND = (  # of one run, and of several
    "Thin lines are matrices, thick black lines are means over a parameter group.",
    "Each run has a colour. Lines are means over a parameter group, the bands behind them reach "
    "from the smallest to the largest value of its matrices.",
)


def page(runs: Sequence[Run]) -> str:
    """Return a stand-alone HTML page about some runs."""
    title = f"<h1>Report of {plural(len(runs), 'training')}</h1>"
    parts = [_HEAD, title, _table(*summarize(runs)), f"<p>{_LEGEND[len(runs) > 1]}</p>"]
    explained: dict[str, None] = {}
    for drawing in draw(runs):
        explained |= dict.fromkeys(drawing.quantities)
        parts.append(_section(drawing))
    if explained:
        parts.append(_glossary(explained))
    return "\n".join([*parts, "</body></html>\n"])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells)
        for tag, cells in (("th", headings), *(("td", row) for row in rows))
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='wide'><table>\n{body}\n</table></div>"


def _section(drawing: Drawing) -> str:
    title = html.escape(drawing.title, quote=True)
    links = ", ".join(f"<a href='#{name}'>{name}</a>" for name in drawing.quantities)
    meanings = f"<p>What they mean: {links}</p>" if links else ""
    data = base64.b64encode(png(drawing.figure)).decode()
    image = f"<img alt='{title}' src='data:image/png;base64,{data}'>"
    return f"<h2>{title}</h2>\n{meanings}\n{image}"


def _glossary(names: Iterable[str]) -> str:
    lines = [f"<h2>What the quantities mean</h2><p>{html.escape(_NOTATION)}</p><dl>"]
    for name in names:
        title, meaning = map(html.escape, QUANTITIES[name])
        lines.append(f"<dt id='{name}'>{title} (<code>{name}</code>)</dt><dd>{meaning}</dd>")
    lines.append("</dl><p>docs/quantities.md in the sources says what to do if one looks odd.</p>")
    return "\n".join(lines)


def summarize(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the runs: last and best metrics, settings that differ."""
    columns = {"run": [run.name for run in runs], "last step": [str(run.last_step) for run in runs]}
    tags = {tag for run in runs for tag in run.curves if curves.is_metric(tag)}
    for tag in sorted(tags, key=curves.metric_order):
        drawn, direction = [run.curves.get(tag, []) for run in runs], curves.direction(tag)
        columns[tag] = [f"{curve[-1][1]:.4g}" if curve else "–" for curve in drawn]
        if direction and curves.stage(tag) not in ("train", "test"):
            columns[f"best {tag}"] = [_best(curve, direction) for curve in drawn]
    for key in curves.differing_settings(runs):
        values = [str(run.settings.get(key, "–")) for run in runs]
        columns[key.replace(".init_args", "")] = values
    return [*columns], [*map(list, zip(*columns.values(), strict=True))]


def _best(curve: Curve, direction: int) -> str:
    finite = [(direction * value, step) for step, value in curve if math.isfinite(value)]
    if not finite:
        return "–"
    best, step = max(finite, key=lambda point: point[0])
    return f"{direction * best:.4g} at {step}"


def write(runs: Sequence[Run], output: Path) -> list[Path]:
    """Write the figures of some runs into an HTML file, or a folder of PNGs; return the paths."""
    is_page = output.suffix.lower() == ".html"
    if not is_page and (output.is_file() or output.suffix.lower() in _OTHER_FILES):
        raise Refused(f"--output {output}: give a .html file, or a folder for PNGs")
    if is_page:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(runs), encoding="utf-8")
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for drawing in draw(runs):
        stem = re.sub(r"[^\w.-]+", "_", drawing.title)
        path = output / f"{stem}.png"
        if path in written:  # runs a/b and a_b
            path = output / f"{stem}_{len(written)}.png"
        path.write_bytes(png(drawing.figure))
        written.append(path)
    return written


def main(args: Sequence[str]) -> int:
    """Write a report, and return the exit status 0; a mistake of the user exits with status 2."""
    parser = CommandParser("report", __doc__)
    parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="folder of one or more runs")
    parser.add_argument(
        "--output", type=Path, help="a .html file, or a folder for PNGs (LOGDIR/report.html)"
    )
    options = parser.parse_args(args)
    try:
        runs = curves.read_runs(options.logdir)
        for path in write(runs, options.output or options.logdir / "report.html"):
            print(path)
    except (Refused, OSError) as error:
        parser.error(str(error))
    return 0

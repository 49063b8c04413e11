"""`python -m lit_fanions compare A B`: are two trainings equal to the last bit, and if not, where?

  python -m lit_fanions compare logs/quickstart/version_0 logs/quickstart/version_1
  python -m lit_fanions compare before.yaml after.yaml --steps 40 --trainer.accelerator=cpu

A and B are folders of logs, or two recipes, which are trained first for --steps optimizer steps;
other options are passed to fit for both. Compared are the scalars in the event files, the tensors
in checkpoints of equal name, and the weights after each step by digests of them: recipes record
these, and so does any fit with --trainer.callbacks+ lit_fanions.cli.digests.RecordDigests.
Folders of several runs are compared run by run, those of equal name. A run, a checkpoint or digests
that only one side has are a difference.

The metrics of both and their paired differences are a table, a picture, CSV and JSON in --out.
The exit status is 0 if everything is equal, 1 if not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_fanions.cli import console, curves, runner, tensors
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.curves import Curves, Run, spread
from lit_fanions.cli.errors import one_line
from lit_fanions.cli.report_figures import label_panel, plot_curve, run_color
from lit_fanions.cli.results import Outcome, drawable, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 20
EQUAL = "equal"
NOTHING = "nothing to compare"
SCALARS = "scalars"
RECIPES = (".yaml", ".yml")
RESERVED = {
    "--config": "A and B are the recipes",
    "--trainer.max_steps": "use --steps N",
    "--trainer.logger": "the logs are kept in --out",
    "--ckpt_path": "both trainings start from scratch",
}
Pair = tuple[Run, Run]
Finding = tuple[str, str, str]  # run, what was compared, answer
Points = dict[str, list[tuple[int, float, float]]]  # run -> steps with the values of A and B


def main(args: Sequence[str]) -> int:
    """Compare two trainings; return 0 if they are equal, 1 if they differ, 130 after Ctrl-C."""
    parser = console.CommandParser("compare", __doc__)
    parser.add_argument("a", type=Path, metavar="A", help="folder of logs, or a recipe")
    parser.add_argument("b", type=Path, metavar="B", help="what it is compared with")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"for recipes (default: {STEPS})"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), metavar="DIR", help="(default: comparison)"
    )
    options, rest = parser.parse_known_args(args)
    try:
        console.check_counts(options, "steps")
        folders = _folders(options, rest)
        outcome, is_equal = summarize(folders, *pair_runs(*map(curves.read_runs, folders)))
        print(outcome)
        outcome.save(options.out, "comparison")
    except Refused as error:
        parser.error(str(error))
    except runner.Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    return int(not is_equal)


def _folders(options: argparse.Namespace, rest: Sequence[str]) -> list[Path]:
    """Return the folders of logs that are compared; recipes are trained for that."""
    given = [options.a, options.b]
    if all(path.is_dir() for path in given):
        if rest:
            raise Refused(f"{' '.join(rest)}: options of fit are for recipes")
        return given
    for path in given:
        if not path.exists():
            raise Refused(f"there is no {path}")
    if not all(path.suffix in RECIPES for path in given):
        raise Refused("give two folders of logs, or two recipes (.yaml)")
    console.refuse_reserved(rest, RESERVED)
    folders = []
    for name, recipe in zip("ab", given, strict=True):
        args = (
            f"--config={recipe}",
            *rest,
            f"--trainer.max_steps={options.steps}",
            "--trainer.callbacks+=lit_fanions.cli.digests.RecordDigests",
        )
        folders.append(_train(runner.Run(name, args), options.out / "runs"))
    return folders


def _train(run: runner.Run, folder: Path) -> Path:
    """Train a recipe in a child process and return the folder of its logs."""
    curves.print_progress(f"training {run.args[0].partition('=')[2]}")
    shutil.rmtree(folder / run.name, ignore_errors=True)  # checkpoints of an earlier comparison
    with runner.signals() as received:
        training = runner.start(run, folder, {})
        try:
            while training.process.poll() is None and not received:
                time.sleep(runner.POLL)
        finally:
            runner.end([training.process], received)
        if received:
            raise runner.Stopped(received[0])
    if reason := runner.failure(training):
        raise Refused(f"{run.args[0]}: {reason}; see {training.logs}/output.txt")
    return training.logs


def pair_runs(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[Pair], list[Finding]]:
    """Return the runs that are compared: one with one, or those of equal name; and the others."""
    if len(a) == len(b) == 1:
        return [(a[0], b[0])], []
    mine, others = ({run.name: run for run in runs} for runs in (a, b))
    pairs = [(run, others[name]) for name, run in mine.items() if name in others]
    if not pairs:
        raise Refused(f"no runs of equal name: A has {', '.join(mine)}, B has {', '.join(others)}")
    return pairs, [
        *((name, "run", "only in A") for name in mine if name not in others),
        *((name, "run", "only in B") for name in others if name not in mine),
    ]


def summarize(
    folders: Sequence[Path], pairs: Sequence[Pair], unpaired: Sequence[Finding]
) -> tuple[Outcome, bool]:
    """Return the results of comparing the folders A and B, and whether everything is equal."""
    findings = [*((a.name, *line) for a, b in pairs for line in _compare_bits(a, b)), *unpaired]
    conclusion, is_equal = _conclude(findings)
    tags = {tag for a, b in pairs for tag in a.curves.keys() & b.curves if curves.is_metric(tag)}
    points = {tag: _points(pairs, tag) for tag in sorted(tags, key=curves.metric_order)}
    metrics = {tag: by_run for tag, by_run in points.items() if by_run}
    curved = {tag: own for tag, own in metrics.items() if curves.stage(tag) != "test"}
    tables = [Table("to the last bit", ["run", "what", "answer"], [[*own] for own in findings])]
    if metrics:
        headings = ["metric", "A", "B", "B - A", "largest |B - A|", "B lower"]
        rows = [[metric, *_row(by_run)] for metric, by_run in metrics.items()]
        tables.append(Table("metrics: last values, and paired differences", headings, rows))
    if settings := curves.differing_settings(pairs[0]):
        rows = [[key, *(str(run.settings.get(key, "–")) for run in pairs[0])] for key in settings]
        tables.append(Table("settings that differ", ["setting", "A", "B"], rows))
    outcome = Outcome(
        tables=tables,
        columns=["run", "metric", "step", "A", "B", "B - A"],
        rows=[
            [name, metric, step, a, b, b - a]
            for metric, by_run in metrics.items()
            for name, own in by_run.items()
            for step, a, b in own
        ],
        settings={"A": str(folders[0]), "B": str(folders[1])},
        draw=(lambda figure: _draw(figure, curved)) if curved else None,
        size=(12, 3.2 * len(curved)),
        notes=[conclusion],
    )
    return outcome, is_equal


def _conclude(findings: Sequence[Finding]) -> tuple[str, bool]:
    """Return the conclusion in a sentence, and whether everything is equal."""
    equal = [own for own in findings if own[2].startswith(EQUAL)]
    if len(equal) < len([own for own in findings if own[2] != NOTHING]):
        return "A and B differ", False
    if any(what != SCALARS for _, what, _ in equal):
        return "A and B are equal to the last bit", True
    if not equal:
        return "nothing was compared: no scalars but counts, and no weights", False
    total = sum(int(answer.split("(")[1].split()[0]) for *_, answer in equal)
    return f"A and B are equal in all {plural(total, 'scalar')}; no weights were compared", True


def _compare_bits(a: Run, b: Run) -> Iterator[tuple[str, str]]:
    """Yield what was compared to the last bit, and the answer."""
    yield SCALARS, _compare_scalars(a.curves, b.curves)
    if answer := _compare_digests(a.folder, b.folder):
        yield "weights after each step", answer
    mine, others = (
        {str(file.relative_to(run.folder)) for file in run.folder.rglob("*.ckpt")} for run in (a, b)
    )
    for name in sorted(mine | others):
        if name in mine and name in others:
            yield name, _compare_checkpoints(a.folder / name, b.folder / name)
        else:
            yield name, f"only in {'A' if name in mine else 'B'}"


def _compare_checkpoints(before: Path, after: Path) -> str:
    try:
        old, new = tensors.read_checkpoint(before), tensors.read_checkpoint(after)
    except ValueError as error:
        return _describe_unreadable(error)
    if not old and not new:
        return NOTHING
    return tensors.difference(old, new) or f"{EQUAL} ({plural(len(old), 'tensor')})"


def _compare_scalars(a: Curves, b: Curves) -> str:
    """Return whether all scalars are equal, times and throughput left out."""
    tags = [tag for tag in {**a, **b} if not curves.is_count(tag)]
    different = {}
    for tag in tags:  # repr, because NaN differs from itself
        points = ({(step, repr(value)) for step, value in own.get(tag, ())} for own in (a, b))
        if unequal := set.symmetric_difference(*points):
            different[tag] = min(step for step, _ in unequal)
    if not tags:
        return NOTHING
    if not different:
        return f"{EQUAL} ({plural(len(tags), 'scalar')})"
    first = min(different, key=lambda tag: different[tag])
    return f"step {different[first]}: {first} ({len(different)} of {len(tags)} differ)"


def _describe_unreadable(error: Exception) -> str:
    return f"cannot be read: {one_line(error, 120)}"


def _compare_digests(a: Path, b: Path) -> str:
    """Return the first difference of the weights of two runs, "" if neither recorded them."""
    try:
        before, after = tensors.read_digests(a), tensors.read_digests(b)
    except (OSError, ValueError) as error:
        return _describe_unreadable(error)
    if not before or not after:
        return f"only in {'A' if before else 'B'}" if before or after else ""
    for step in sorted({*before, *after}):
        old, new = before.get(step), after.get(step)
        if old is None or new is None:
            return f"step {step}: only {'A' if new is None else 'B'} has it"
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            return f"step {step}: {names[0]} ({len(names)} of {len(old)} differ)"
    return f"{EQUAL} ({plural(len(before[max(before)]), 'tensor')}, steps 0 to {max(before)})"


def _points(pairs: Sequence[Pair], metric: str) -> Points:
    """Return step, value of A and value of B at the steps that both have logged, by run."""
    points = {}
    for a, b in pairs:
        after = dict(b.curves.get(metric, ()))
        before = a.curves.get(metric, ())
        common = [(step, value, after[step]) for step, value in before if step in after]
        if not common and curves.stage(metric) == "test" and before and after:
            # A test has no step of its own: that of the end of each run.
            common = [(*before[-1], [*after.values()][-1])]
        if common:
            points[a.name] = common
    return points


def _row(points: Points) -> list[object]:
    """Return the last values and the differences; mean ± standard deviation over several runs."""
    last = [own[-1] for own in points.values()]
    every = [b - a for own in points.values() for _, a, b in own]
    return [
        *(_mean(values) for values in zip(*((a, b, b - a) for _, a, b in last), strict=True)),
        max(map(abs, every)),
        f"{sum(value < 0 for value in every)} of {len(every)}",
    ]


def _mean(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.4g} ± {deviation:.2g}" if len(values) > 1 else f"{mean:.4g}"


def _draw(figure: Figure, metrics: Mapping[str, Points]) -> None:
    """Draw the curves of A and B to the left, their differences to the right."""
    panels = figure.subplots(len(metrics), 2, squeeze=False)
    for (left, right), (metric, by_run) in zip(panels, metrics.items(), strict=True):
        for i, points in enumerate(by_run.values()):
            steps, before, after = zip(*points, strict=True)
            differences = [b - a for a, b in zip(before, after, strict=True)]
            for axes, values, color, label in (
                (left, before, run_color(0), "A"),
                (left, after, run_color(1), "B"),
                (right, differences, "black", ""),
            ):
                curve = [*zip(steps, drawable(values), strict=True)]
                plot_curve(axes, curve, "" if i else label, color, width=1.2)
        right.axhline(0, color="grey", linewidth=0.8)
        label_panel(left, metric)
        label_panel(right, f"B - A: {metric}")
    panels[0][0].legend()

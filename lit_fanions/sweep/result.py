"""Summarize the results of a sweep: a table, a picture and all numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.curves import spread
from lit_fanions.cli.results import Outcome, drawable, logarithmic, plural
from lit_fanions.sweep.plan import Plan, Request, Settings
from lit_fanions.sweep.space import number, short
from lit_fanions.sweep.storage import hide_password
from lit_fanions.sweep.study import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # settings of a search in the table
LINEAR = 30  # a grid is drawn logarithmically if its largest / smallest value exceeds this
PROGRAM = "lit_fanions.sweep"
Point = tuple[float | str, ...]  # values of the swept options, in the order of the plan
Trials = Sequence[tuple[Request, FrozenTrial]]


def best_settings(sweep: Sweep, requests: Sequence[Request]) -> Settings:
    """Return the settings of the best training; empty if all failed."""
    trials = [trial for _, trial in sweep.trials(requests) if trial.state == TrialState.COMPLETE]
    if not trials:
        return {}
    return sweep.settings(min(trials, key=lambda trial: _loss(sweep, trial.value)))


def summarize(sweep: Sweep, requests: Sequence[Request]) -> tuple[Outcome, bool]:
    """Return the results of the trainings, and whether one of them failed.

    Raises:
        Refused: If all trainings failed.
    """
    plan = sweep.plan
    trials = [pair for pair in sweep.trials(requests) if "same as" not in pair[1].user_attrs]
    names = [short(name) for name in plan.space]
    labels = _labels(names)
    points = _values_by_point(sweep, trials, names)
    values = {point: found for point, found in points.items() if found}
    failures = [
        f"{trial.user_attrs.get('folder')}: {trial.user_attrs.get('reason')}"
        for _, trial in trials
        if trial.state == TrialState.FAIL
    ]
    if not values:
        raise Refused(f"every training failed, as {failures[0]}; see {plan.out}/runs")
    searches = plan.sampler != "grid"

    def rank(point: Point) -> tuple[int, float]:
        # The best of a search was trained with all seeds; others may be lucky with seed 0.
        return -len(values[point]) * searches, _loss(sweep, spread(values[point])[0])

    order = sorted(values, key=rank)
    shown = order[:SHOWN] if searches else list(values)
    title = f"{plan.metric}, the last value: mean ± standard deviation over n seeds"
    if searches:
        title += f"; the {len(shown)} best settings of {len(points)}"
    rows = [[*map(_cell, point), _mean(values[point]), len(values[point])] for point in shown]
    outcome = Outcome(
        tables=[Table(title, [*labels, plan.metric, "n"], rows)],
        columns=[*names, "seed", "state", plan.metric, "seconds", "folder", "reason"],
        rows=[_row(sweep, names, request, trial) for request, trial in trials],
        settings=_settings(sweep, requests, trials),
        draw=lambda figure: _draw(figure, sweep, labels, values),
        size=(max(7, 4 * len(names)) if searches else 7, 5),
        notes=_notes(plan, dict(zip(labels, order[0], strict=True)), trials, failures),
        program=PROGRAM,
    )
    return outcome, bool(failures)


def _values_by_point(
    sweep: Sweep, trials: Trials, names: Sequence[str]
) -> dict[Point, list[float]]:
    """Return the final values of all seeds for each point; empty lists for failures alone."""
    points: dict[Point, list[float]] = {}
    for _, trial in trials:
        settings = sweep.settings(trial)
        values = points.setdefault(tuple(number(settings.get(n, "")) for n in names), [])
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            values.append(trial.value)
    return points


def _notes(
    plan: Plan, best: Mapping[str, float | str], trials: Trials, failures: Sequence[str]
) -> list[str]:
    """Return the lines below the table."""
    notes = []
    if best:
        notes.append("best: " + "  ".join(f"{name}={_cell(value)}" for name, value in best.items()))
    if plan.sampler != "grid":
        notes.append(
            "the best setting was chosen with seed 0; it alone was trained with more seeds"
        )
    if pruned := sum(trial.state == TrialState.PRUNED for _, trial in trials):
        notes.append(f"pruned: {pruned} of {len(trials)}")
    notes += [f"failed: {failure}" for failure in failures]
    return notes + ["--retry-failed tries them again"] * bool(failures)


def _row(sweep: Sweep, names: Sequence[str], request: Request, trial: FrozenTrial) -> list[object]:
    """Return the row of a training in the CSV file."""
    settings = sweep.settings(trial)
    return [
        *(number(settings.get(name, "")) for name in names),
        request.seed,
        trial.state.name.lower(),
        trial.value,
        trial.duration.total_seconds() if trial.duration else None,
        trial.user_attrs.get("folder"),
        trial.user_attrs.get("reason"),
    ]


def _settings(sweep: Sweep, requests: Sequence[Request], trials: Trials) -> dict[str, Any]:
    """Return everything that the results depend on, for the JSON file."""
    plan = sweep.plan
    commits = {trial.user_attrs.get("commit") for _, trial in trials}
    return {
        "arguments": list(plan.recipe),
        "space": {name: vars(values) for name, values in plan.space.items()},
        "seeds": sorted({request.seed for request in requests}),
        "sampler": plan.sampler,
        "metric": plan.metric,
        "direction": plan.direction,
        "study": plan.study,
        "storage": hide_password(plan.storage),
        "commits": sorted(commit for commit in commits if commit),
        "optuna": optuna.__version__,
    }


def _loss(sweep: Sweep, value: float | None) -> float:
    """Return a value of which less is better."""
    assert value is not None
    return value if sweep.plan.direction == "minimize" else -value


def _labels(names: Sequence[str]) -> list[str]:
    """Return short names of options: as many of their last parts as make them unique."""

    def shorten(name: str) -> str:
        for parts in range(1, name.count(".") + 1):
            tail = ".".join(name.split(".")[-parts:])
            if sum(f".{other}".endswith(f".{tail}") for other in names) == 1:
                return tail
        return name

    return list(map(shorten, names))


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _mean(values: Sequence[float]) -> str:
    diverged = sum(not math.isfinite(value) for value in values)
    if diverged:
        return f"diverged: {diverged} of {len(values)}"
    mean, deviation = spread(values)
    return f"{mean:.4f} ± {deviation:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _draw(
    figure: Figure,
    sweep: Sweep,
    labels: Sequence[str],
    values: Mapping[Point, Sequence[float]],
) -> None:
    searches = sweep.plan.sampler != "grid"
    if not searches:
        _draw_grid(figure.subplots(), labels, values)
    else:
        panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
        for index, (panel, label) in enumerate(zip(panels, labels, strict=True)):
            _draw_search(panel, index, label, values)
            if getattr(list(sweep.plan.space.values())[index], "log", False):
                logarithmic(panel)
    figure.axes[0].set_ylabel(sweep.plan.metric)
    most = max(map(len, values.values()))
    star = f", star: mean ± standard deviation of {most} seeds" if searches and most > 1 else ""
    figure.suptitle(f"{sweep.plan.study}: {sweep.plan.metric}{star}")


def _draw_grid(axes: Axes, labels: Sequence[str], values: Mapping[Point, Sequence[float]]) -> None:
    """Draw the metric against the option with the most values, a line for each of the others."""
    different = [len({point[i] for point in values}) for i in range(len(labels))]
    along = different.index(max(different)) if different else None
    lines: dict[str, dict[float | str, Sequence[float]]] = {}
    for point, found in values.items():
        rest = ", ".join(
            f"{label} {_cell(value)}"
            for i, (label, value) in enumerate(zip(labels, point, strict=True))
            if i != along and different[i] > 1
        )
        lines.setdefault(rest, {})["" if along is None else point[along]] = found
    for label, line in lines.items():
        numeric = all(isinstance(value, float) for value in line)
        order = sorted(line) if numeric else list(line)
        spreads = [spread(line[place]) for place in order]
        axes.errorbar(
            order if numeric else list(map(_cell, order)),
            drawable([mean for mean, _ in spreads]),
            yerr=[deviation for _, deviation in spreads],
            marker="o",
            linestyle="-" if numeric else "",
            capsize=3,
            label=label,
        )
    axes.margins(x=0.1)
    if along is not None:
        axes.set_xlabel(labels[along])
        places = [point[along] for point in values]
        numbers = [place for place in places if isinstance(place, float) and place > 0]
        if len(numbers) == len(places) and max(numbers) > LINEAR * min(numbers):
            logarithmic(axes)
    seeds = max(map(len, values.values()))
    axes.set_title(f"mean ± standard deviation, {plural(seeds, 'seed')}", fontsize="medium")
    if len(lines) > 1:
        axes.legend()


def _draw_search(
    axes: Axes, index: int, label: str, values: Mapping[Point, Sequence[float]]
) -> None:
    """Draw all settings that were trained to the end, with a star for the best."""
    places = [point[index] for point in values]
    most = max(values, key=lambda point: len(values[point]))
    axes.scatter(places, drawable([spread(found)[0] for found in values.values()]), s=18)
    if len(values[most]) > 1:
        mean, deviation = spread(values[most])
        axes.errorbar([most[index]], [mean], [deviation], marker="*", markersize=12, capsize=3)
    axes.set_xlabel(label)

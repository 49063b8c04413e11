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
from lit_fanions.sweep.plan import Request, Settings, format_value, number, short
from lit_fanions.sweep.storage import hide_password
from lit_fanions.sweep.study import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # settings of a search in the table
LINEAR = 30  # a grid is drawn logarithmically if its largest / smallest value exceeds this
PROGRAM = "lit_fanions.sweep"
Point = tuple[float | str, ...]  # values of the swept options, in the order of the plan
Values = Mapping[Point, Sequence[float]]  # last values of the metric, one a seed
Trials = Sequence[tuple[Request, FrozenTrial]]


def best_settings(sweep: Sweep, requests: Sequence[Request]) -> Settings:
    """Return the settings of the best training; empty if all failed."""
    finished = [
        (sweep.plan.loss(trial.value), trial.number, trial)
        for _, trial in sweep.trials(requests)
        if trial.state == TrialState.COMPLETE and trial.value is not None
    ]
    return sweep.settings(min(finished)[-1]) if finished else {}


def summarize(sweep: Sweep, requests: Sequence[Request]) -> tuple[Outcome, bool]:
    """Return the results of the trainings, and whether one failed; refuse where all did."""
    plan = sweep.plan
    trials = [pair for pair in sweep.trials(requests) if "same as" not in pair[1].user_attrs]
    names = [short(name) for name in plan.space]
    labels = _labels(names)
    points: dict[Point, list[float]] = {}
    for _, trial in trials:
        found = points.setdefault(_point(sweep, names, trial), [])
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            found.append(trial.value)
    values = {point: found for point, found in points.items() if found}
    failures = [
        f"{trial.user_attrs.get('folder')}: {trial.user_attrs.get('reason')}"
        for _, trial in trials
        if trial.state == TrialState.FAIL
    ]
    if not values:
        raise Refused(f"every training failed, as {failures[0]}; see {plan.out}/runs")
    # The best of a search was trained with all seeds; others may be lucky with seed 0.
    seeds = {point: len(found) if plan.searches else 0 for point, found in values.items()}
    losses = {point: plan.loss(spread(found)[0]) for point, found in values.items()}
    order = sorted(values, key=lambda point: (-seeds[point], losses[point]))
    shown = order[:SHOWN] if plan.searches else list(values)
    title = f"{plan.metric}, the last value: mean ± standard deviation over n seeds"
    if plan.searches:
        title += f"; the {len(shown)} best settings of {len(points)}"
    cells = [[*map(format_value, p), _mean(values[p]), len(values[p])] for p in shown]
    pairs = zip(labels, map(format_value, order[0]), strict=True)
    best = [f"{label}={value}" for label, value in pairs]
    outcome = Outcome(
        tables=[Table(title, [*labels, plan.metric, "n"], cells)],
        columns=[*names, "seed", "state", plan.metric, "seconds", "folder", "reason"],
        rows=[
            [
                *_point(sweep, names, trial),
                request.seed,
                trial.state.name.lower(),
                trial.value,
                trial.duration.total_seconds() if trial.duration else None,
                trial.user_attrs.get("folder"),
                trial.user_attrs.get("reason"),
            ]
            for request, trial in trials
        ],
        settings=_settings(sweep, requests, trials),
        draw=lambda figure: _draw(figure, sweep, labels, values),
        size=(max(7, 4 * len(names)) if plan.searches else 7, 5),
        notes=[*(["best: " + "  ".join(best)] * bool(best)), *_notes(sweep, trials, failures)],
        program=PROGRAM,
    )
    return outcome, bool(failures)


def _point(sweep: Sweep, names: Sequence[str], trial: FrozenTrial) -> Point:
    settings = sweep.settings(trial)
    return tuple(number(settings.get(name, "")) for name in names)


def _notes(sweep: Sweep, trials: Trials, failures: Sequence[str]) -> list[str]:
    notes = []
    if sweep.plan.searches:
        notes.append(
            "the best setting was chosen with seed 0; it alone was trained with more seeds"
        )
    if pruned := sum(trial.state == TrialState.PRUNED for _, trial in trials):
        notes.append(f"pruned: {pruned} of {len(trials)}")
    notes += [f"failed: {failure}" for failure in failures]
    return notes + ["--retry-failed tries them again"] * bool(failures)


def _settings(sweep: Sweep, requests: Sequence[Request], trials: Trials) -> dict[str, Any]:
    """Return everything that the results depend on, for the JSON file."""
    plan = sweep.plan
    commits = {trial.user_attrs.get("commit") for _, trial in trials}
    return {
        "arguments": list(plan.recipe),
        "space": {name: vars(values) for name, values in plan.space.items()},
        "seeds": sorted({request.seed for request in requests}),
        **{name: getattr(plan, name) for name in ("sampler", "metric", "direction", "study")},
        "storage": hide_password(plan.storage),
        "commits": sorted(commit for commit in commits if commit),
        "optuna": optuna.__version__,
    }


def _labels(names: Sequence[str]) -> list[str]:
    """Return short names of options: as many of their last parts as make them unique."""

    def shorten(name: str) -> str:
        parts = name.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        unique = (t for t in tails if sum(f".{n}".endswith(f".{t}") for n in names) == 1)
        return next(unique, name)

    return list(map(shorten, names))


def _mean(values: Sequence[float]) -> str:
    if diverged := sum(not math.isfinite(value) for value in values):
        return f"diverged: {diverged} of {len(values)}"
    mean, deviation = spread(values)
    return f"{mean:.4f} ± {deviation:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _draw(figure: Figure, sweep: Sweep, labels: Sequence[str], values: Values) -> None:
    plan, star = sweep.plan, ""
    if plan.searches:
        panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
        for i, (panel, space) in enumerate(zip(panels, plan.space.values(), strict=True)):
            _draw_search(panel, i, labels[i], values)
            if getattr(space, "log", False):
                logarithmic(panel)
        if (most := max(map(len, values.values()))) > 1:
            star = f", star: mean ± standard deviation of {most} seeds"
    else:
        _draw_grid(figure.subplots(), labels, values)
    figure.axes[0].set_ylabel(plan.metric)
    figure.suptitle(f"{plan.study}: {plan.metric}{star}")


def _draw_grid(axes: Axes, labels: Sequence[str], values: Values) -> None:
    """Draw the metric against the option with the most values, a line for each of the others."""
    different = [len({point[i] for point in values}) for i in range(len(labels))]
    along = different.index(max(different)) if different else None
    lines: dict[str, dict[float | str, Sequence[float]]] = {}
    for point, found in values.items():
        others = [i for i in range(len(labels)) if i != along and different[i] > 1]
        name = ", ".join(f"{labels[i]} {format_value(point[i])}" for i in others)
        lines.setdefault(name, {})["" if along is None else point[along]] = found
    for name, line in lines.items():
        numeric = all(isinstance(value, float) for value in line)
        order = sorted(line) if numeric else list(line)
        means, deviations = zip(*(spread(line[place]) for place in order), strict=True)
        axes.errorbar(
            order if numeric else list(map(format_value, order)),
            drawable(means),
            yerr=deviations,
            marker="o",
            linestyle="-" if numeric else "",
            capsize=3,
            label=name,
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


def _draw_search(axes: Axes, index: int, label: str, values: Values) -> None:
    """Draw all settings that were trained to the end, with a star for the best."""
    places = [point[index] for point in values]
    axes.scatter(places, drawable([spread(found)[0] for found in values.values()]), s=18)
    most = max(values, key=lambda point: len(values[point]))
    if len(values[most]) > 1:
        mean, deviation = spread(values[most])
        axes.errorbar([most[index]], [mean], [deviation], marker="*", markersize=12, capsize=3)
    axes.set_xlabel(label)

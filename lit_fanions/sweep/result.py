"""What a sweep found: a table, a picture and all numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState

from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.results import Outcome, drawable, logarithmic, plural
from lit_fanions.cli.runner import spread
from lit_fanions.sweep.space import number, short
from lit_fanions.sweep.study import Settings, Sweep, Wanted, hidden

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10  # settings of a search in the table
LINEAR = 30  # a grid whose largest value is more times its smallest is drawn logarithmically
PROGRAM = "lit_fanions.sweep"
Point = tuple[float | str, ...]  # values of the swept options, in their order


def best(sweep: Sweep, wanted: Sequence[Wanted]) -> Settings:
    """The settings of the best training; none if all failed."""
    done = [trial for _, trial in sweep.trials(wanted) if trial.state == TrialState.COMPLETE]
    if not done:
        return {}
    return sweep.settings(min(done, key=lambda trial: _loss(sweep, trial.value)))


def outcome(sweep: Sweep, wanted: Sequence[Wanted]) -> tuple[Outcome, bool]:
    """What the trainings gave, and whether one of them failed.

    Raises:
        Refused: If all did.
    """
    plan = sweep.plan
    trials = [pair for pair in sweep.trials(wanted) if "same as" not in pair[1].user_attrs]
    names = [short(name) for name in plan.space]
    labels = _labels(names)
    points: dict[Point, list[FrozenTrial]] = {}
    for _, trial in trials:
        settings = sweep.settings(trial)
        points.setdefault(tuple(number(settings.get(n, "")) for n in names), []).append(trial)
    values = {
        point: [t.value for t in found if t.state == TrialState.COMPLETE and t.value is not None]
        for point, found in points.items()
    }
    values = {point: found for point, found in values.items() if found}
    failed = [trial for _, trial in trials if trial.state == TrialState.FAIL]
    reasons = [
        f"{trial.user_attrs.get('folder')}: {trial.user_attrs.get('reason')}" for trial in failed
    ]
    if not values:
        raise Refused(f"every training failed, as {reasons[0]}; see {plan.out}/runs")
    searches = plan.sampler != "grid"

    def rank(point: Point) -> tuple[int, float]:
        # A search's best is what was trained with all seeds, not what was lucky with one.
        return -len(values[point]) * searches, _loss(sweep, spread(values[point])[0])

    order = sorted(values, key=rank)
    shown = order[:SHOWN] if searches else list(values)
    title = f"{plan.metric}, the last value: mean ± standard deviation over n seeds"
    if searches:
        title += f"; the {len(shown)} best settings of {len(points)}"
    pruned = sum(trial.state == TrialState.PRUNED for _, trial in trials)
    chosen = "  ".join(f"{n}={_cell(v)}" for n, v in zip(labels, order[0], strict=True))
    notes = [
        *([f"best: {chosen}"] if chosen else []),
        *(["seed 0 chose the best, which alone was trained with more seeds"] if searches else []),
        *([f"pruned: {pruned} of {len(trials)}"] if pruned else []),
        *(f"failed: {reason}" for reason in reasons),
        *(["--retry-failed tries them again"] if failed else []),
    ]
    result = Outcome(
        tables=[
            Table(
                title,
                [*labels, plan.metric, "n"],
                [[*map(_cell, p), _mean(values[p]), len(values[p])] for p in shown],
            )
        ],
        columns=[*names, "seed", "state", plan.metric, "seconds", "folder", "reason"],
        rows=[
            [
                *(number(settings.get(name, "")) for name in names),
                request.seed,
                trial.state.name.lower(),
                trial.value,
                trial.duration.total_seconds() if trial.duration else None,
                trial.user_attrs.get("folder"),
                trial.user_attrs.get("reason"),
            ]
            for request, trial in trials
            for settings in [sweep.settings(trial)]
        ],
        settings={
            "arguments": list(plan.recipe),
            "space": {name: vars(values) for name, values in plan.space.items()},
            "seeds": sorted({request.seed for request in wanted}),
            "sampler": plan.sampler,
            "metric": plan.metric,
            "direction": plan.direction,
            "study": plan.study,
            "storage": hidden(plan.storage),
            "commits": sorted(
                {t.user_attrs["commit"] for _, t in trials if t.user_attrs.get("commit")}
            ),
            "optuna": optuna.__version__,
        },
        draw=lambda figure: _draw(figure, sweep, labels, values),
        size=(max(7, 4 * len(names)) if searches else 7, 5),
        notes=notes,
        program=PROGRAM,
    )
    return result, bool(failed)


def _loss(sweep: Sweep, value: float | None) -> float:
    """A value of which less is better."""
    assert value is not None
    return value if sweep.plan.direction == "minimize" else -value


def _labels(names: Sequence[str]) -> list[str]:
    """The last parts of options' names, as many as tell them apart."""

    def tail(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    labels = []
    for name in names:
        lengths = range(1, name.count(".") + 2)
        free = [n for n in lengths if [tail(o, n) for o in names].count(tail(name, n)) == 1]
        labels.append(tail(name, free[0]))
    return labels


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
    star = f", star: of {most} seeds ± standard deviation" if searches and most > 1 else ""
    figure.suptitle(f"{sweep.plan.study}: {sweep.plan.metric}{star}")


def _draw_grid(axes: Axes, labels: Sequence[str], values: Mapping[Point, Sequence[float]]) -> None:
    """Along the option with the most values, a line for each combination of the others."""
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
    """All settings that were trained to the end, the one with the most seeds marked."""
    places = [point[index] for point in values]
    most = max(values, key=lambda point: len(values[point]))
    axes.scatter(places, drawable([spread(found)[0] for found in values.values()]), s=18)
    if len(values[most]) > 1:
        mean, deviation = spread(values[most])
        axes.errorbar([most[index]], [mean], [deviation], marker="*", markersize=12, capsize=3)
    axes.set_xlabel(label)

r"""Randomised linear least squares, loss and gradient in each norm (section 5.1, Figure 1).

Every recipe solves the same random problems, each problem with a matrix of its own, in five
settings: that of the article's figure (50 x 50, lr 1e-2, 5,000 steps), that of its text (10 x 10),
its earlier draft's (10 x 10, lr 1e-3, 100,000 steps), and, for nsgd, muon and neon, the article's
printed theoretical step sizes (50 x 50) and those that its Lemma 7 does give for the problems at
hand. The repetitions (--seeds) are the problems: problem i is the same at any number of them.

  python -m experiments.paper least_squares --jobs 2

Other arguments are those of fit and hold for every run, except those that tell the runs apart.
The article does not say how S is drawn: --data.target uniform draws it in another way, and
--data.target_scale 0.1 brings it ten times nearer to the start.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from experiments.paper.bounds import ALGORITHMS, PRINTED
from experiments.paper.outcome import Claim, Outcome
from experiments.paper.tuning import LR, stated_lr
from experiments.paper.verdicts import majority, signs
from lit_fanions import bounds
from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.runner import Curves, Run, execute

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "half an hour; quick: half a minute"
RECIPES = ("configs/least_squares/*.yaml",)
SMALL = "configs/least_squares_small.yaml"
QUICK = ("configs/least_squares/muon.yaml", "--trainer.max_steps=20")
STEPS = 5000  # of the article
DENSE = "--model.init_args.points_per_decade=200"  # logged, to see when a precision is reached
RESERVED = {
    "--config": "give the recipes to compare, one file each",
    "--seed_everything": "all solve the problems of seed 0; choose how many with --seeds",
    "--model.problems": "choose how many with --seeds",
    "--data.problems": "choose how many with --seeds",
    "--data.seed": "all solve the problems of seed 0; choose how many with --seeds",
    **{
        f"--{part}.{side}": "the settings compared differ in it"
        for part in ("model", "data")
        for side in ("rows", "cols")
    },
    "--model.optimizer.matrix.lr": "the settings compared differ in it",
    "--trainer.logger": "the logs are kept below --out",
    "--ckpt_path": "all start from scratch",
}
NORMS = ("spectral", "frobenius", "nuclear", "dual")
QUANTITIES = ("loss", *NORMS, *(f"best_{norm}" for norm in NORMS))
FIVE = ("nsgd", "muon", "f_muon", "neon", "f_neon")  # of the article's figure


# Recipes whose step sizes the article prints, and their names there.
THEORY = {"nsgd": "NSGD", "muon": "Muon", "neon": "Neon"}
# With the printed step sizes: enough to see whether a printed number of them is too small.
PRINTED_STEPS = 2 * max(printed.steps for printed in PRINTED.values())
Setting = Literal["article", "text", "draft", "printed", "lemma 7"]
SIZES: dict[Setting, int] = {"article": 50, "text": 10, "draft": 10, "printed": 50, "lemma 7": 50}


@dataclass(frozen=True)
class Trace:
    """A run: values by quantity, (logged steps, problems).

    Attributes:
        lr: Step size.
        steps: That were logged.
        values: By the names of ``QUANTITIES``.
        smoothness: L of each problem in the norm of the algorithm.
    """

    lr: float
    steps: Sequence[int]
    values: Mapping[str, np.ndarray]
    smoothness: np.ndarray

    def last(self, quantity: str) -> np.ndarray:
        """Of each problem, after the last step."""
        return np.asarray(self.values[quantity][-1])

    def reached(self, quantity: str, target: float | np.ndarray) -> np.ndarray:
        """The first logged step at which each problem is down to its target, infinity if none."""
        below = self.values[quantity] <= target
        first = np.asarray(self.steps, float)[below.argmax(0)]
        return np.where(below.any(0), first, np.inf)


Traces = dict[tuple[Setting, str], Trace]  # by setting and recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    runner.add_arguments(parser, RECIPES, seeds=10)


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = runner.plan(options, recipe, RESERVED, QUICK)
    problems: int = options.seeds
    metrics = _metrics(problems)
    traces: Traces = {}
    asked: list[tuple[Setting, str]] = []

    def train(lrs: Mapping[tuple[Setting, str], tuple[str, ...]]) -> None:
        asked.extend(lrs)
        given = {key: _run(key, paths[key[1]], problems, args, recipe) for key, args in lrs.items()}
        curves = execute(given.values(), options.out / "runs", metrics, options.jobs)
        for key, made in given.items():
            if made.name in curves:
                traces[key] = _trace(curves[made.name], problems, _lr(paths[key[1]], made))

    theory = [name for name in paths if name in THEORY]
    plain: dict[tuple[Setting, str], tuple[str, ...]]
    plain = {("article", name): () for name in paths}
    plain |= {("text", name): _small_as(path) for name, path in paths.items()}
    if not options.quick:
        plain |= {("printed", name): _printed(name) for name in theory}
    train(plain | {("draft", name): (f"--config={SMALL}",) for name in paths})
    train(
        {
            ("lemma 7", name): _planned(name, traces["article", name])
            for name in theory
            if ("article", name) in traces
        }
    )
    if not traces:
        raise Refused(f"every run failed: see {options.out}/runs/*/output.txt")
    outcome = _outcome(traces, problems, recipe, options)
    print(outcome)
    outcome.save(options.out, "least_squares")
    failed = len(asked) - len(traces)
    if failed:
        print(f"failed runs: {failed}; see {options.out}/runs/*/output.txt")
    return int(bool(failed))


# Runs.


def _metrics(problems: int) -> list[str]:
    names = (*QUANTITIES, "smoothness")
    return ["train/loss", *(f"problem{i}/{name}" for i in range(problems) for name in names)]


def _run(
    key: tuple[Setting, str], path: Path, problems: int, args: Iterable[str], recipe: Iterable[str]
) -> Run:
    """The training of a recipe in a setting; what tells it from others comes last and so wins."""
    size = SIZES[key[0]]
    fixed = [
        f"--{part}.init_args.{name}={value}"
        for part in ("model", "data")
        for name, value in (("problems", problems), ("rows", size), ("cols", size))
    ]
    overlay = [arg for arg in args if arg.startswith("--config")]
    own = [arg for arg in args if arg not in overlay]
    given = (f"--config={path}", *overlay, *recipe, *own, "--seed_everything=0", *fixed)
    return Run("-".join(key).replace(" ", ""), given)


def _lr(path: Path, run: Run) -> float:
    """The lr of a run: what its arguments say, else the overlay, else the recipe."""
    chosen = [arg.partition("=")[2] for arg in run.args if arg.startswith(f"{LR}=")]
    return float(chosen[0]) if chosen else stated_lr(Path(SMALL) if _small(run) else path)


def _small(run: Run) -> bool:
    return f"--config={SMALL}" in run.args


def _trace(curves: Curves, problems: int, lr: float) -> Trace:
    def values(name: str) -> np.ndarray:
        columns = [[v for _, v in curves[f"problem{i}/{name}"]] for i in range(problems)]
        return np.array(columns).T

    steps = [step for step, _ in curves["problem0/loss"]]
    return Trace(lr, steps, {name: values(name) for name in QUANTITIES}, values("smoothness")[0])


def _small_as(path: Path) -> tuple[str, ...]:
    """The draft's size, whose options depend on it, with the article's lr and steps."""
    return f"--config={SMALL}", f"{LR}={stated_lr(path):g}", f"--trainer.max_steps={STEPS}"


def _printed(name: str) -> tuple[str, ...]:
    return f"{LR}={PRINTED[THEORY[name]].lr:g}", f"--trainer.max_steps={PRINTED_STEPS}", DENSE


def _precision(name: str, setting: Setting) -> float:
    """Of the dual norm, for 1 in the spectral norm."""
    return ALGORITHMS[THEORY[name]].precision(SIZES[setting])


def _plan(name: str, trace: Trace) -> bounds.Plan:
    """What Lemma 7 gives for all problems at once: the shortest steps, the most of them."""
    precision = _precision(name, "lemma 7")
    plans = [
        bounds.plan(float(smoothness), float(gap), precision)
        for smoothness, gap in zip(trace.smoothness, trace.values["loss"][0], strict=True)
    ]
    return bounds.Plan(min(p.lr for p in plans), max(p.steps for p in plans), 0.0)


def _planned(name: str, trace: Trace) -> tuple[str, ...]:
    plan = _plan(name, trace)
    return f"{LR}={plan.lr:.6g}", f"--trainer.max_steps={plan.steps}", DENSE


# What they show.


def _outcome(
    traces: Traces, problems: int, recipe: Sequence[str], options: argparse.Namespace
) -> Outcome:
    whole: tuple[Setting, ...] = ("article", "text", "draft")
    compared = {setting: _of(traces, setting) for setting in whole if _of(traces, setting)}
    tables = [_last_table(setting, found) for setting, found in compared.items()]
    ranked = {setting: found for setting in SIZES if (found := _ranked(traces, setting))}
    leads = {setting: _leads(found) for setting, found in ranked.items()}
    if not options.quick:
        tables += [_leads_table(_title(s, ranked[s]), leads[s], problems) for s in leads]
    theory = [*_theory_rows(traces, "printed"), *_theory_rows(traces, "lemma 7")]
    if theory:
        tables.append(_theory_table(theory))
    return Outcome(
        tables=tables,
        columns=["setting", "recipe", "lr", "problem", "step", *QUANTITIES],
        rows=[
            [setting, name, trace.lr, problem, step, *numbers[i, problem].tolist()]
            for (setting, name), trace in traces.items()
            for numbers in [np.stack([trace.values[q] for q in QUANTITIES], -1)]
            for problem in range(problems)
            for i, step in enumerate(trace.steps)
        ],
        settings={"problems": problems, "seed": 0, "arguments": list(recipe)},
        draw=lambda figure: _draw(figure, traces, problems),
        size=(17, 3.6 * len({setting for setting, _ in traces} - {"printed"}) + 0.6),
        claims=[
            replace(claim, data=runner.described(claim.data, recipe))
            for claim in _claims(compared, ranked, leads, theory)
        ]
        if runner.has_claims(options)
        else [],
        notes=NOTES,
    )


def _of(traces: Traces, setting: Setting) -> dict[str, Trace]:
    return {name: trace for (s, name), trace in traces.items() if s == setting}


def _ranked(traces: Traces, setting: Setting) -> dict[str, Trace]:
    """Those that the article compares, or none if one is missing."""
    found = _of(traces, setting)
    names = tuple(THEORY) if setting in ("printed", "lemma 7") else FIVE
    return {name: found[name] for name in names} if found.keys() >= {*names} else {}


def _title(setting: Setting, found: Mapping[str, Trace]) -> str:
    size = f"{SIZES[setting]} × {SIZES[setting]}"
    lrs = {trace.lr for trace in found.values()}
    if len(lrs) > 1:
        source = {"lemma 7": "of Lemma 7", "printed": "as printed"}.get(setting, "of its own")
        return f"{size}, each with its lr {source}"
    return f"{size}, lr {lrs.pop():g}"


def _range(values: np.ndarray) -> str:
    """Median, least and largest."""
    middle, low, high = np.median(values), values.min(), values.max()
    return f"{middle:.3g} ({low:.3g} – {high:.3g})" if len(values) > 1 else f"{middle:.3g}"


def _last_table(setting: Setting, found: Mapping[str, Trace]) -> Table:
    steps = max(trace.steps[-1] for trace in found.values())
    title = f"{_title(setting, found)}, after {steps:,} steps: median (least – largest) of problems"
    shown = ("loss", *NORMS, "best_spectral")
    order = sorted(found, key=lambda name: float(np.median(found[name].last("loss"))))
    cells = [[name, *(_range(found[name].last(q)) for q in shown)] for name in order]
    return Table(title, ["recipe", *(q.replace("_", " ") for q in shown)], cells)


# Who leads, reading by reading: {reading: {recipe: values, one a problem}}.


def _readings(found: Mapping[str, Trace]) -> dict[str, dict[str, np.ndarray]]:
    def each(value: Callable[[Trace], np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value(trace) for name, trace in found.items()}

    def last(quantity: str) -> dict[str, np.ndarray]:
        return each(lambda trace: trace.last(quantity))

    readings = {f"{norm} norm, last": last(norm) for norm in NORMS}
    readings |= {f"{norm} norm, smallest so far": last(f"best_{norm}") for norm in NORMS}
    for norm in NORMS[:-1]:
        for step in (10, 100, 1000):
            at = {
                n: t.values[norm][t.steps.index(step)] for n, t in found.items() if step in t.steps
            }
            if len(at) == len(found):
                readings[f"{norm} norm, step {step:,}"] = at
    # Where all have got to.
    loss = np.max([trace.values["loss"].min(0) for trace in found.values()], axis=0)
    for norm in NORMS[:-1]:
        readings[f"{norm} norm, at equal loss"] = each(
            lambda trace, norm=norm: _at_loss(trace, norm, loss)  # type: ignore[misc]
        )
    return {name.replace("dual norm", "own dual norm"): found for name, found in readings.items()}


def _at_loss(trace: Trace, quantity: str, losses: np.ndarray) -> np.ndarray:
    """A quantity where the loss of each problem first is down to a value, interpolated."""
    found = []
    with np.errstate(all="ignore"):  # what has diverged, or is 0, has no logarithm
        curves, values = np.log(trace.values["loss"]), np.log(trace.values[quantity])
        for problem, loss in enumerate(np.log(losses)):
            after = max(1, int((curves[:, problem] <= loss).argmax()))
            start, end = curves[after - 1 : after + 1, problem]
            part = (start - loss) / (start - end)
            low, high = values[after - 1 : after + 1, problem]
            found.append(np.exp(low + part * (high - low)))
    return np.array(found)


def _leads(found: Mapping[str, Trace]) -> dict[str, dict[str, int]]:
    """In how many problems each is first, by reading."""
    return {reading: _firsts(values) for reading, values in _readings(found).items()}


def _firsts(values: Mapping[str, np.ndarray]) -> dict[str, int]:
    order = np.argsort(np.stack([*values.values()]), axis=0)[0]
    return {name: int((order == i).sum()) for i, name in enumerate(values)}


def _leads_table(title: str, leads: Mapping[str, Mapping[str, int]], problems: int) -> Table:
    names = list(next(iter(leads.values())))
    cells = [[reading, *counts.values()] for reading, counts in leads.items()]
    title = f"{title}: in how many of {problems} problems each has the smallest gradient"
    return Table(title, ["reading", *names], cells)


# Theory.


class Promise(NamedTuple):
    """A number of steps and what became of it.

    Attributes:
        name: Recipe.
        source: Who promises.
        lr: The step size.
        smoothness: L that it was computed from, of each problem or printed.
        precision: Of the dual norm.
        promised: Iterations.
        needed: Of each problem, for that precision; infinity: not reached.
        spectral: Of each problem, for 1 in the spectral norm.
        last: The last step that was tried.
    """

    name: str
    source: Setting
    lr: float
    smoothness: np.ndarray
    precision: float
    promised: int
    needed: np.ndarray
    spectral: np.ndarray
    last: int

    def off(self) -> int | None:
        """In how many problems the promise is off by more than a factor of 2.

        None if some needed more than what was tried, and that does not tell.
        """
        if self.last < 2 * self.promised and not np.isfinite(self.needed).all():
            return None
        factor = self.promised / np.maximum(self.needed, 1)
        return int(((factor < 0.5) | (factor > 2)).sum())


def _theory_rows(traces: Traces, source: Setting) -> list[Promise]:
    promises = []
    for name, trace in _of(traces, source).items():
        precision = _precision(name, source)
        printed = PRINTED[THEORY[name]] if source == "printed" else None
        promises.append(
            Promise(
                name,
                source,
                trace.lr,
                np.array([printed.smoothness]) if printed else trace.smoothness,
                precision,
                printed.steps if printed else _plan(name, trace).steps,
                trace.reached("best_dual", precision),
                trace.reached("best_spectral", 1.0),
                trace.steps[-1],
            )
        )
    return promises


def _theory_table(promises: Sequence[Promise]) -> Table:
    columns = ["recipe", "theory", "L", "lr", "precision", "promised", "needed", "for spectral 1"]
    cells = [
        [
            p.name,
            p.source,
            _range(p.smoothness),
            f"{p.lr:.3g}",
            f"{p.precision:.3g}",
            f"{p.promised:,}",
            _steps(p.needed, p.last),
            _steps(p.spectral, p.last),
        ]
        for p in promises
    ]
    title = "50 × 50: iterations until the dual norm of the gradient is down to the precision"
    return Table(title, columns, cells)


def _steps(needed: np.ndarray, last: int) -> str:
    """Median, least and largest number of steps."""

    def one(value: float) -> str:
        return f"{value:,.0f}" if math.isfinite(value) else f"> {last:,}"

    middle, low, high = (float(f(needed)) for f in (np.median, np.min, np.max))
    return one(middle) if low == high else f"{one(middle)} ({one(low)} – {one(high)})"


# Claims.

SIGNS = "sign tests over the problems say so at 5 %, refuted if they say the opposite."


def _claims(
    compared: Mapping[Setting, Mapping[str, Trace]],
    ranked: Mapping[Setting, Mapping[str, Trace]],
    leads: Mapping[Setting, Mapping[str, Mapping[str, int]]],
    promises: Sequence[Promise],
) -> list[Claim]:
    claims = []
    for setting, found in ranked.items():
        if setting not in compared:
            continue  # each goes as far as theory says, not all equally far
        claims += [_worst_in_loss(setting, found), _leader(setting, found, leads[setting])]
    claims += [
        _robust(setting, found["f_muon"], found["muon"])
        for setting, found in compared.items()
        if {"muon", "f_muon"} <= found.keys()
    ]
    if {p.name for p in promises if p.source == "printed"} == set(THEORY):
        claims.append(_unrelated(promises))
    return claims


def _data(setting: Setting, found: Mapping[str, Trace]) -> str:
    steps = sorted({trace.steps[-1] for trace in found.values()})
    return f"random least squares, {_title(setting, found)}, {_listed(steps)} steps"


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps)


def _worst_in_loss(setting: Setting, found: Mapping[str, Trace]) -> Claim:
    losses = {name: -trace.last("loss") for name, trace in found.items()}
    n = len(losses["neon"])
    count = _firsts(losses)["neon"]
    listed = ", ".join(f"{name} {_range(-values)}" for name, values in losses.items())
    return Claim(
        "neon-loss",
        signs([count], n),
        f"largest loss of the {len(found)} in {count} of {n} problems; "
        f"median (least – largest): {listed}",
        _data(setting, found),
        n,
        f"Confirmed if {SIGNS}",
    )


def _leader(
    setting: Setting, found: Mapping[str, Trace], leads: Mapping[str, Mapping[str, int]]
) -> Claim:
    n = len(found["neon"].smoothness)
    counts = {reading: firsts["neon"] for reading, firsts in leads.items()}
    plain = [r for r in counts if ("last" in r or "so far" in r) and not r.startswith("own")]
    holding = [f"{r} ({count} of {n})" for r, count in counts.items() if majority(count, n)]
    return Claim(
        "neon-gradient",
        signs([counts[reading] for reading in plain], n, any),
        f"smallest of the {len(found)} in so many of {n} problems: "
        + "; ".join(f"{reading}: {counts[reading]}" for reading in plain),
        _data(setting, found),
        n,
        "Confirmed if it is first in one of the three norms, after the last step or in the "
        f"smallest so far: if {SIGNS} Of all readings tried it holds under: "
        f"{'; '.join(holding) or 'none'}.",
    )


def _robust(setting: Setting, f_muon: Trace, muon: Trace) -> Claim:
    n = len(muon.smoothness)
    counts = {q: int((f_muon.last(q) < muon.last(q)).sum()) for q in QUANTITIES[:4]}
    ratio = f_muon.last("loss") / muon.last("loss")
    ours, theirs = (t.reached("loss", 0.01 * t.values["loss"][0]) for t in (f_muon, muon))
    both = bool(np.isfinite([ours, theirs]).all())
    slower = _range(ours / theirs) if both else "not reached"
    return Claim(
        "f-muon-robust",
        signs(counts.values(), n),
        f"smaller than Muon's after the last step in so many of {n} problems: "
        + ", ".join(f"{name} {count}" for name, count in counts.items())
        + f"; loss over Muon's: {_range(ratio)}; steps to a hundredth of the first loss, over "
        f"Muon's: {slower}",
        _data(setting, {"muon": muon, "f_muon": f_muon}),
        n,
        f"Confirmed if loss, spectral, Frobenius and nuclear norm are all smaller: if {SIGNS} What "
        "is compared is the cycle that steps of one length end in: F-Muon's steps are shorter, so "
        "its cycle is smaller and the way there longer. As that loss goes with lr squared, Muon "
        f"with {np.median(ratio**0.5):.2f} of its lr would have F-Muon's, and take "
        f"{np.median(ratio**-0.5):.2f} times the steps.",
    )


def _unrelated(promises: Sequence[Promise]) -> Claim:
    n = max(len(p.needed) for p in promises)

    printed = [off for p in promises if p.source == "printed" and (off := p.off()) is not None]
    found = "; ".join(
        f"{p.name}, {p.source}: lr {p.lr:.3g}, {p.promised:,} iterations, needed "
        f"{_steps(p.needed, p.last)}"
        for p in promises
    )
    right = [
        p.name
        for p in promises
        if p.source == "lemma 7" and (off := p.off()) is not None and majority(n - off, n)
    ]
    return Claim(
        "theory-practice",
        signs(printed, n) if len(printed) == len(THEORY) else "not testable here",
        found,
        "random least squares, 50 × 50",
        n,
        "Confirmed if the printed number of iterations is more than twice or less than half of "
        f"what the printed lr needs, for each of the three: if {SIGNS} Within a factor of 2 with "
        "the lr and iterations that Lemma 7 does give, by the same test: "
        f"{', '.join(right) or 'none'}.",
    )


NOTES = (
    "Steps of one length do not converge: they end in a cycle around the solution whose size is "
    "proportional to lr, and its loss to lr². After the bend the curves show this cycle, not a "
    "speed; a smaller or falling lr would lower every one of them.",
    "own dual: the dual of the norm in whose ball the algorithm steps, which theory bounds: "
    "spectral for neon, Frobenius for nsgd, nuclear for muon.",
)

# The picture.

LABELS = {
    "loss": "loss",
    "spectral": "gradient, spectral norm",
    "frobenius": "gradient, Frobenius norm",
    "nuclear": "gradient, nuclear norm",
}


def _draw(figure: Figure, traces: Traces, problems: int) -> None:
    """A row of panels for each setting."""
    settings: list[Setting] = [s for s in ("article", "text", "draft", "lemma 7") if _of(traces, s)]
    axes = figure.subplots(len(settings), len(LABELS), squeeze=False)
    others = sorted({name for _, name in traces} - {*FIVE})
    styles: dict[str, dict[str, Any]]
    styles = {name: {"color": f"C{i}"} for i, name in enumerate((*FIVE, *others))}
    styles |= {name: {**styles[name], "linestyle": "--"} for name in others}
    for row, setting in zip(axes, settings, strict=True):
        found = _of(traces, setting)
        last = max(trace.steps[-1] for trace in found.values())
        for axis, (quantity, label) in zip(row, LABELS.items(), strict=True):
            for name in sorted(found, key=list(styles).index):
                _curve(axis, found[name], quantity, {**styles[name], "label": name})
            axis.set(xscale="log", yscale="log", xlabel="iterations", title=label)
            axis.set_xlim(left=max(1, last / 1000))  # before that, hardly anything happens
        row[0].set_ylabel(_title(setting, found))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    band = f"median of {problems} problems\nband: all of them" if problems > 1 else "one problem"
    figure.legend(
        handles, labels, title=f"{band}\ndotted: smallest so far\n", loc="outside right upper"
    )


def _curve(axis: Axes, trace: Trace, quantity: str, style: Mapping[str, Any]) -> None:
    # Step 0 is on no logarithmic axis, and what has diverged on none.
    steps, values = trace.steps[1:], np.nan_to_num(trace.values[quantity][1:], posinf=np.nan)
    axis.plot(steps, np.median(values, axis=1), linewidth=1.4, **style)
    low, high = values.min(1), values.max(1)
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    best = trace.values.get(f"best_{quantity}")
    if best is not None:
        dots = {**style, "linestyle": ":", "label": None}
        axis.plot(steps, np.median(best[1:], axis=1), linewidth=1.2, **dots)

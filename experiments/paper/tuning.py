"""The recipes of a comparison, each at its own best learning rate.

What the commands that compare recipes in this way share. Every recipe is trained at several
learning rates of its matrices, multiples of the one that it states, with seed 0; while the best is
the smallest or the largest one, the next beyond is tried too, up to three times: a best that is
still the last one is marked. At the best, it is trained with more seeds. Seed 0 is one of them, so
that it both chooses and counts: a small bias in favour of every recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from experiments.paper.outcome import Claim, Outcome
from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.results import drawable, logarithmic
from lit_fanions.cli.runner import Curve, Curves, Run, execute, mean_curve, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LR = "--model.init_args.optimizer.matrix.lr"
BIAS = "Seed 0 also chose the lr: a small bias in favour of every recipe."
NO_BEST = "A training failed, or a better lr may lie beyond the last one tried."
Key = tuple[str, float, int]  # recipe, lr, seed
Results = dict[Key, Curves]
Losses = dict[Key, Curve]
FACTORS, QUICK_FACTORS = (0.5, 1.0, 2.0), (1.0, 2.0)  # of the recipe's lr
_QUICK = 2  # as many variants are enough to see that it works
EXTENSIONS = 3  # of the range of learning rates, each by one more
RESERVED = {
    "--config": "give the recipes to compare, one file each",
    "--seed_everything": "choose how many with --seeds",
    "--model.optimizer.matrix.lr": "choose multiples of the recipe's with --factors",
    "--trainer.logger": "the logs are kept below --out",
    "--ckpt_path": "all start from scratch",
}


@dataclass(frozen=True)
class Variant:
    """One of those compared.

    Args:
        path: Its recipe.
        lr: To begin with, of its matrices.
        args: Further arguments of fit.
    """

    path: Path
    lr: float
    args: tuple[str, ...] = ()


Variants = Callable[[Mapping[str, Path]], dict[str, Variant]]
Finals = Mapping[str, Mapping[int, float]]  # the last values by name and seed


def as_stated(paths: Mapping[str, Path]) -> dict[str, Variant]:
    """Recipes as they are, beginning with the lr that they state."""
    return {name: Variant(path, stated_lr(path)) for name, path in paths.items()}


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        name: Of the command.
        metrics: Scalars of the logs; the last value of the first is to be small.
        recipes: Patterns of the files that are trained if none is given.
        quick: What --quick trains, see ``runner.plan``.
        seeds: Their default number.
        data: On what they are trained, in words.
        logarithmic: Whether metrics are shown on logarithmic axes.
        variants: What is made of the recipes.
        claims: What the last values of the first metric say about the paper's claims; is not given
            those of which a better lr may lie beyond the last one tried, and is told the data.
        draw: Draws the last values, if not curves and learning rates.
    """

    name: str
    metrics: Sequence[str]
    recipes: Sequence[str]
    quick: Sequence[str]
    seeds: int
    data: str = ""
    logarithmic: bool = False
    variants: Variants = as_stated
    claims: Callable[[Finals, str], Sequence[Claim]] = lambda finals, data: ()
    draw: Callable[[Figure, Finals], None] | None = None


def add_arguments(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """Add the options of such a command; all others are those of fit."""
    runner.add_arguments(parser, comparison.recipes, comparison.seeds)
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        help="learning rates to try, as multiples of the recipe's; two or more different ones "
        f"(default: {_listed(FACTORS)}, with --quick {_listed(QUICK_FACTORS)})",
    )


def run(options: argparse.Namespace, recipe: Sequence[str], comparison: Comparison) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.
        comparison: What is compared.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = runner.plan(options, recipe, RESERVED, comparison.quick)
    variants = comparison.variants(paths)
    if options.quick:
        variants = dict(list(variants.items())[:_QUICK])
    factors = QUICK_FACTORS if options.quick else FACTORS
    grid = _grid(variants, options.factors or factors)
    done: Results = {}
    failed: set[Key] = set()

    def losses() -> Losses:
        return {key: curves[comparison.metrics[0]] for key, curves in done.items()}

    def train(keys: Set[Key]) -> None:
        asked = {key: _run(key, variants, recipe) for key in sorted(keys - done.keys() - failed)}
        folder, metrics = options.out / "runs", comparison.metrics
        curves = execute(asked.values(), folder, metrics, options.jobs)
        done.update({key: curves[run.name] for key, run in asked.items() if run.name in curves})
        failed.update(asked.keys() - done.keys())

    for _ in range(1 if options.quick else EXTENSIONS + 1):
        train({(name, lr, 0) for name, lrs in grid.items() for lr in lrs})
        grid = {name: _extended(lrs, _best_lr(name, losses())) for name, lrs in grid.items()}
    best = {name: lr for name in grid if (lr := _best_lr(name, losses())) is not None}
    train({(name, lr, seed) for name, lr in best.items() for seed in range(options.seeds)})
    if not best:
        raise Refused(f"every run failed: see {options.out}/runs/*/output.txt")
    outcome = _outcome(done, best, variants, list(recipe), comparison)
    if not runner.has_claims(options):
        outcome = dataclasses.replace(outcome, claims=())
    print(outcome)
    outcome.save(options.out, comparison.name)
    if failed:
        print(f"failed runs: {len(failed)}; see {options.out}/runs/*/output.txt")
    return int(bool(failed))


def _grid(variants: Mapping[str, Variant], factors: Sequence[float]) -> dict[str, list[float]]:
    """The learning rates to begin with, by name.

    Raises:
        Refused: If the factors make fewer than two.
    """
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise Refused(f"--factors: give positive numbers, not {_listed(factors)}")
    grid = {}
    for name, variant in variants.items():
        grid[name] = sorted({_rounded(variant.lr * factor) for factor in factors})
        if len(grid[name]) < 2:
            raise Refused(f"--factors: give two or more different ones, not {_listed(factors)}")
    return grid


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def stated_lr(path: Path) -> float:
    """The lr of the matrices that a recipe states.

    Raises:
        Refused: If it states none.
    """
    try:
        content = yaml.safe_load(path.read_text())
        lr = float(content["model"]["init_args"]["optimizer"]["matrix"]["lr"])
    except OSError as error:
        raise Refused(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise Refused(f"--config: {path} states no model.init_args.optimizer.matrix.lr") from None
    if not (math.isfinite(lr) and lr > 0):
        raise Refused(f"--config: {path} states the lr {lr:g}: it must be positive")
    return lr


def _rounded(lr: float) -> float:
    """An lr as it is passed on and named, so that different ones have different names."""
    return float(f"{lr:g}")


def _run(key: Key, variants: Mapping[str, Variant], recipe: Sequence[str]) -> Run:
    """The training of a variant; what tells it from others comes last and so wins."""
    name, lr, seed = key
    own = (*variants[name].args, f"--seed_everything={seed}", f"{LR}={lr:g}")
    return Run(f"{name}-lr{lr:g}-seed{seed}", (f"--config={variants[name].path}", *recipe, *own))


def _extended(lrs: Sequence[float], best: float | None) -> list[float]:
    """Ascending learning rates, with one more beyond the best if that is the first or last."""
    if best == lrs[0]:
        return [_rounded(lrs[0] ** 2 / lrs[1]), *lrs]
    if best == lrs[-1]:
        return [*lrs, _rounded(lrs[-1] ** 2 / lrs[-2])]
    return list(lrs)


def _tried(name: str, done: Losses) -> dict[float, float]:
    """Final losses of seed 0 by lr, ascending."""
    losses = {lr: curve[-1][1] for (n, lr, seed), curve in done.items() if n == name and seed == 0}
    return dict(sorted(losses.items()))


def _best_lr(name: str, done: Losses) -> float | None:
    """The lr of the lowest loss; of equals, as where all diverged, the smallest."""
    losses = _tried(name, done)
    return min(losses, key=lambda lr: losses[lr]) if losses else None


def _at_edge(lr: float, tried: Mapping[float, float]) -> bool:
    """Whether nothing was tried (or nothing succeeded) on one side of an lr."""
    return lr in (min(tried), max(tried))


def _outcome(
    done: Results,
    best: Mapping[str, float],
    variants: Mapping[str, Variant],
    recipe: Sequence[str],
    comparison: Comparison,
) -> Outcome:
    metric, *others = comparison.metrics
    chosen = {
        name: [
            curves for (n, lr, _), curves in sorted(done.items()) if (n, lr) == (name, best[name])
        ]
        for name in best
    }
    lasts = {
        name: {
            s: curves[metric][-1][1]
            for (n, x, s), curves in sorted(done.items())
            if (n, x) == (name, lr)
        }
        for name, lr in best.items()
    }
    finals = {name: spread([*values.values()]) for name, values in lasts.items()}
    order = sorted(best, key=lambda name: finals[name])
    losses = {key: curves[metric] for key, curves in done.items()}
    tried = {name: _tried(name, losses) for name in order}
    edge = [name for name in order if _at_edge(best[name], tried[name])]
    small = "{:.3g} ± {:.2g}"
    cells = [
        [
            name,
            f"{best[name]:g}" + " (at the edge)" * (name in edge),
            _final(chosen[name], metric, small if comparison.logarithmic else "{:.4f} ± {:.4f}"),
            *(_final(chosen[name], other, small) for other in others),
            len(chosen[name]),
            "  ".join(
                f"{lr:g}: " + (f"{loss:.3g}" if comparison.logarithmic else f"{loss:.4f}")
                for lr, loss in tried[name].items()
            ),
        ]
        for name in order
    ]
    title = f"{metric}: mean ± standard deviation over the seeds. {BIAS}"
    columns = ["recipe", "lr", *comparison.metrics, "seeds", "by lr, seed 0"]
    notes = ["at the edge: no lr beyond it was tried with success; a better one may lie there"]
    return Outcome(
        tables=[Table(title, columns, cells)],
        columns=["recipe", "lr", "seed", "step", *comparison.metrics],
        rows=[
            [name, lr, seed, step, *(dict(curves[m]).get(step, math.nan) for m in curves)]
            for (name, lr, seed), curves in sorted(done.items())
            for step, _ in curves[metric]
        ],
        settings={
            "recipes": {name: str(variants[name].path) for name in order},
            "variants": {name: variants[name].args for name in order},
            "arguments": recipe,
            "seeds": sorted({seed for *_, seed in done}),
            "best_lr": best,
            "best_lr_at_the_edge": edge,
        },
        draw=lambda figure: (
            _draw(figure, {name: chosen[name] for name in order}, finals, tried, comparison)
            if comparison.draw is None
            else comparison.draw(figure, lasts)
        ),
        size=(5 + 4 * (1 + len(others) if others else 2), 5) if comparison.draw is None else (7, 5),
        claims=comparison.claims(
            {name: lasts[name] for name in lasts if name not in edge},
            runner.described(comparison.data, recipe),
        ),
        notes=notes if edge else [],
    )


def _final(found: Sequence[Curves], metric: str, form: str) -> str:
    """Mean and standard deviation of the last values, or how many diverged."""
    last = [curves[metric][-1][1] for curves in found]
    diverged = sum(not math.isfinite(loss) for loss in last)
    return f"diverged: {diverged} of {len(last)}" if diverged else form.format(*spread(last))


def _draw(
    figure: Figure,
    chosen: Mapping[str, Sequence[Curves]],
    finals: Mapping[str, tuple[float, float]],
    tried: Mapping[str, Mapping[float, float]],
    comparison: Comparison,
) -> None:
    """Curves at the best learning rates, and the last losses at all of them."""
    metric, *others = comparison.metrics
    columns = [metric, "lr", *others]
    axes = dict(zip(columns, figure.subplots(1, len(columns), squeeze=False)[0], strict=True))
    axes["lr"].sharey(axes[metric])
    suffix = "_cpu" if all(name.endswith("_cpu") for name in chosen) else ""
    form = "{:.3g}" if comparison.logarithmic else "{:.3f}"
    colors = {name: f"C{i}" for i, name in enumerate(chosen)}
    for name, found in chosen.items():
        label = f"{name.removesuffix(suffix)}  {_final(found, metric, form)}"
        for shown in comparison.metrics:
            _curve(axes[shown], [curves[shown] for curves in found], colors[name], label)
        losses = drawable(list(tried[name].values()))
        axes["lr"].plot(list(tried[name]), losses, marker="o", color=colors[name])
    seeds = max(map(len, chosen.values()))
    title = f"{seeds} seeds:\nmean ± standard deviation" if seeds > 1 else "seed 0"
    axes[metric].set(xlabel="optimizer step", ylabel=metric, title=f"at the best lr, {title}")
    axes["lr"].set(xlabel="lr of the matrices", title="after the last step, seed 0")
    logarithmic(axes["lr"])
    for other in others:
        axes[other].set(xlabel="optimizer step", title=f"{other}, at the best lr")
    means = [mean for mean, _ in finals.values() if math.isfinite(mean)]
    if comparison.logarithmic:
        for axis in axes.values():
            axis.set_yscale("log")
    elif means:
        margin = 0.1 * (max(means) - min(means)) + 0.01
        # Not to where curves begin or what diverges, but with all that the picture is about.
        tops = [loss for losses in tried.values() for loss in losses.values()]
        tops = [loss for loss in tops if math.isfinite(loss)] if len(finals) == 1 else []
        axes[metric].set_ylim(min(means) - margin, max([*means, *tops]) + 4 * margin)
    handles, labels = axes[metric].get_legend_handles_labels()
    figure.legend(handles, labels, title=f"recipe, last {metric}", loc="outside right upper")


def _curve(axis: Axes, curves: Sequence[Curve], color: str, label: str) -> None:
    steps, means, deviations = mean_curve(curves)
    marker = "." if len(steps) < 3 else ""
    axis.plot(steps, drawable(means), marker=marker, color=color, label=label)
    axis.locator_params(axis="x", integer=True)
    low = drawable([m - d for m, d in zip(means, deviations, strict=True)])
    high = drawable([m + d for m, d in zip(means, deviations, strict=True)])
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)

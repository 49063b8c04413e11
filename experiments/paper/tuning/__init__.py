"""Recipes compared at their own best learning rates: what several commands share.

Every recipe is trained with seed 0 at seven learning rates of its matrices, from 1/64 to 64 times
the one that it states: a narrow grid stops in a local optimum. While the best is the smallest or
the largest one tried, the next one beyond is tried too, up to six times; a best that is still at
the edge is marked. Then the geometric means of the best and its neighbours are tried, three times,
so that neighbours differ by 20 %. At the best learning rate it is trained with more seeds. Seed 0
is one of them, so that it both chooses and counts: a small bias in favour of every recipe.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence, Set

from experiments.paper import repetitions
from experiments.paper.execution import execute
from experiments.paper.tuning import report
from experiments.paper.tuning.comparison import (
    LR,
    NO_BEST,
    Comparison,
    Finals,
    Key,
    Results,
    Variant,
    best_lr,
    stated_lr,
)
from lit_fanions.cli.console import Refused
from lit_fanions.cli.runner import Run

__all__ = [
    "LR",
    "NO_BEST",
    "Comparison",
    "Finals",
    "Variant",
    "add_arguments",
    "run",
    "stated_lr",
]

FACTORS = tuple(4.0**n for n in range(-3, 4))  # multiples of the recipe's lr
QUICK_FACTORS = (1.0, 2.0)
REFINEMENTS = 3  # how often the range around the best lr is halved, on a logarithmic scale
QUICK_VARIANTS = 2  # number of variants with --quick
EXTENSIONS = 6  # how often the range of learning rates is extended by one
RESERVED = {
    "--config": "give the recipes to compare, one file each",
    "--seed_everything": "use --seeds N",
    "--model.optimizer.matrix.lr": "use --factors for multiples of the recipe's lr",
    "--trainer.logger": "the logs are kept below --out",
    "--ckpt_path": "all start from scratch",
}


def add_arguments(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """Add the options of such a command; all others are those of fit."""
    repetitions.add_arguments(parser, comparison.recipes, comparison.seeds)
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        help="learning rates to try, as multiples of the recipe's, at least two different ones "
        f"(default: {_join(FACTORS)}, with --quick {_join(QUICK_FACTORS)})",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="variants to train, by name (default: all)"
    )
    parser.add_argument(
        "--refinements",
        type=int,
        help="how often the means of the best lr and its neighbours are tried (default: "
        f"{REFINEMENTS}, with --quick 0)",
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
    paths, recipe = repetitions.plan(options, recipe, RESERVED, comparison.quick)
    variants = _selected(comparison.make_variants(paths), options.only)
    if options.quick:
        variants = dict(list(variants.items())[:QUICK_VARIANTS])
    if options.refinements is None:
        options.refinements = 0 if options.quick else REFINEMENTS
    if options.refinements < 0:
        raise Refused(f"--refinements: give 0 or more, not {options.refinements}")
    grid = _first_grid(variants, options.factors or (QUICK_FACTORS if options.quick else FACTORS))
    metric = comparison.metrics[0]
    results: Results = {}
    failed: set[Key] = set()

    def train(keys: Set[Key]) -> None:
        missing = sorted(keys - results.keys() - failed)
        runs = {key: _run(key, variants, recipe) for key in missing}
        folder = options.out / "runs"
        curves = execute(runs.values(), folder, comparison.metrics, options.jobs)
        results.update({key: curves[run.name] for key, run in runs.items() if run.name in curves})
        failed.update(runs.keys() - results.keys())

    for _ in range(1 if options.quick else EXTENSIONS + 1):
        train({(name, lr, 0) for name, lrs in grid.items() for lr in lrs})
        grid = {name: _extend(lrs, best_lr(name, results, metric)) for name, lrs in grid.items()}
    for _ in range(options.refinements):
        grid = {name: _refine(lrs, best_lr(name, results, metric)) for name, lrs in grid.items()}
        train({(name, lr, 0) for name, lrs in grid.items() for lr in lrs})
    best = {name: lr for name in grid if (lr := best_lr(name, results, metric)) is not None}
    train({(name, lr, seed) for name, lr in best.items() for seed in range(options.seeds)})
    if not best:
        raise Refused(f"every run failed: see {options.out}/runs/*/output.txt")
    outcome = report.make_outcome(results, best, variants, list(recipe), comparison, options)
    print(outcome)
    outcome.save(options.out, comparison.name)
    if failed:
        print(f"failed runs: {len(failed)}; see {options.out}/runs/*/output.txt")
    return int(bool(failed))


def _selected(variants: dict[str, Variant], only: Sequence[str] | None) -> dict[str, Variant]:
    """Return the variants that the option names, in the order of the table.

    Raises:
        Refused: If there is no variant of a name.
    """
    for name in only or ():
        if name not in variants:
            raise Refused(f"--only: no variant {name}; give some of {', '.join(variants)}")
    return {name: variant for name, variant in variants.items() if not only or name in only}


def _first_grid(
    variants: Mapping[str, Variant], factors: Sequence[float]
) -> dict[str, list[float]]:
    """Return the learning rates to begin with, ascending, by name.

    Raises:
        Refused: If the factors give fewer than two learning rates.
    """
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise Refused(f"--factors: give positive numbers, not {_join(factors)}")
    grid = {}
    for name, variant in variants.items():
        grid[name] = sorted({_round(variant.lr * factor) for factor in factors})
        if len(grid[name]) < 2:
            raise Refused(f"--factors: give two or more different ones, not {_join(factors)}")
    return grid


def _extend(lrs: Sequence[float], best: float | None) -> list[float]:
    """Return ascending learning rates, with one more beyond the best if that is at the edge."""
    if best == lrs[0]:
        return [_round(lrs[0] ** 2 / lrs[1]), *lrs]
    if best == lrs[-1]:
        return [*lrs, _round(lrs[-1] ** 2 / lrs[-2])]
    return list(lrs)


def _refine(lrs: Sequence[float], best: float | None) -> list[float]:
    """Return ascending learning rates, with the geometric means of the best and its neighbours."""
    means = [_round((x * y) ** 0.5) for x, y in itertools.pairwise(lrs) if best in (x, y)]
    return sorted({*lrs, *means})


def _round(lr: float) -> float:
    """Round an lr to the digits by which runs are named, so that different ones differ in name."""
    return float(f"{lr:g}")


def _run(key: Key, variants: Mapping[str, Variant], recipe: Sequence[str]) -> Run:
    """Return the training of a variant; its own arguments come last, to win."""
    name, lr, seed = key
    own = (*variants[name].args, f"--seed_everything={seed}", f"{LR}={lr:g}")
    return Run(f"{name}-lr{lr:g}-seed{seed}", (f"--config={variants[name].path}", *recipe, *own))


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)

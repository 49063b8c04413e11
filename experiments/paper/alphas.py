"""Recipes over alpha: what the commands of Figure 2 and of section 5.3 share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper import repetitions
from experiments.paper.outcome import Claim, Outcome
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.curves import spread
from lit_fanions.cli.results import drawable, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA = "--model.init_args.optimizer.matrix.alpha"
RESERVED = {
    "--config": "give the recipes, one file each",
    "--seed_everything": "use --seeds N",
    "--model.optimizer.matrix.alpha": "use --alphas",
    "--trainer.logger": "the logs are kept below --out",
    "--ckpt_path": "all start from scratch",
}

Values = dict[float, dict[int, float]]  # alpha -> seed -> last value of the metric


@dataclass(frozen=True)
class Study:
    """What a command trains and concludes.

    Args:
        name: Name of the command.
        metric: Scalar in the logs whose last value counts.
        recipes: Recipes that are trained by default.
        full_recipes: Recipes that --full trains.
        quick: What --quick trains, see ``repetitions.plan``.
        alphas: Values of alpha by default.
        quick_alphas: Values of alpha with --quick.
        data: The data of the recipes, in words.
        full_data: The data with --full, in words.
        judge: Returns verdicts on the paper's claims, given the values by recipe, the data in words
            and whether --full was given.
        note: Line below the table.
        overlay: Recipe laid over the others, unless --full or --quick is given.
    """

    name: str
    metric: str
    recipes: Sequence[str]
    full_recipes: Sequence[str]
    quick: Sequence[str]
    alphas: Sequence[float]
    quick_alphas: Sequence[float]
    data: str
    full_data: str
    judge: Callable[[Mapping[str, Values], str, bool], list[Claim]]
    note: str
    overlay: str = ""


def add_arguments(parser: argparse.ArgumentParser, study: Study) -> None:
    """Add the options of such a command; all others are those of fit."""
    repetitions.add_arguments(parser, study.recipes, seeds=3, full=study.full_recipes)
    defaults = " ".join(f"{alpha:g}" for alpha in study.alphas)
    parser.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        metavar="ALPHA",
        help=f"values of alpha to try (default: {defaults})",
    )


def run(options: argparse.Namespace, recipe: Sequence[str], study: Study) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.
        study: What is trained and concluded.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = repetitions.plan(options, recipe, RESERVED, study.quick)
    overlay = "" if options.full or options.quick else study.overlay
    data = study.full_data if options.full else study.data
    data = repetitions.describe_data(data, [Path(overlay).name] if overlay else [], recipe)
    if overlay:
        recipe = [f"--config={overlay}", *recipe]
    if options.alphas is None:
        options.alphas = study.quick_alphas if options.quick else study.alphas
    values = _train(options, paths, recipe, study.metric)
    claims = study.judge(values, data, options.full) if repetitions.has_claims(options) else []
    settings = {
        "recipes": {name: str(path) for name, path in paths.items()},
        "arguments": list(recipe),
        "alphas": sorted({alpha for own in values.values() for alpha in own}),
        "seeds": list(range(options.seeds)),
    }
    outcome = Outcome(
        tables=[_means_table(values, study.metric)],
        columns=["recipe", "alpha", "seed", study.metric],
        rows=[
            [name, alpha, seed, value]
            for name, own in values.items()
            for alpha, seeds in own.items()
            for seed, value in seeds.items()
        ],
        settings=settings,
        draw=lambda figure: _draw(figure, values, study.metric),
        size=(6.5 * len(values), 5),
        claims=claims,
        notes=[study.note],
        arguments=options.arguments,
    )
    print(outcome)
    outcome.save(options.out, study.name)
    trained = sum(len(seeds) for own in values.values() for seeds in own.values())
    return int(trained < len(values) * len(set(options.alphas)) * options.seeds)


def _train(
    options: argparse.Namespace, paths: Mapping[str, Path], recipe: Sequence[str], metric: str
) -> dict[str, Values]:
    """Train recipes with every alpha and seed, and return the last values by recipe.

    Raises:
        Refused: If an alpha is not finite, or every run failed.
    """
    if not all(map(math.isfinite, options.alphas)):
        raise Refused("--alphas: give finite numbers")
    variants = {
        (name, alpha): (f"--config={path}", *recipe, f"{ALPHA}={alpha!r}")
        # As floats: runs are remembered by their arguments, and those are "1.0", not "1".
        for alpha in sorted(set(map(float, options.alphas)))
        for name, path in paths.items()
    }
    names = {key: f"{key[0]}-alpha{key[1]:g}" for key in variants}
    curves = repetitions.train_with_seeds(
        {names[key]: args for key, args in variants.items()}, options, metric
    )
    values: dict[str, Values] = {name: {} for name in paths}
    for (name, alpha), variant in names.items():
        if curves[variant]:
            values[name][alpha] = {seed: curve[-1][1] for seed, curve in curves[variant].items()}
    return values


def _means_table(values: Mapping[str, Values], metric: str) -> Table:
    cells = [
        [name, f"{alpha:g}", "{:.4f} ± {:.4f}".format(*spread([*seeds.values()])), len(seeds)]
        for name, own in values.items()
        for alpha, seeds in own.items()
    ]
    title = f"{metric}, mean ± standard deviation over the seeds"
    return Table(title, ["recipe", "alpha", metric, "seeds"], cells)


def _draw(figure: Figure, values: Mapping[str, Values], metric: str) -> None:
    """Draw a panel for each recipe: every seed, and mean and standard deviation over them."""
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for (name, own), panel in zip(values.items(), panels, strict=True):
        for alpha, seeds in own.items():
            panel.plot([alpha] * len(seeds), drawable([*seeds.values()]), ".", color="0.6")
        spreads = [spread([*seeds.values()]) for seeds in own.values()]
        means, deviations = drawable([m for m, _ in spreads]), [d for _, d in spreads]
        panel.errorbar([*own], means, deviations, marker="o", capsize=3)
        panel.axvspan(0, 1, color="0.5", alpha=0.1, linewidth=0)
        most = max((len(seeds) for seeds in own.values()), default=0)
        panel.set(xlabel="alpha (shaded: a norm ball)", title=f"{name}, {plural(most, 'seed')}")
    panels[0].set_ylabel(metric)

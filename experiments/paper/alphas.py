"""Recipes over alpha: what the commands of Figure 2 and of section 5.3 share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper.outcome import Claim, Outcome
from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.results import drawable, plural
from lit_fanions.cli.runner import spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA = "--model.init_args.optimizer.matrix.alpha"
RESERVED = {
    "--config": "give the recipes, one file each",
    "--seed_everything": "choose how many with --seeds",
    "--model.optimizer.matrix.alpha": "choose with --alphas",
    "--trainer.logger": "the logs are kept below --out",
    "--ckpt_path": "all start from scratch",
}

Values = dict[float, dict[int, float]]  # alpha -> seed -> the last value


def add_arguments(
    parser: argparse.ArgumentParser, alphas: Sequence[float], quick: Sequence[float]
) -> None:
    """Add the option that both have, with its defaults."""
    listed = " ".join(f"{alpha:g}" for alpha in alphas)
    parser.add_argument(
        "--alphas", type=float, nargs="+", metavar="ALPHA", help=f"to try (default: {listed})"
    )
    parser.set_defaults(default_alphas=(alphas, quick))


def train(
    options: argparse.Namespace, paths: Mapping[str, Path], recipe: Sequence[str], metric: str
) -> dict[str, Values]:
    """Train recipes with every alpha and seed.

    Args:
        options: Of the command.
        paths: Recipes by name.
        recipe: Further arguments of fit.
        metric: The scalar whose last value counts.

    Returns:
        The values by recipe.

    Raises:
        Refused: If an alpha cannot be meant, or every run failed.
    """
    if options.alphas is None:
        options.alphas = options.default_alphas[options.quick]
    if not all(map(math.isfinite, options.alphas)):
        raise Refused("--alphas: give finite numbers")
    variants = {
        (name, alpha): (f"--config={path}", *recipe, f"{ALPHA}={alpha!r}")
        for alpha in sorted(set(map(float, options.alphas)))  # runs are known by "1.0", not "1"
        for name, path in paths.items()
    }
    names = {key: f"{key[0]}-alpha{key[1]:g}" for key in variants}
    curves = runner.repeated({names[key]: args for key, args in variants.items()}, options, metric)
    values: dict[str, Values] = {name: {} for name in paths}
    for (name, alpha), variant in names.items():
        if curves[variant]:
            last = {seed: curve[-1][1] for seed, curve in curves[variant].items()}
            values[name][alpha] = last
    return values


def conclude(
    name: str,
    options: argparse.Namespace,
    values: Mapping[str, Values],
    paths: Mapping[str, Path],
    recipe: Sequence[str],
    *,
    metric: str,
    claims: Sequence[Claim],
    notes: Sequence[str],
) -> int:
    """Print and save the outcome of a command.

    Args:
        name: Of the command.
        options: Its options.
        values: What ``train`` returned.
        paths: Recipes by name.
        recipe: Further arguments of fit.
        metric: What the values are.
        claims: See ``Outcome``.
        notes: See ``Outcome``.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    points = [
        (name, alpha, own) for name, alphas in values.items() for alpha, own in alphas.items()
    ]
    outcome = Outcome(
        tables=[
            Table(
                f"{metric}, mean ± standard deviation over the seeds",
                ["recipe", "alpha", metric, "seeds"],
                [
                    [
                        name,
                        f"{alpha:g}",
                        "{:.4f} ± {:.4f}".format(*spread([*own.values()])),
                        len(own),
                    ]
                    for name, alpha, own in points
                ],
            )
        ],
        columns=["recipe", "alpha", "seed", metric],
        rows=[
            [name, alpha, seed, value] for name, alpha, own in points for seed, value in own.items()
        ],
        settings={
            "recipes": {name: str(path) for name, path in paths.items()},
            "arguments": list(recipe),
            "alphas": sorted({alpha for _, alpha, _ in points}),
            "seeds": list(range(options.seeds)),
        },
        draw=lambda figure: _draw(figure, values, metric),
        size=(6.5 * len(values), 5),
        claims=claims,
        notes=notes,
    )
    print(outcome)
    outcome.save(options.out, name)
    wanted = len(values) * len(set(options.alphas)) * options.seeds
    return int(sum(len(own) for *_, own in points) < wanted)


def _draw(figure: Figure, values: Mapping[str, Values], metric: str) -> None:
    """A panel for each recipe: every seed, and mean and standard deviation over them."""
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for (name, alphas), panel in zip(values.items(), panels, strict=True):
        for alpha, own in alphas.items():
            panel.plot([alpha] * len(own), drawable([*own.values()]), ".", color="0.6")
        spreads = [spread([*own.values()]) for own in alphas.values()]
        means, deviations = drawable([m for m, _ in spreads]), [d for _, d in spreads]
        panel.errorbar([*alphas], means, deviations, marker="o", capsize=3)
        panel.axvspan(0, 1, color="0.5", alpha=0.1, linewidth=0)
        seeds = max((len(own) for own in alphas.values()), default=0)
        panel.set(xlabel="alpha (shaded: a norm ball)", title=f"{name}, {plural(seeds, 'seed')}")
    panels[0].set_ylabel(metric)

"""Figures 2a and 2b: F-Muon's alpha on airbench, at Muon's settings and at tuned ones.

Trains the two recipes with every alpha and several seeds, and draws the test accuracy over alpha:
1 is Muon, 0 normalised SGD, and outside [0, 1] there is no norm. By default with the narrower
network and fewer epochs of configs/airbench/small.yaml, for a CPU; --full takes the recipes as
they are, the paper's.

  python -m experiments.paper airbench --jobs 2
  python -m experiments.paper airbench --full --seeds 10    # on a GPU

CIFAR-10 is downloaded to data/cifar10 if it is not there. Other arguments are those of fit and hold
for every run, except those that tell the runs apart.
"""

import argparse
from collections.abc import Mapping, Sequence

from experiments.paper import alphas, verdicts
from experiments.paper.outcome import Claim
from lit_fanions.cli import runner

TIME = "about an hour; quick: half a minute"
MUONS, TUNED = "f_muon_untuned", "f_muon"  # recipes: at Muon's settings, and with its own
RECIPES = (f"configs/airbench/{MUONS}.yaml", f"configs/airbench/{TUNED}.yaml")
SMALL = "configs/airbench/small.yaml"
QUICK = ("configs/quickstart.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4")
ALPHAS, QUICK_ALPHAS = (-0.1, 0, 0.1, 0.3, 0.5, 0.7, 0.9, 1, 1.1), (0, 1)
METRIC = "test/acc"
# Of the accuracy, below which recipes count as equal: of a part of the recipe, and of the whole,
# which is as exact as the paper's (a standard deviation of .0014).
MARGIN, FULL_MARGIN = 0.01, 0.002


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    runner.add_arguments(parser, RECIPES, seeds=3, full=RECIPES)
    alphas.add_arguments(parser, ALPHAS, QUICK_ALPHAS)


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = runner.plan(options, recipe, alphas.RESERVED, QUICK)
    small = not (options.full or options.quick)
    data = runner.described("CIFAR-10", ["small.yaml"] if small else [], recipe)
    recipe = [f"--config={SMALL}", *recipe] if small else recipe
    values = alphas.train(options, paths, recipe, METRIC)
    return alphas.conclude(
        "airbench",
        options,
        values,
        paths,
        recipe,
        metric=METRIC,
        claims=_claims(values, data, FULL_MARGIN if options.full else MARGIN)
        if runner.has_claims(options)
        else [],
        notes=[
            "paper, whole recipe with test-time augmentation, 200 runs: Muon .9400 ± .0013, tuned "
            "F-Muon .9401 ± .0014"
        ],
    )


def _claims(values: Mapping[str, alphas.Values], data: str, margin: float) -> list[Claim]:
    muons, tuned = (values.get(name, {}) for name in (MUONS, TUNED))
    if not {0, 0.1, 0.5, 1} <= tuned.keys() or not {-0.1, 0, 1, 1.1} <= muons.keys():
        return []
    muon, f_muon, n = muons[1], tuned[0.5], len(muons[1])
    found = f"F-Muon minus Muon: {verdicts.told(f_muon, muon)}"
    above = {alpha: verdicts.told(tuned[alpha], tuned[0]) for alpha in (0.1, 0.5)}
    away = {alpha: verdicts.told(muons[alpha], muon) for alpha in (1.1, -0.1, 0)}
    whole = "Confirmed if the 95 % interval"
    return [
        Claim(
            "airbench-equal",
            verdicts.equal(f_muon, muon, margin),
            found,
            data,
            n,
            f"{whole} is within ± {margin}.",
        ),
        Claim(
            "draft-ahead",
            verdicts.larger(f_muon, muon, margin),
            found,
            data,
            n,
            f"{whole} is above {margin}, refuted if it is below.",
        ),
        Claim(
            "alpha-0.1",
            verdicts.far_above(tuned[0.1], tuned[0.5], tuned[0]),
            f"alpha .1 minus 0: {above[0.1]}; .5 minus 0: {above[0.5]}",
            data,
            n,
            f"{whole} is above half of the distance from 0 to .5.",
        ),
        *(
            Claim(
                "alpha-outside",
                verdicts.nearly(muons[alpha], muon, muons[0]),
                f"alpha {alpha:g} minus 1: {away[alpha]}; 0 minus 1: {away[0]}",
                data,
                n,
                f"{whole} is within a quarter of the distance from 1 to 0, or above 1.",
            )
            for alpha in (1.1, -0.1)  # the second is not in the paper's figure
        ),
    ]

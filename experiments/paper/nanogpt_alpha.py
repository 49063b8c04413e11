"""Section 5.3: F-Muon's alpha on NanoGPT, at Muon's settings and at its own.

Trains the recipes of Muon and of F-Muon with every alpha and several seeds, and draws the last
validation loss over alpha: 1 is Muon, and below 0 there is no norm. By default with the sizes for
2 cores; --full takes the paper's, of the speedrun.

  python -m experiments.paper nanogpt_alpha --jobs 2 --data.data_dir data/fineweb_bytes
  python -m experiments.paper nanogpt_alpha --full --seeds 2    # on GPUs

The folder has the tokens of `python -m datamodules.fineweb tokenize`; its --help tells how. Other
arguments are those of fit and hold for every run, except those that tell the runs apart.
"""

import argparse
from collections.abc import Mapping, Sequence

from experiments.paper import alphas, verdicts
from experiments.paper.nanogpt import COMPARISON, DATA, MARGIN
from experiments.paper.outcome import Claim
from lit_fanions.cli import runner

TIME = "half an hour; quick: half a minute"
RECIPES = ("configs/nanogpt/muon_cpu.yaml", "configs/nanogpt/f_muon_cpu.yaml")
FULL = ("configs/nanogpt/speedrun_muon.yaml", "configs/nanogpt/speedrun_f_muon.yaml")
ALPHAS, QUICK_ALPHAS = (-0.1, 0.3, 0.5, 1), (0.5, 1)
METRIC = COMPARISON.metrics[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    runner.add_arguments(parser, RECIPES, seeds=3, full=FULL)
    alphas.add_arguments(parser, ALPHAS, QUICK_ALPHAS)


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = runner.plan(options, recipe, alphas.RESERVED, COMPARISON.quick)
    data = runner.described("web text, 276 M parameters" if options.full else DATA, recipe)
    values = alphas.train(options, paths, recipe, METRIC)
    return alphas.conclude(
        "nanogpt_alpha",
        options,
        values,
        paths,
        recipe,
        metric=METRIC,
        claims=_claims(values, data) if runner.has_claims(options) else [],
        notes=[
            "paper, speedrun of 1750 steps: Muon (lr .05) 3.279, F-Muon (alpha .5, lr .07) 3.281, "
            "alpha -.1 3.2818, no better than .3"
        ],
    )


def _claims(values: Mapping[str, alphas.Values], data: str) -> list[Claim]:
    muons, own = values.values()
    if 1 not in muons or not {-0.1, 0.3, 0.5} <= own.keys():
        return []
    muon, n = muons[1], len(muons[1])
    return [
        Claim(
            "nanogpt-equal",
            verdicts.at_most(own[0.5], muon, MARGIN),
            f"F-Muon minus Muon, each at its own lr: {verdicts.told(own[0.5], muon)}",
            data,
            n,
            f"Confirmed if the 95 % interval is below {MARGIN} nats, five times the paper's "
            "difference.",
        ),
        Claim(
            "nanogpt-negative",
            verdicts.at_most(own[-0.1], own[0.3], MARGIN),
            f"alpha -.1 minus .3: {verdicts.told(own[-0.1], own[0.3])}",
            data,
            n,
            f"Confirmed if the 95 % interval is below {MARGIN} nats.",
        ),
    ]

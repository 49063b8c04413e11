"""Section 5.3: F-Muon's alpha on NanoGPT, at Muon's settings and at its own.

Trains the recipes of Muon and of F-Muon with every alpha and several seeds, and draws the last
validation loss over alpha: 1 is Muon, and outside [0, 1] there is no norm. By default with the
sizes for 2 cores; --full trains the paper's sizes, those of the speedrun.

  python -m experiments.paper nanogpt_alpha --jobs 2 --data.data_dir data/fineweb_bytes
  python -m experiments.paper nanogpt_alpha --full --seeds 2    # on GPUs

--data.data_dir is a folder made by `python -m datamodules.fineweb tokenize` (see its --help). All
other options are passed to `fit` for every run.
"""

import functools
from collections.abc import Mapping

from experiments.paper import alphas, verdicts
from experiments.paper.nanogpt import COMPARISON, DATA, MARGIN
from experiments.paper.outcome import Claim, judge

TIME = "45 minutes; quick: half a minute"
# The weight of Muon. The authors' code has that of the blend, 1 - alpha: their -.1 and .3 may be
# 1.1 and .7 here, so that both readings are trained.
ALPHAS = (-0.1, 0.3, 0.5, 0.7, 1, 1.1)


def judge_all(values: Mapping[str, alphas.Values], data: str, full: bool) -> list[Claim]:
    """Return the verdicts for which all alphas were trained.

    Args:
        values: Losses of the recipe of Muon, then of F-Muon's.
        data: The data, in words.
        full: Whether the whole recipe was trained; the rules are the same.
    """
    at_muons_settings, at_own = values.values()
    muon, by_alpha = at_muons_settings.get(1), at_own.get
    pairs = {
        "nanogpt-equal": ("F-Muon minus Muon, each at its own lr", by_alpha(0.5), muon),
        "nanogpt-negative": ("alpha -.1 minus .3", by_alpha(-0.1), by_alpha(0.3)),
        "nanogpt-negative-blend": ("alpha 1.1 minus .7", by_alpha(1.1), by_alpha(0.7)),
    }
    return [
        judge(
            id,
            verdicts.all_hold([verdicts.at_most(a, b, MARGIN)]),
            f"{text}: {verdicts.mean_difference(a, b)}",
            data,
            len(b),
            _compare_with_muon(at_own) if id != "nanogpt-equal" else "",
            margin=MARGIN,
        )
        for id, (text, a, b) in pairs.items()
        if a and b
    ]


def _compare_with_muon(losses: alphas.Values) -> str:
    """Return how far alphas outside [0, 1] are above alpha 1; empty where none was trained."""
    above = ", ".join(
        f"alpha {alpha:g} {verdicts.mean_difference(losses[alpha], losses[1])}"
        for alpha in (-0.1, 1.1)
        if {alpha, 1} <= losses.keys()
    )
    paper = "the paper's 3.2818 is .0028 above its Muon"
    return f"Above alpha 1 at the same lr: {above}; {paper}." if above else ""


STUDY = alphas.Study(
    name="nanogpt_alpha",
    metric=COMPARISON.metrics[0],
    recipes=("configs/nanogpt/muon_cpu.yaml", "configs/nanogpt/f_muon_cpu.yaml"),
    full_recipes=("configs/nanogpt/speedrun_muon.yaml", "configs/nanogpt/speedrun_f_muon.yaml"),
    quick=COMPARISON.quick,
    alphas=ALPHAS,
    quick_alphas=(0.5, 1),
    data=DATA,
    full_data="web text, 276 M parameters",
    judge=judge_all,
    note="paper, speedrun of 1750 steps: Muon (lr .05) 3.279, F-Muon (alpha .5, lr .07) 3.281, "
    "alpha -.1 3.2818, no better than .3",
)

add_arguments = functools.partial(alphas.add_arguments, study=STUDY)
run = functools.partial(alphas.run, study=STUDY)

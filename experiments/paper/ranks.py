r"""Beyond the paper: k-Fanions over their rank, with error feedback and without, and other balls.

The recipe of a k-Fanion is trained with several ranks, each with and without error feedback, some
also blended with normalised SGD (rank 1 is then F-Neon), beside S-Muon and the Ky Fan ball. Each
variant has its own best learning rate, found as by `nanogpt`. The question that the article leaves
open: does F-Neon need error feedback?

  python -m experiments.paper ranks --jobs 2 --data.data_dir data/fineweb_bytes

--data.data_dir is a folder made by `python -m datamodules.fineweb tokenize` (see its --help). All
other options are passed to `fit` for every run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper import tuning, verdicts
from experiments.paper.nanogpt import DATA, MARGIN
from experiments.paper.outcome import Claim, judge, untested
from experiments.paper.tuning import Finals, Variant
from experiments.paper.verdicts import Sample
from lit_fanions.cli.console import Refused
from lit_fanions.cli.curves import spread
from lit_fanions.cli.results import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIME = "about five hours; quick: half a minute"
RANKS = {"fanion": (1, 4, 16, 64), "f_fanion": (1, 16)}
LARGEST = max(RANKS["fanion"])
FEEDBACK = "-feedback"
_MATRIX = "--model.init_args.optimizer.matrix"
# Other variants: name -> options, and the first lr as a multiple of the recipe's.
_OTHERS: Mapping[str, tuple[Mapping[str, object], float]] = {
    "s_muon": ({"algorithm": "s_muon", "rank": "full"}, 1.2),
    "kyfan-16": ({"algorithm": "kyfan", "rank": "16"}, 4.0),
}


def make_variants(paths: Mapping[str, Path]) -> dict[str, Variant]:
    """Return the variants of one recipe.

    Args:
        paths: The recipe by its name.

    Raises:
        Refused: If there are several recipes.
    """
    if len(paths) != 1:
        raise Refused(f"--config: give one recipe, not {len(paths)}; its variants are compared")
    (path,) = paths.values()
    stated, variants = tuning.stated_lr(path), {}
    for algorithm, ranks in RANKS.items():
        for rank in ranks:
            # A step of rank k has the length sqrt(k): smaller ranks need a larger lr.
            lr = stated * (LARGEST / rank) ** 0.5 / 2
            for feedback in (False, True):
                options: dict[str, object] = {
                    "algorithm": algorithm,
                    "rank": rank,
                    "error_feedback": str(feedback).lower(),
                }
                name = f"{algorithm}-{rank}" + FEEDBACK * feedback
                variants[name] = _variant(path, lr, options)
    for name, (own, factor) in _OTHERS.items():
        variants[name] = _variant(path, factor * stated, own)
    return variants


def _variant(path: Path, lr: float, options: Mapping[str, object]) -> Variant:
    return Variant(path, lr, tuple(f"{_MATRIX}.{name}={x}" for name, x in options.items()))


def judge_all(finals: Finals, data: str) -> list[Claim]:
    """Return the verdicts on error feedback: for F-Neon, and for the other variants together.

    Args:
        finals: Last losses of the variants whose best learning rate is certain.
        data: The data, in words.
    """
    names = [f"{algorithm}-{rank}" for algorithm, ranks in RANKS.items() for rank in ranks]
    pairs = {
        name: (finals[name], finals[f"{name}{FEEDBACK}"])
        for name in names
        if {name, f"{name}{FEEDBACK}"} <= finals.keys()
    }
    neon = {name: pairs.pop(name) for name in ["f_fanion-1"] if name in pairs}
    return [
        _judge_pairs(neon, f"{data}, F-Neon"),
        _judge_pairs(pairs, f"{data}, k-Fanions and F-Fanions"),
    ]


def _judge_pairs(pairs: Mapping[str, tuple[Sample, Sample]], data: str) -> Claim:
    """Return the verdict from losses without and with error feedback, by variant."""
    if not pairs:
        return untested("error-feedback", data, tuning.NO_BEST)
    return judge(
        "error-feedback",
        verdicts.all_hold(verdicts.larger(*pair, MARGIN) for pair in pairs.values()),
        "loss without minus with error feedback, each at its own lr: "
        + ", ".join(f"{name} {verdicts.mean_difference(*pair)}" for name, pair in pairs.items()),
        data,
        min(len(without) for without, _ in pairs.values()),
        margin=MARGIN,
    )


def draw(figure: Figure, finals: Finals) -> None:
    """Draw the last loss over the rank.

    Args:
        figure: An empty figure.
        finals: Last losses by variant and seed.
    """
    axes = figure.subplots()
    spreads = {name: spread([*values.values()]) for name, values in finals.items()}
    for i, (algorithm, ranks) in enumerate(RANKS.items()):
        for feedback, style in (("", "-o"), (FEEDBACK, "--s")):
            points = {
                rank: spreads[name]
                for rank in ranks
                if (name := f"{algorithm}-{rank}{feedback}") in spreads
            }
            means = drawable([mean for mean, _ in points.values()])
            errors = [deviation for _, deviation in points.values()]
            label = f"{algorithm}{', error feedback' if feedback else ''}"
            axes.errorbar(
                [*points], means, errors, fmt=style, color=f"C{i}", capsize=3, label=label
            )
    others = [name for name in _OTHERS if name in spreads]
    for j, name in enumerate(others, len(RANKS)):
        axes.axhline(spreads[name][0], color=f"C{j}", linestyle=":", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS["fanion"], [str(rank) for rank in RANKS["fanion"]])
    axes.set(xlabel="rank", ylabel=COMPARISON.metrics[0], title="each at its own best lr")
    axes.legend()


COMPARISON = tuning.Comparison(
    name="ranks",
    metrics=["val/loss"],
    recipes=("configs/nanogpt/fanion_cpu.yaml",),
    quick=(
        "configs/nanogpt/quickstart.yaml",
        *("--trainer.max_steps=2", "--trainer.limit_val_batches=1"),
        *("--data.val_every_n_steps=2", "--test_after_fit=false"),
    ),
    seeds=3,
    data=DATA,
    make_variants=make_variants,
    judge=judge_all,
    draw=draw,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)

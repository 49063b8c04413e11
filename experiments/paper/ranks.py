r"""Beyond the paper: k-Fanions over their rank, with error feedback and without, and other balls.

The recipe of a k-Fanion is trained with several ranks, each with error feedback and without, some
also blended with normalised SGD (of rank 1 that is F-Neon), beside S-Muon and the Ky Fan ball; each
at its own best lr, which is looked for as in `nanogpt`. The question that the article leaves open:
does F-Neon need error feedback?

  python -m experiments.paper ranks --jobs 2 --data.data_dir data/fineweb_bytes

The folder has the tokens of `python -m datamodules.fineweb tokenize`; its --help tells how. Other
arguments are those of fit and hold for every run, except those that tell the runs apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper import tuning, verdicts
from experiments.paper.nanogpt import DATA, MARGIN
from experiments.paper.outcome import Claim, untested
from experiments.paper.tuning import Finals, Variant
from experiments.paper.verdicts import Sample
from lit_fanions.cli.console import Refused
from lit_fanions.cli.results import drawable
from lit_fanions.cli.runner import spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIME = "about 90 minutes; quick: half a minute"
RANKS = {"fanion": (1, 4, 16, 64), "f_fanion": (1, 16)}
LARGEST = max(RANKS["fanion"])
FEEDBACK = "-feedback"
_MATRIX = "--model.init_args.optimizer.matrix"
_OTHERS: Mapping[
    str, tuple[Mapping[str, object], float]
] = {  # name -> options, multiple of the lr that the recipe states
    "s_muon": ({"algorithm": "s_muon", "rank": "full", "sign_scale": 0.05}, 0.4),
    "kyfan-16": ({"algorithm": "kyfan", "rank": "16"}, 4.0),
}


def variants(paths: Mapping[str, Path]) -> dict[str, Variant]:
    """What is compared, made of one recipe.

    Args:
        paths: The recipe.

    Raises:
        Refused: If there are more.
    """
    if len(paths) != 1:
        raise Refused(f"--config: give one recipe, not {len(paths)}; the variants are made of it")
    (path,) = paths.values()
    stated, made = tuning.stated_lr(path), {}
    for algorithm, ranks in RANKS.items():
        for rank in ranks:
            # A step of rank k has the length sqrt(k).
            lr = stated * (LARGEST / rank) ** 0.5 / 2
            for feedback in (False, True):
                options: dict[str, object] = {
                    "algorithm": algorithm,
                    "rank": rank,
                    "error_feedback": str(feedback).lower(),
                }
                made[f"{algorithm}-{rank}" + FEEDBACK * feedback] = _variant(path, lr, options)
    for name, (own, factor) in _OTHERS.items():
        made[name] = _variant(path, factor * stated, own)
    return made


def _variant(path: Path, lr: float, options: Mapping[str, object]) -> Variant:
    return Variant(path, lr, tuple(f"{_MATRIX}.{name}={x}" for name, x in options.items()))


def claims(finals: Finals, data: str) -> list[Claim]:
    """What the last losses say about the question: for F-Neon, and for the others together."""
    names = [f"{algorithm}-{rank}" for algorithm, ranks in RANKS.items() for rank in ranks]
    pairs = {
        name: (finals[name], finals[f"{name}{FEEDBACK}"])
        for name in names
        if {name, f"{name}{FEEDBACK}"} <= finals.keys()
    }
    neon = {name: pairs.pop(name) for name in ["f_fanion-1"] if name in pairs}
    return [
        _claim(found, f"{data}, {what}")
        for found, what in ((neon, "F-Neon"), (pairs, "k-Fanions and F-Fanions"))
    ]


def _claim(pairs: Mapping[str, tuple[Sample, Sample]], data: str) -> Claim:
    if not pairs:
        return untested("error-feedback", data, tuning.NO_BEST)
    return Claim(
        "error-feedback",
        verdicts.every(verdicts.larger(*pair, MARGIN) for pair in pairs.values()),
        "loss without minus with error feedback, each at its own lr: "
        + ", ".join(f"{name} {verdicts.told(*pair)}" for name, pair in pairs.items()),
        data,
        min(len(without) for without, _ in pairs.values()),
        f"Confirmed if all 95 % intervals are above {MARGIN} nats, refuted if one is below. Left "
        "out is what has no certain best lr.",
    )


def draw(figure: Figure, finals: Finals) -> None:
    """The last loss over the rank."""
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
            words = f"{algorithm}{', error feedback' if feedback else ''}"
            axes.errorbar(
                [*points], means, errors, fmt=style, color=f"C{i}", capsize=3, label=words
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
    variants=variants,
    claims=claims,
    draw=draw,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)

r"""Beyond the paper: pairs of airbench recipes at equal seeds, each at the settings that it states.

CIFAR-10 on configs/airbench/small.yaml: tuned F-Muon, and S-Muon at F-Muon's settings, beside Muon;
alpha = .1 beside normalised SGD at F-Muon's settings; Muon with random singular values (Kaon) and
with sharpness-aware steps (nu-SAM) beside Muon. The differences get 95 % intervals, which say how
many seeds are enough.

  python -m experiments.paper pairs --jobs 2
  python -m experiments.paper pairs --only muon f_muon --seeds 30 --trainer.max_epochs=4
  python -m experiments.paper pairs --full    # the recipes as they are

CIFAR-10 is downloaded to data/cifar10 if it is not there. All other options are passed to `fit` for
every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.paper import alphas, repetitions, verdicts
from experiments.paper.airbench import FULL_MARGIN, MARGIN, STUDY
from experiments.paper.outcome import Claim, Outcome, judge
from experiments.paper.tuning import Finals
from experiments.paper.tuning.report import tabulate_differences
from lit_fanions.cli.console import Refused, Table
from lit_fanions.cli.curves import spread

TIME = "about four hours; quick: half a minute"
METRIC = STUDY.metric
SAM = "configs/sam.yaml"
RESERVED = {**alphas.RESERVED, "--model.optimizer.matrix.alpha": "choose variants with --only"}


@dataclass(frozen=True)
class _Variant:
    """A recipe with other options.

    Attributes:
        recipe: Its name.
        beside: The variant that it is compared with; empty for none.
        args: Further arguments of fit.
    """

    recipe: str
    beside: str = ""
    args: tuple[str, ...] = ()


VARIANTS: Mapping[str, _Variant] = {
    "muon": _Variant("muon"),
    "f_muon": _Variant("f_muon", "muon"),
    "s_muon": _Variant("s_muon", "muon"),
    "muon-random-spectrum": _Variant(
        "muon", "muon", ("--trainer.callbacks+=experiments.controls.RandomSpectrum",)
    ),
    "muon-sharpness-aware": _Variant("muon", "muon", (f"--config={SAM}",)),
    "nsgd": _Variant("f_muon", args=(f"{alphas.ALPHA}=0.0",)),
    "f_muon-alpha-.1": _Variant("f_muon", "nsgd", (f"{alphas.ALPHA}=0.1",)),
    # With --quick.
    "quickstart": _Variant("quickstart"),
    "quickstart-random-spectrum": _Variant(
        "quickstart",
        "quickstart",
        ("--trainer.callbacks+=experiments.controls.RandomSpectrum",),
    ),
}
BESIDE = {name: own.beside for name, own in VARIANTS.items() if own.beside}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command; all others are those of fit."""
    recipes = tuple(f"configs/airbench/{name}.yaml" for name in ("muon", "f_muon", "s_muon"))
    repetitions.add_arguments(parser, recipes, seeds=8, full=recipes)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="variants to train, by name (default: all)"
    )


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train and tabulate.

    Args:
        options: See ``add_arguments``.
        recipe: Further arguments of fit.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    paths, recipe = repetitions.plan(options, recipe, RESERVED, STUDY.quick)
    chosen = select(paths, options.only)
    overlay = [] if options.full or options.quick else [STUDY.overlay]
    curves = repetitions.train_with_seeds(
        {name: arguments(own, paths, overlay, recipe) for name, own in chosen.items()},
        options,
        METRIC,
    )
    finals = {
        name: {seed: curve[-1][1] for seed, curve in own.items()}
        for name, own in curves.items()
        if own
    }
    data = repetitions.describe_data(STUDY.data, [Path(name).name for name in overlay], recipe)
    tested = repetitions.has_claims(options, some=True)
    outcome = Outcome(
        tables=[_means(finals), *tabulate_differences(finals, BESIDE, METRIC)],
        columns=["variant", "seed", METRIC],
        rows=[[name, seed, x] for name, own in finals.items() for seed, x in own.items()],
        settings={
            "recipes": {name: str(path) for name, path in paths.items()},
            "variants": {name: own.args for name, own in chosen.items()},
            "arguments": [*(f"--config={name}" for name in overlay), *recipe],
            "seeds": list(range(options.seeds)),
        },
        claims=judge_all(finals, data, options.full) if tested else [],
        arguments=options.arguments,
    )
    print(outcome)
    outcome.save(options.out, options.name)
    return int(sum(map(len, finals.values())) < len(chosen) * options.seeds)


def select(paths: Mapping[str, Path], only: Sequence[str] | None) -> dict[str, _Variant]:
    """Return the variants of the recipes that are given.

    Args:
        paths: Recipes by name.
        only: Names of variants; None: all.

    Raises:
        Refused: If there is no variant of a name or of a recipe.
    """
    possible = {name: own for name, own in VARIANTS.items() if own.recipe in paths}
    if unknown := sorted(paths.keys() - {own.recipe for own in possible.values()}):
        known = sorted({own.recipe for own in VARIANTS.values()})
        raise Refused(f"--config: {unknown[0]} has no variants; give some of {', '.join(known)}")
    for name in only or ():
        if name not in possible:
            raise Refused(f"--only: no variant {name}; give some of {', '.join(possible)}")
    return {name: own for name, own in possible.items() if not only or name in only}


def arguments(
    variant: _Variant, paths: Mapping[str, Path], overlay: Sequence[str], recipe: Sequence[str]
) -> tuple[str, ...]:
    """Return the arguments of fit for a variant; its own come last, to win."""
    files = (f"--config={path}" for path in (paths[variant.recipe], *overlay))
    return (*files, *recipe, *variant.args)


def judge_all(finals: Finals, data: str, full: bool) -> list[Claim]:
    """Return the verdicts that the variants can test.

    Args:
        finals: Accuracies by variant and seed.
        data: The data, in words.
        full: Whether the whole recipe was trained.
    """
    claims = []
    if {"muon", "f_muon"} <= finals.keys():
        muon, f_muon = finals["muon"], finals["f_muon"]
        margin = FULL_MARGIN if full else MARGIN
        ahead = f"F-Muon minus Muon: {verdicts.mean_difference(f_muon, muon)}"
        tests = {"airbench-equal": verdicts.equal, "draft-ahead": verdicts.larger}
        claims += [
            judge(
                name,
                verdicts.all_hold([test(f_muon, muon, margin)]),
                ahead,
                data,
                len(muon),
                margin=margin,
            )
            for name, test in tests.items()
        ]
    if {"nsgd", "f_muon-alpha-.1", "f_muon"} <= finals.keys():
        nsgd, little, half = (finals[name] for name in ("nsgd", "f_muon-alpha-.1", "f_muon"))
        claims.append(
            judge(
                "alpha-0.1",
                verdicts.all_hold([verdicts.far_above(little, half, nsgd)]),
                f"alpha .1 minus 0: {verdicts.mean_difference(little, nsgd)}; .5 minus 0: "
                f"{verdicts.mean_difference(half, nsgd)}",
                data,
                len(nsgd),
            )
        )
    return claims


def _means(finals: Finals) -> Table:
    cells = [
        [name, "{:.4f} ± {:.4f}".format(*spread([*own.values()])), len(own)]
        for name, own in finals.items()
    ]
    title = f"{METRIC}, mean ± standard deviation over the seeds"
    return Table(title, ["variant", METRIC, "seeds"], cells)

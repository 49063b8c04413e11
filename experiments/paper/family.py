r"""Beyond the paper: options of the family, and controls, beside the recipes that they change.

NanoGPT, each variant at its own best learning rate, found as by `nanogpt`, and each compared at
equal seeds with the recipe that it changes: second moments of rows (NorMuon), heads of attention as
matrices of their own, schedules of alpha and rank, COSMOS, Scion, fewer steps of Polar Express. The
controls change what should matter: random singular values (Kaon), the alphas of a schedule in
random order.

  python -m experiments.paper family --jobs 2 --data.data_dir data/fineweb_bytes

--data.data_dir is a folder made by `python -m datamodules.fineweb tokenize` (see its --help). All
other options are passed to `fit` for every run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.paper import tuning
from experiments.paper.nanogpt import COMPARISON as NANOGPT
from experiments.paper.tuning import Variant
from lit_fanions.cli.console import Refused

TIME = "about seven hours; quick: half a minute"
_OPTIMIZER = "--model.init_args.optimizer"
_CONTROLS = "--trainer.callbacks+=experiments.controls"


@dataclass(frozen=True)
class _Change:
    """A recipe with other options.

    Attributes:
        recipe: Its name.
        beside: The variant that it is compared with; empty for a recipe as it is.
        options: Options of the optimizer, by their path in the recipe.
        factor: The first lr as a multiple of the recipe's.
        args: Further arguments of fit.
    """

    recipe: str
    beside: str = ""
    options: Mapping[str, object] | None = None
    factor: float = 1.0
    args: tuple[str, ...] = ()


# A step of rank k has the length sqrt(k): the recipe's rank is 16.
_RANK_40 = (16 / 40) ** 0.5
_FALLING_ALPHA = {"matrix.alpha": 1.1, "schedule.alpha_end": 0.5}
_COSMOS = {"matrix.algorithm": "cosmos", "matrix.scale": "match_rms_adamw"}
VARIANTS: Mapping[str, _Change] = {
    "muon": _Change("muon_cpu"),
    "muon-4-steps": _Change("muon_cpu", "muon", {"matrix.polar_steps": 4}),
    "muon-random-spectrum": _Change("muon_cpu", "muon", args=(f"{_CONTROLS}.RandomSpectrum",)),
    "muon-rows": _Change("muon_cpu", "muon", {"matrix.adapt": "rows"}),
    "muon-heads": _Change("muon_cpu", "muon", {"matrix.heads": "auto"}),
    "scion": _Change("scion_cpu", "muon"),
    "cosmos-muon": _Change("muon_cpu", "muon", _COSMOS, 0.5),
    "cosmos-neon": _Change("muon_cpu", "cosmos-muon", {**_COSMOS, "matrix.rank": 1}, 0.5),
    "f_muon": _Change("f_muon_cpu", "muon"),
    "f_muon-rows": _Change("f_muon_cpu", "f_muon", {"matrix.adapt": "rows"}),
    "f_muon-alpha-.8": _Change("f_muon_cpu", "f_muon", {"matrix.alpha": 0.8}),
    "f_muon-alpha-1.1-to-.5": _Change("f_muon_cpu", "f_muon-alpha-.8", _FALLING_ALPHA),
    "f_muon-alpha-shuffled": _Change(
        "f_muon_cpu", "f_muon-alpha-1.1-to-.5", args=(f"{_CONTROLS}.ShuffledAlpha",)
    ),
    "fanion-16": _Change("fanion_cpu"),
    "fanion-16-rows": _Change("fanion_cpu", "fanion-16", {"matrix.adapt": "rows"}),
    "fanion-40": _Change("fanion_cpu", options={"matrix.rank": 40}, factor=_RANK_40),
    "fanion-64-to-16": _Change(
        "fanion_cpu", "fanion-40", {"matrix.rank": 64, "schedule.rank_end": 16}, _RANK_40
    ),
    # With --quick.
    "quickstart": _Change("quickstart"),
    "quickstart-random-spectrum": _Change(
        "quickstart", "quickstart", args=(f"{_CONTROLS}.RandomSpectrum",)
    ),
}  # fmt: skip
BESIDE = {name: change.beside for name, change in VARIANTS.items() if change.beside}


def make_variants(paths: Mapping[str, Path]) -> dict[str, Variant]:
    """Return the variants of the recipes that are given.

    Args:
        paths: Recipes by name: some of those in the table of variants.

    Raises:
        Refused: If the table has no variant of a recipe.
    """
    known = {change.recipe for change in VARIANTS.values()}
    if unknown := sorted(paths.keys() - known):
        raise Refused(
            f"--config: {unknown[0]} has no variants; give some of {', '.join(sorted(known))}"
        )
    return {
        name: Variant(
            paths[change.recipe],
            change.factor * tuning.stated_lr(paths[change.recipe]),
            (
                *(f"{_OPTIMIZER}.{key}={value}" for key, value in (change.options or {}).items()),
                *change.args,
            ),
        )
        for name, change in VARIANTS.items()
        if change.recipe in paths
    }


COMPARISON = tuning.Comparison(
    name="family",
    metrics=["val/loss"],
    recipes=tuple(
        f"configs/nanogpt/{name}_cpu.yaml" for name in ("muon", "f_muon", "fanion", "scion")
    ),
    quick=NANOGPT.quick,
    seeds=5,
    data=NANOGPT.data,
    make_variants=make_variants,
    beside=BESIDE,
)

add_arguments = functools.partial(tuning.add_arguments, comparison=COMPARISON)
run = functools.partial(tuning.run, comparison=COMPARISON)

"""The trainings of each setting: their arguments, and the traces that are read from their logs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.paper.bounds.article import PRINTED
from experiments.paper.execution import execute
from experiments.paper.least_squares import theory
from experiments.paper.least_squares.traces import (
    QUANTITIES,
    THEORY,
    Setting,
    Trace,
    Traces,
)
from experiments.paper.tuning import LR, stated_lr
from lit_fanions.cli.curves import Curves
from lit_fanions.cli.runner import Run

RECIPES = ("configs/least_squares/*.yaml",)
SMALL = "configs/least_squares_small.yaml"
QUICK = ("configs/least_squares/muon.yaml", "--trainer.max_steps=20")
STEPS = 5000  # of the article
SIZES: dict[Setting, int] = {"article": 50, "text": 10, "draft": 10, "printed": 50, "lemma 7": 50}
# With the printed step sizes: enough to see whether a printed number of them is too small.
PRINTED_STEPS = 2 * max(printed.steps for printed in PRINTED.values())
DENSE = "--model.init_args.points_per_decade=200"  # log often, to see when a precision is reached
_ONE_DATA_SET = "all recipes solve the problems of seed 0; use --seeds N for N problems"
_COUNT = "use --seeds N for N problems"
_COMPARED = "it differs between the settings that are compared"
RESERVED = {
    "--config": "give the recipes to compare, one file each",
    "--seed_everything": _ONE_DATA_SET,
    "--model.problems": _COUNT,
    "--data.problems": _COUNT,
    "--data.seed": _ONE_DATA_SET,
    **{f"--{part}.{side}": _COMPARED for part in ("model", "data") for side in ("rows", "cols")},
    "--model.optimizer.matrix.lr": _COMPARED,
    "--trainer.logger": "the logs are kept below --out",
    "--ckpt_path": "all start from scratch",
}

Key = tuple[Setting, str]  # setting and recipe
Trainings = dict[Key, tuple[str, ...]]  # arguments of fit beyond those of the recipe


def plain_trainings(paths: Mapping[str, Path], with_printed: bool) -> Trainings:
    """Return the trainings that do not depend on others.

    Args:
        paths: Recipes by name.
        with_printed: Whether to train with the printed step sizes too, which takes long.
    """
    trainings: Trainings = {("article", name): () for name in paths}
    trainings |= {
        # The draft's size, whose options depend on it, with the article's lr and steps.
        ("text", name): (
            f"--config={SMALL}",
            f"{LR}={stated_lr(path):g}",
            f"--trainer.max_steps={STEPS}",
        )
        for name, path in paths.items()
    }
    if with_printed:
        trainings |= {
            ("printed", name): (
                f"{LR}={PRINTED[THEORY[name]].lr:g}",
                f"--trainer.max_steps={PRINTED_STEPS}",
                DENSE,
            )
            for name in paths
            if name in THEORY
        }
    return trainings | {("draft", name): (f"--config={SMALL}",) for name in paths}


def planned_trainings(traces: Traces) -> Trainings:
    """Return the trainings with step sizes and steps by Lemma 7.

    Args:
        traces: Traces of the article's setting, from which L and the first loss are read.
    """
    plans = {
        name: theory.plan(name, trace)
        for (setting, name), trace in traces.items()
        if setting == "article" and name in THEORY
    }
    return {
        ("lemma 7", name): (f"{LR}={plan.lr:.6g}", f"--trainer.max_steps={plan.steps}", DENSE)
        for name, plan in plans.items()
    }


def train(
    trainings: Trainings,
    paths: Mapping[str, Path],
    recipe: Sequence[str],
    options: argparse.Namespace,
) -> Traces:
    """Train and return the traces of the runs that succeeded.

    Args:
        trainings: Arguments of each training.
        paths: Recipes by name.
        recipe: Further arguments of fit, the same for all.
        options: Options of the command.
    """
    problems: int = options.seeds
    names = (*QUANTITIES, "smoothness")
    metrics = ["train/loss", *(f"problem{i}/{name}" for i in range(problems) for name in names)]
    runs = {
        key: _run(key, paths[key[1]], problems, args, recipe) for key, args in trainings.items()
    }
    curves = execute(runs.values(), options.out / "runs", metrics, options.jobs)
    return {
        key: _trace(curves[run.name], problems, _lr_of_run(paths[key[1]], run))
        for key, run in runs.items()
        if run.name in curves
    }


def _run(key: Key, path: Path, problems: int, args: Iterable[str], recipe: Iterable[str]) -> Run:
    """Return the training of a recipe in a setting; the setting's own arguments come last, to win.

    An overlay comes before the user's arguments, which would otherwise have no effect.
    """
    size = SIZES[key[0]]
    fixed = [
        f"--{part}.init_args.{name}={value}"
        for part in ("model", "data")
        for name, value in (("problems", problems), ("rows", size), ("cols", size))
    ]
    overlay = [arg for arg in args if arg.startswith("--config")]
    own = [arg for arg in args if arg not in overlay]
    given = (f"--config={path}", *overlay, *recipe, *own, "--seed_everything=0", *fixed)
    return Run("-".join(key).replace(" ", ""), given)


def _lr_of_run(path: Path, run: Run) -> float:
    """Return the lr of a run: from its arguments, else from the overlay, else from the recipe."""
    chosen = [arg.partition("=")[2] for arg in run.args if arg.startswith(f"{LR}=")]
    if chosen:
        return float(chosen[0])
    return stated_lr(Path(SMALL) if f"--config={SMALL}" in run.args else path)


def _trace(curves: Curves, problems: int, lr: float) -> Trace:
    def values(name: str) -> np.ndarray:
        columns = [[v for _, v in curves[f"problem{i}/{name}"]] for i in range(problems)]
        return np.array(columns).T

    steps = [step for step, _ in curves["problem0/loss"]]
    return Trace(lr, steps, {name: values(name) for name in QUANTITIES}, values("smoothness")[0])

r"""Train a recipe at many settings with many seeds, on one machine or several.

  python -m lit_fanions.sweep --config configs/quickstart.yaml --metric val/acc \
      --set model.optimizer.matrix.alpha=-.1,0,.5,1 --seeds 10
  python -m lit_fanions.sweep --config configs/quickstart.yaml --metric val/acc --trials 30 \
      --tune model.optimizer.matrix.lr=1e-3:1:log model.optimizer.matrix.momentum=.5:.99

The first trains every combination of values with every seed. In the second Optuna's TPE (or
--sampler random) chooses 30 settings, which are trained with seed 0; those that fall behind are
pruned, and the best is trained with the other seeds as well. Every training is a process with a
GPU of its own, or one of --jobs on the processor. Arguments not listed below are those of fit.

All is kept in an Optuna study. The same command goes on where it was stopped or killed; nothing
that is finished is trained again: with more values, seeds or trials only those are trained. Several
machines share the work if their commands name the same --storage and --study. The outcome: a
table, CSV, JSON and a picture in --out, beside the logs of all trainings in the folder runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_fanions.cli import console, runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.errors import config_files
from lit_fanions.sweep import space

if TYPE_CHECKING:
    from lit_fanions.sweep.study import Plan, Sampler

SEEDS, TRIALS, METRIC = 3, 30, "val/loss"
RESERVED = {
    "--seed_everything": "choose how many with --seeds",
    "--trainer.logger": "the logs are kept below --out",
    "--trainer.devices": "each has one; choose how many run at a time with --jobs",
    "--ckpt_path": "all start from scratch",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The arguments; by default those of the process.

    Returns:
        The exit status: 0, 1 if a training failed, 130 after Ctrl-C, 143 after SIGTERM. Bad input
        exits with status 2.
    """
    parser = _parser()
    options, recipe = parser.parse_known_args(args)
    try:
        runner.refuse_mistyped(recipe, parser)
        for package in ("optuna", "matplotlib"):
            console.require(package, "a sweep")
        return run(options, recipe)
    except Refused as error:
        parser.error(str(error))
    except (KeyboardInterrupt, runner.Stopped) as error:
        print("stopped; the same command goes on with what is missing", file=sys.stderr)
        return error.status if isinstance(error, runner.Stopped) else 130


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot.

    Args:
        options: Those of this command.
        recipe: Arguments of fit.

    Returns:
        The exit status: 0, or 1 if a training failed.

    Raises:
        Refused: If something is not possible.
        SystemExit: With fit's own words, if fit would refuse an argument.
    """
    plan = _plan(options, recipe)
    # Not above: these import Optuna.
    from lit_fanions.sweep import result
    from lit_fanions.sweep.study import Sweep, Wanted, grid

    with runner.signals() as received:
        sweep = Sweep(plan)
        if plan.sampler == "grid":
            wanted = grid(plan.space, options.seeds)
            sweep.train(wanted, received, resume=True)
        else:
            wanted = [Wanted(0, {}, trial) for trial in range(options.trials)]
            sweep.train(wanted, received, resume=True)
            best = result.best(sweep, wanted)
            wanted += [Wanted(seed, best) for seed in range(1, options.seeds) if best]
            sweep.train(wanted, received, resume=True)
    outcome, failed = result.outcome(sweep, wanted)
    print(outcome)
    outcome.save(plan.out, "sweep")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lit_fanions.sweep",
        usage="%(prog)s --config FILE [--set ... | --tune ...] [--OPTION VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("--set", metavar="NAME=VALUE,...", help="values of an option of fit", **several)
    add(
        "--tune",
        metavar="NAME=LOW:HIGH[:log][:int]",
        help="range of an option of fit to search (default, without --set too: of the matrices "
        "the recipe's lr, from a tenth to ten times, and momentum from .5 to .99)",
        **several,
    )
    add("--seeds", type=int, default=SEEDS, metavar="N", help=f"seeds 0 to N-1 (default: {SEEDS})")
    add(
        "--sampler",
        choices=("grid", "random", "tpe"),
        help="who combines the values (default: grid, or tpe with --tune or --trials)",
    )
    add("--trials", type=int, metavar="N", help=f"settings of a search (default: {TRIALS})")
    add(
        "--prune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether a search ends trainings that are worse than the median of those before",
    )
    add("--metric", default=METRIC, metavar="NAME", help=f"whose last value counts ({METRIC})")
    add(
        "--direction",
        choices=("minimize", "maximize"),
        help="where it is better (default: maximize if its name has acc in it)",
    )
    add("--jobs", type=int, metavar="N", help="trainings at a time (default: one per GPU, or 1)")
    add("--retry-failed", action="store_true", help="try again what failed in earlier calls")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="of the outcome (default: sweeps/RECIPE, and -SAMPLER)",
    )
    add("--study", metavar="NAME", help="in the storage (default: the last part of --out)")
    add(
        "--storage",
        metavar="URL",
        help="of any database that SQLAlchemy knows (default: SQLite, DIR/study.db)",
    )
    return parser


def _plan(options: argparse.Namespace, recipe: Sequence[str]) -> Plan:
    """Check what was given, as far as that is possible before anything is trained."""
    from lit_fanions.cli.app import Reader
    from lit_fanions.sweep.study import Plan

    searches = options.tune or options.trials is not None
    sampler: Sampler = options.sampler or ("tpe" if searches else "grid")
    if searches and sampler == "grid":
        raise Refused("--tune and --trials are for a search: choose --sampler tpe or random")
    options.trials = TRIALS if options.trials is None else options.trials
    for name in ("seeds", "trials", "jobs"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise Refused(f"--{name} must be at least 1, not {count}")
    if not (files := config_files(recipe)):
        raise Refused("give a recipe: --config FILE")
    given = space.parse(options.set, options.tune)
    runner.refuse([*recipe, *(f"--{name}" for name in given)], RESERVED)
    swept = {
        f"--{space.short(name)}": "choose its values in --set or --tune alone" for name in given
    }
    runner.refuse(recipe, swept)
    reader = Reader(["fit", *recipe])
    fit = reader.config.fit
    if not given and sampler != "grid":
        given = _around(fit)
    first = {name: values.examples()[0] for name, values in given.items()}
    for name, values in given.items():
        for value in values.examples():
            tried = {**first, name: value}
            reader.read(["fit", *recipe, *(f"--{name}={value}" for name, value in tried.items())])
    devices = _devices(fit.trainer.accelerator)
    stem = Path(files[0]).stem
    out = options.out or Path("sweeps", stem if sampler == "grid" else f"{stem}-{sampler}")
    maximize = "acc" in options.metric.lower()
    return Plan(
        recipe=tuple(recipe),
        space=given,
        sampler=sampler,
        metric=options.metric,
        direction=options.direction or ("maximize" if maximize else "minimize"),
        prune=options.prune,
        retry_failed=options.retry_failed,
        out=out,
        study=options.study or out.resolve().name,
        storage=options.storage,
        jobs=options.jobs or max(1, len(devices)),
        devices=devices,
    )


def _around(fit: Any) -> space.Space:
    """Ranges of the matrices' lr and momentum around those of a recipe."""
    option = "model.init_args.optimizer.matrix"
    try:
        lr = float(fit[f"{option}.lr"])
    except (KeyError, TypeError):
        raise Refused(f"this recipe states no {option}.lr: say what to --tune") from None
    ranges = [f"{option}.lr={lr / 10:g}:{lr * 10:g}:log", f"{option}.momentum=0.5:0.99"]
    return space.parse([], ranges)


def _devices(accelerator: str) -> tuple[str, ...]:
    """The GPUs that a recipe may use, as CUDA_VISIBLE_DEVICES names them."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count())))


if __name__ == "__main__":
    raise SystemExit(main())

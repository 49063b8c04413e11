r"""Train a recipe at many settings with many seeds, on one machine or several.

  python -m lit_fanions.sweep --config configs/quickstart.yaml --metric val/acc \
      --set model.optimizer.matrix.alpha=-.1,0,.5,1 --seeds 10
  python -m lit_fanions.sweep --config configs/quickstart.yaml --metric val/acc --trials 30 \
      --tune model.optimizer.matrix.lr=1e-3:1:log model.optimizer.matrix.momentum=.5:.99

The first command trains every combination of values with every seed. In the second, Optuna's TPE
(or --sampler random) chooses 30 settings, which are trained with seed 0. Trainings that fall behind
are pruned, and the best setting is trained with the other seeds too. Each training is a process
with its own GPU; without a GPU, --jobs trainings share the processor. All other options are passed
to fit for every training.

The trainings are recorded in an Optuna study, by default a journal in --out. The same command
continues a sweep that was stopped or killed. Finished trainings are never repeated: with more
values, seeds or trials, only the new ones are trained. Several commands can work on one sweep if
they share --out, or --storage (MySQL or PostgreSQL, also from several machines) and --study. The
results are a table, CSV, JSON and a picture in --out; the logs of all trainings are in --out/runs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_fanions.__main__ import exit_status
from lit_fanions.cli import console, curves, runner
from lit_fanions.cli.console import Refused, refuse_mistyped, refuse_reserved
from lit_fanions.cli.errors import config_files
from lit_fanions.cli.results import plural
from lit_fanions.sweep.plan import Plan, Request, Sampler, Space, grid_requests, parse, short

SEEDS, TRIALS, METRIC = 3, 30, "val/loss"
RESERVED = {
    "--seed_everything": "use --seeds N",
    "--trainer.logger": "the logs are kept in --out",
    "--trainer.devices": "each training has one device; use --jobs N for several at a time",
    "--ckpt_path": "all trainings start from scratch",
}

_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
_COUNT: dict[str, Any] = {"type": int, "metavar": "N"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "--set": {"help": "values of an option of fit", "metavar": "NAME=VALUE,...", **_SEVERAL},
    "--tune": {
        "help": "range of an option of fit to search (default, if --set is not used either: lr of "
        "the matrices from a tenth to ten times the recipe's, and momentum from .5 to .99)",
        "metavar": "NAME=LOW:HIGH[:log][:int]",
        **_SEVERAL,
    },
    "--seeds": {"help": f"seeds 0 to N-1 (default: {SEEDS})", "default": SEEDS, **_COUNT},
    "--sampler": {
        "help": "how values are combined (default: grid, or tpe with --tune or --trials)",
        "choices": ("grid", "random", "tpe"),
    },
    "--trials": {"help": f"number of settings in a search (default: {TRIALS})", **_COUNT},
    "--prune": {
        "help": "end trainings of a search that are worse than the median of those before",
        "action": argparse.BooleanOptionalAction,
        "default": True,
    },
    "--metric": {
        "help": f"scalar whose last value counts (default: {METRIC})",
        "metavar": "NAME",
        "default": METRIC,
    },
    "--direction": {
        "help": "which values are better (default: by the metric's name, such as loss or acc)",
        "choices": ("minimize", "maximize"),
    },
    "--jobs": {"help": "trainings at a time (default: one per GPU, or 1)", **_COUNT},
    "--retry-failed": {
        "help": "repeat trainings that failed in earlier calls",
        "action": "store_true",
    },
    "--out": {
        "help": "folder of the sweep (default: sweeps/RECIPE, for a search sweeps/RECIPE-SAMPLER)",
        "type": Path,
        "metavar": "DIR",
    },
    "--study": {"help": "name in the storage (default: the name of --out)", "metavar": "NAME"},
    "--storage": {
        "help": "database of the study, for several machines (default: a journal in --out)",
        "metavar": "URL",
    },
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit status.

    The status is 0, 1 if a training failed, 130 after Ctrl-C and 143 after SIGTERM. Mistakes in the
    command line or the configuration exit with status 2.
    """
    parser = _parser()
    options, recipe = parser.parse_known_args(args)
    try:
        refuse_mistyped(recipe, parser)
        console.require("optuna", "a sweep")
        return run(options, recipe)
    except Refused as error:
        parser.error(str(error))
    except (KeyboardInterrupt, runner.Stopped) as error:
        print("stopped; the same command continues the sweep", file=sys.stderr)
        return error.status if isinstance(error, runner.Stopped) else 130


def run(options: argparse.Namespace, recipe: Sequence[str]) -> int:
    """Train, tabulate and plot; return the exit status: 0, or 1 if a training failed.

    ``recipe`` are arguments of fit; one that fit would refuse ends the process with its message.
    """
    plan = _plan(options, recipe)
    # Not above, because these import Optuna, which may not be installed.
    from lit_fanions.sweep import result
    from lit_fanions.sweep.study import Sweep

    with runner.signals() as received:
        sweep = Sweep(plan)
        print(_summary(plan, options.seeds, options.trials), flush=True)
        if plan.searches:
            requests = [Request(0, {}, trial) for trial in range(options.trials)]
        else:
            requests = grid_requests(plan.space, options.seeds)
        sweep.train(requests, received)
        if plan.searches and (best := result.best_settings(sweep, requests)):
            requests += [Request(seed, best) for seed in range(1, options.seeds)]
            sweep.train(requests, received)
    outcome, failed = result.summarize(sweep, requests)
    print(outcome)
    outcome.save(plan.out, "sweep")
    return int(failed)


def _summary(plan: Plan, seeds: int, trials: int) -> str:
    if not plan.searches:
        settings = math.prod(len(values.examples()) for values in plan.space.values())
        what = f"{plural(settings, 'setting')} with {plural(seeds, 'seed')} each"
    else:
        what = f"{plural(trials, 'setting')} chosen by {plan.sampler}"
        if seeds > 1:
            what += f", the best of them with {plural(seeds, 'seed')}"
    return f"sweep {plan.study}: {what}; {plan.direction} {plan.metric}"


def _parser() -> argparse.ArgumentParser:
    usage = "%(prog)s --config FILE [--set ... | --tune ...] [--OPTION VALUE ...]"
    parser = console.CommandParser("sweep", __doc__, usage)
    for name, options in _OPTIONS.items():
        parser.add_argument(name, **options)
    return parser


def _plan(options: argparse.Namespace, recipe: Sequence[str]) -> Plan:
    """Check the options, as far as that is possible before anything is trained."""
    from lit_fanions.cli.app import Reader

    searches = options.tune or options.trials is not None
    sampler: Sampler = options.sampler or ("tpe" if searches else "grid")
    if searches and sampler == "grid":
        raise Refused("--tune and --trials need a search: use --sampler tpe or --sampler random")
    options.trials = TRIALS if options.trials is None else options.trials
    console.check_counts(options, "seeds", "trials", "jobs")
    if not (files := config_files(recipe)):
        raise Refused("give a recipe: --config FILE")
    given = parse(options.set, options.tune)
    refuse_reserved([*recipe, *(f"--{name}" for name in given)], RESERVED)
    refuse_reserved(
        recipe, {f"--{short(name)}": "--set or --tune gives its values" for name in given}
    )
    reader = Reader(["fit", *recipe])
    fit = reader.config.fit
    if not given and sampler != "grid":
        given = _default_ranges(fit)
    first = {name: values.examples()[0] for name, values in given.items()}
    for name, values in given.items():
        for value in values.examples():
            options_of_fit = {**first, name: value}.items()
            reader.read(["fit", *recipe, *(f"--{key}={text}" for key, text in options_of_fit)])
    devices = _devices(fit.trainer.accelerator)
    stem = Path(files[0]).stem
    out = options.out or Path("sweeps", stem if sampler == "grid" else f"{stem}-{sampler}")
    jobs = options.jobs or max(1, len(devices))
    _check_storage(options.storage, out, jobs)
    if not (sign := curves.direction(options.metric)) and not options.direction:
        raise Refused(f"--metric {options.metric}: say which values are better by --direction")
    return Plan(
        recipe=tuple(recipe),
        space=given,
        sampler=sampler,
        metric=options.metric,
        direction=options.direction or ("maximize" if sign > 0 else "minimize"),
        prune=options.prune,
        retry_failed=options.retry_failed,
        out=out,
        study=options.study or out.resolve().name,
        storage=options.storage,
        jobs=jobs,
        devices=devices,
    )


def _check_storage(url: str | None, out: Path, jobs: int) -> None:
    """Refuse storages in which trainings would be repeated."""
    if url is not None and url.startswith("sqlite") and jobs > 1:
        raise Refused(
            "--storage: in SQLite, two trainings at a time may take the same trial: use --jobs 1, "
            "MySQL or PostgreSQL, or leave --storage out"
        )
    if url is None and (old := out / "study.db").exists():
        raise Refused(
            f"{old} was made by an earlier version: continue it with --storage sqlite:///{old} "
            "--jobs 1, or choose another --out"
        )


def _default_ranges(fit: Any) -> Space:
    """Return ranges for the lr and momentum of the matrices, around the lr of a recipe."""
    option = "model.init_args.optimizer.matrix"
    try:
        lr = float(fit[f"{option}.lr"])
    except (KeyError, TypeError):
        raise Refused(f"the recipe has no {option}.lr: choose ranges with --tune") from None
    ranges = [f"{option}.lr={lr / 10:g}:{lr * 10:g}:log", f"{option}.momentum=0.5:0.99"]
    return parse([], ranges)


def _devices(accelerator: str) -> tuple[str, ...]:
    """Return the GPUs that a recipe may use, as CUDA_VISIBLE_DEVICES names them."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count())))


if __name__ == "__main__":
    raise SystemExit(exit_status(main))

r"""Train recipes over the same seeds in turns, and save each test result as it comes.

All runs are made in one process, so that only the first one pays for imports and data, or in
--jobs processes that share the GPU, which gives more seeds in the same time.

  python -m experiments.gpu.seeds --seeds 40 --jobs 4 --json airbench.jsonl \
      --config configs/airbench/muon.yaml configs/airbench/f_muon.yaml

All options of fit are accepted.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from experiments.bench import race
from experiments.gpu.training import QUIET, StepClock
from lit_fanions.cli import console


def train_seeds(options: argparse.Namespace, fit: Sequence[str]) -> None:
    """Train every recipe with every seed, and append the results to a JSON Lines file.

    Args:
        options: Options of the command.
        fit: Arguments of fit.

    Raises:
        Refused: If jsonargparse is missing.
    """
    console.require("jsonargparse", "training a recipe")
    from experiments.bench.recipe import builder

    with contextlib.ExitStack() as stack:
        recipes = {
            path: stack.enter_context(builder("--config", str(path), *QUIET, *fit))()
            for path in options.config
        }
        data = {path: recipe.datamodule for path, recipe in recipes.items()}
        for seed in range(
            options.first, options.first + options.seeds * options.stride, options.stride
        ):
            for path, recipe in recipes.items():
                start = time.perf_counter()
                pl.seed_everything(seed, verbose=False)
                recipe.instantiate_classes()  # a new model and a new trainer
                trainer, clock = recipe.trainer, StepClock(every_step=False)
                trainer.callbacks.append(clock)  # type: ignore[attr-defined]
                # The first data module keeps its images on the device.
                trainer.fit(recipe.model, datamodule=data[path])
                metrics = trainer.test(recipe.model, datamodule=data[path], verbose=False)
                on_gpu = trainer.strategy.root_device.type == "cuda"
                result = {
                    "recipe": path.stem,
                    "seed": seed,
                    "train_seconds": clock.times[-1] - clock.times[0],
                    "seconds": time.perf_counter() - start,
                    "steps": trainer.global_step,
                    "warm": seed > options.first,
                    "shared": options.shared,
                    "peak_MiB": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
                    **metrics[0],
                }
                with options.json.open("a") as file:  # one short write: processes share the file
                    file.write(json.dumps(result) + "\n")


def start_jobs(options: argparse.Namespace, fit: Sequence[str]) -> int:
    """Deal the seeds out to processes and wait for them; return the largest exit status."""
    processes = []
    for job in range(min(options.jobs, options.seeds)):
        seeds = len(range(job, options.seeds, options.jobs))
        own = {"first": options.first + job, "seeds": seeds, "stride": options.jobs}
        arguments = [f"--{name}={value}" for name, value in own.items()]
        command = [sys.executable, "-m", "experiments.gpu.seeds", *arguments, "--shared"]
        recipes = ["--config", *map(str, options.config), "--json", str(options.json)]
        processes.append(subprocess.Popen([*command, *recipes, *fit]))
    return max(process.wait() for process in processes)


def main(args: Sequence[str] | None = None) -> int:
    """Train the recipes.

    Args:
        args: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="JSON Lines")
    parser.add_argument("--seeds", type=race.whole, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--stride", type=race.whole, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=race.whole, default=1, help="processes (default: 1)")
    options, fit = parser.parse_known_args(args)
    try:
        if options.jobs > 1:
            return start_jobs(options, fit)
        train_seeds(options, fit)
    except console.Refused as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Kill trainings and fill their disk: what survives (docs/reliability.md).

`python -m experiments.faults kills --out DIR` ends trainings by SIGKILL at random moments, resumes
each from its last checkpoint, and compares the final checkpoint with that of a run that was not
killed, bit by bit.

`python -m experiments.faults disk --out DIR` trains on file systems of 4, 8, 12, ... kB, so that
each write in turn meets a full disk. It mounts them in DIR, which needs root (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_fanions.cli.console import Table
from lit_fanions.progress import Progress

SAVING = (
    "[{class_path: ModelCheckpoint, init_args: {dirpath: %s, save_last: true, save_top_k: 0,"
    " every_n_train_steps: 2}}]"
)
COMMAND_LINE = "lit_fanions.cli.app"
RECIPES = {
    "airbench": ["--config=configs/quickstart.yaml", "--trainer.max_epochs=4"],
    "nanogpt": [
        *("--config=configs/nanogpt/quickstart.yaml", "--trainer.max_steps=20"),
        *("--model.sample_tokens=0", "--data.val_every_n_steps=10", "--data.batch_tokens=512"),
        *("--data.micro_batch_size=2", "--data.val_tokens=4096"),
    ],
}
COMMON = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if something was lost."""
    command = argparse.ArgumentParser(prog="python -m experiments.faults", description=__doc__)
    command.add_argument("fault", choices=["kills", "disk"])
    command.add_argument("--out", type=Path, required=True, help="an empty folder")
    command.add_argument("--recipe", choices=RECIPES, action="append", help="default: all")
    command.add_argument("--kills", type=int, default=20, help="for each recipe (default: 20)")
    command.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = command.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    importlib.import_module(COMMAND_LINE)  # for the trainings, which are forks of this process
    recipes = options.recipe or list(RECIPES)
    if options.fault == "disk":
        table, lost = fill_disks(options.out, recipes)
    else:
        table, lost = kill_trainings(options.out, recipes, options.kills, options.seed)
    print(table)
    return int(lost > 0)


def kill_trainings(out: Path, recipes: Sequence[str], kills: int, seed: int) -> tuple[Table, int]:
    """Return a table with a row for each recipe, and how many checkpoints or runs were lost."""
    rows: list[list[object]] = []
    lost = 0
    progress = Progress(kills * len(recipes))
    for name in recipes:
        start = time.monotonic()
        assert start_training(name, out / name / "whole").wait() == 0
        whole_time = time.monotonic() - start
        moments = random.Random(seed)
        killed = runs = writing = damaged = different = 0
        while killed < kills:
            folder = out / name / f"killed{runs}"
            while True:
                training = start_training(name, folder)
                status = wait_for_moment(training, folder / "last.ckpt", moments, whole_time)
                if status is not None or killed == kills:
                    break
                training.kill()
                killed += 1
                print(progress.advance(name, "killed"), file=sys.stderr, flush=True)
                writing += any(folder.glob(".*.partial"))
                damaged += not is_whole(folder / "last.ckpt")
            status = training.wait() if status is None else status
            runs += 1
            whole, own = (out / name / part / "last.ckpt" for part in ("whole", folder.name))
            different += status != 0 or not are_equal(load(whole), load(own))
        lost += damaged + different
        rows.append([name, killed, writing, damaged, runs, runs - different])
    headings = [
        "recipe", "kills", "while a file was written", "damaged checkpoints", "runs", "bit-equal",
    ]  # fmt: skip
    return Table("SIGKILL", headings, rows), lost


def wait_for_moment(
    training: Training, last: Path, moments: random.Random, whole_time: float
) -> int | None:
    """Wait for the moment of a kill: of four, one at any time, three after a checkpoint.

    Returns:
        The exit status if the training ends before, otherwise None.
    """
    if moments.random() < 0.25:
        return training.wait(moments.uniform(0, whole_time))
    before = last.stat().st_mtime_ns if last.exists() else 0
    while not last.exists() or last.stat().st_mtime_ns == before:
        if (status := training.wait(0.02)) is not None:
            return status
    return training.wait(moments.uniform(0, whole_time / 20))


def fill_disks(out: Path, recipes: Sequence[str]) -> tuple[Table, int]:
    """Return a table with a row for each recipe, and how many runs left no word or no file."""
    rows: list[list[object]] = []
    lost = 0
    for name in recipes:
        ends = {"done": 0, "named": 0, "other": 0}
        size = step = 4
        while not ends["done"]:
            with file_system(out / "disk", size) as folder:
                training = start_training(name, folder / "run", logger=True)
                status = training.wait()
                last = training.output().splitlines()[-1:]
                named = status == 1 and last and str(folder) in last[0]
                ends["done" if status == 0 else "named" if named else "other"] += 1
                print(f"{name}, {size} kB: status {status}", file=sys.stderr, flush=True)
                if "Traceback" in training.output() or not is_whole(folder / "run/last.ckpt"):
                    ends["other"] += 1
            size += step
            step = max(4, size // 16 // 4 * 4)
        lost += ends["other"]
        rows.append([name, f"4 to {size} kB", ends["named"], ends["done"], ends["other"]])
    headings = ["recipe", "sizes", "status 1, file or folder named", "status 0", "anything else"]
    return Table("Full disk", headings, rows), lost


class Training:
    """A fit in a forked process, which need not import anything."""

    def __init__(self, args: Sequence[str], log: Path) -> None:
        self._log = log
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(args,), daemon=True
        )
        self._process.start()

    def _run(self, args: Sequence[str]) -> None:
        with self._log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            status = importlib.import_module(COMMAND_LINE).main(args)
        except SystemExit as stop:
            status = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit status, or None after some seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """End it by SIGKILL."""
        os.kill(self._process.pid or 0, signal.SIGKILL)
        self._process.join()

    def output(self) -> str:
        """Return what it has printed."""
        return self._log.read_text()


def start_training(name: str, folder: Path, logger: bool = False) -> Training:
    """Start a recipe with checkpoints in a folder, from its last one if there is one."""
    log = folder.parent.parent if logger else folder.parent
    log.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    args = ["fit", *RECIPES[name], *COMMON, "--trainer.callbacks", SAVING % folder]
    if logger:
        args += ["--trainer.logger=true", f"--trainer.default_root_dir={folder.parent}"]
    args += ["--ckpt_path", str(last)] if last.exists() else []
    return Training(args, log / f"{name}-{folder.name}.txt")


def is_whole(path: Path) -> bool:
    """Return True unless a checkpoint exists and is damaged."""
    from lit_fanions.cli._checkpoint_io import check_checkpoint

    with contextlib.suppress(FileNotFoundError):
        try:
            check_checkpoint(path)
        except ValueError:
            return False
    return True


def load(path: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that decides how a run goes on."""
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in ("global_step", "state_dict", "optimizer_states")}


def are_equal(a: Any, b: Any) -> bool:
    """Return True if two nested values are the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(are_equal, a, b))
    return bool(a == b)


@contextlib.contextmanager
def file_system(folder: Path, size: int) -> Iterator[Path]:
    """Mount an empty file system of some kB."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    raise SystemExit(main())

"""Compare the weights of the same trainings in two checkouts, bit by bit.

A change that should not change numbers must leave the weights of every algorithm and recipe equal
to the last bit. This command trains small cases in both checkouts, each in a process of its own on
one thread, and lists the cases whose weights differ:

  git worktree add ../before main
  python -m experiments.same_numbers --before ../before

The cases are in ``same_numbers_trainings``: every algorithm that both checkouts know, with its
defaults and with options that change the step, and recipes of configs/ through the command line on
data that is made here. Cases that only one checkout has are listed and not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_fanions.cli import console, tensors
from lit_fanions.progress import Meter

TRAININGS = Path(__file__).with_name("same_numbers_trainings.py")
CHECKOUT = Path(__file__).parents[1]
EQUAL, ONLY_BEFORE, ONLY_AFTER = "equal", "only before", "only after"
# The weights of a case by the parameters' names, or the error that it ended with.
Result = Mapping[str, Tensor] | str


def compare(before: Result | None, after: Result | None) -> str:
    """Return how a case's weights differ, or EQUAL, ONLY_BEFORE or ONLY_AFTER.

    Args:
        before: Result of the case in the old checkout; None if it does not have the case.
        after: Result in the new checkout.
    """
    if before is None or after is None:
        return ONLY_AFTER if before is None else ONLY_BEFORE
    for when, result in (("before", before), ("after", after)):
        if isinstance(result, str):
            return f"failed {when}: {result}"
    assert not isinstance(before, str)
    assert not isinstance(after, str)
    return tensors.difference(before, after) or EQUAL


def train(
    checkouts: Sequence[Path], folder: Path, steps: int, prefixes: Sequence[str]
) -> list[dict[str, Result]]:
    """Train the cases in every checkout, at the same time.

    Args:
        checkouts: Folders that hold lit_fanions, models, datamodules and configs.
        folder: Where data, logs and weights go.
        steps: Number of optimizer steps.
        prefixes: Train the cases whose names start with one of these; empty: all.

    Returns:
        The results by case, for each checkout.

    Raises:
        Refused: If a process fails before it has trained its cases.
    """
    places = [folder / str(i) for i in range(len(checkouts))]
    processes = []
    for checkout, place in zip(checkouts, places, strict=True):
        place.mkdir()
        chosen = json.dumps([*prefixes] or [""])
        with (place / "log.txt").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, TRAININGS, checkout, place, str(steps), chosen],
                    cwd=checkout,
                    env=os.environ
                    | {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    with Meter(f"training in {len(places)} checkouts", 1.0) as meter:
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            meter.reach(min(map(_share, places)))
    statuses = [process.wait() for process in processes]
    for checkout, place, status in zip(checkouts, places, statuses, strict=True):
        if status:
            lines = (place / "log.txt").read_text(errors="replace").splitlines()
            raise console.Refused(f"{checkout}: {lines[-1] if lines else f'status {status}'}")
    return [torch.load(place / "weights.pt") for place in places]


def _share(place: Path) -> float:
    """Return the share of the cases that a process has trained."""
    try:
        return float((place / "share.txt").read_text())
    except (FileNotFoundError, ValueError):  # not begun, or being written
        return 0.0


def main(args: Sequence[str] | None = None) -> int:
    """Compare two checkouts.

    Args:
        args: The arguments; by default those of the process.

    Returns:
        0 if all weights of all common cases are equal, 1 if not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.same_numbers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument(
        "--after", type=Path, default=CHECKOUT, metavar="CHECKOUT", help="default: this one"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="CASE",
        help="cases whose names start so, as algorithms, recipes/airbench or 'algorithms/muon'",
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what the runs printed")
    options = parser.parse_args(args)
    checkouts = [options.before.resolve(), options.after.resolve()]
    for checkout in checkouts:
        if not (checkout / "lit_fanions" / "__init__.py").is_file():
            parser.error(f"{checkout} holds no lit_fanions")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            before, after = train(checkouts, folder.resolve(), options.steps, options.only)
        except console.Refused as error:
            parser.error(str(error))
    answers = {case: compare(before.get(case), after.get(case)) for case in {**before, **after}}
    if not answers:
        parser.error(f"no case starts with {' or '.join(options.only)}")
    print(console.table(["case", "weights"], [[*answer] for answer in answers.items()]))
    common = [answer for answer in answers.values() if answer not in (ONLY_BEFORE, ONLY_AFTER)]
    equal = common.count(EQUAL)
    print(f"\nafter {options.steps} steps, {equal} of {len(common)} common cases are equal")
    return int(equal < len(common))


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m experiments.gpu`: see `experiments.gpu`."""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import experiments.gpu
from experiments.bench import race, report
from experiments.gpu.items import full_items, quick_items, summary
from experiments.gpu.schedule import NO_TIME, OK, ROOT, run_items
from lit_fanions.cli import console


def main(args: Sequence[str] | None = None) -> int:
    """Run what the time allows, print a table, and save it beside the items' own results.

    Args:
        args: Arguments; None: those of the process.

    Returns:
        0 if every item that was started ended well, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu",
        description=experiments.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "gpu", metavar="FOLDER", help="for the results"
    )
    parser.add_argument(
        "--seconds", type=race.positive, default=560.0, help="time for everything (default: 560)"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="ITEM", help="some items only")
    parser.add_argument(
        "--cifar10",
        type=Path,
        default=Path(os.environ.get("CIFAR10_DIR", ROOT / "data" / "cifar10")),
        metavar="FOLDER",
        help="of CIFAR-10's train.pt and test.pt (default: $CIFAR10_DIR, or data/cifar10)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes on the CPU, to see that it works"
    )
    options = parser.parse_args(args)
    if not options.quick and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --quick tries the items on the CPU")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    items = quick_items(out) if options.quick else full_items(out, options.cifar10.resolve())
    unknown = [name for name in options.only if name not in [item.name for item in items]]
    if unknown:
        names = ", ".join(item.name for item in items)
        parser.error(f"--only {unknown[0]}: choose from {names}")
    chosen = [item for item in items if not options.only or item.name in options.only]
    for path in (
        out / f"{item.name}{end}" for item in chosen for end in (".json", ".jsonl", ".xml")
    ):
        path.unlink(missing_ok=True)  # results of an earlier run
    start = time.monotonic()
    rows: list[list[Any]] = []
    for ending in run_items(chosen, options.seconds, out / "log.txt"):
        seconds = round(ending.seconds, 1)
        rows.append([ending.name, ending.status, seconds, summary(ending.name, out)])
        passed = f"[{time.monotonic() - start:.0f} of at most {options.seconds:.0f} s]"
        print(passed, *rows[-1], flush=True)
    columns = ["item", "status", "seconds", "result"]
    device = torch.device("cpu" if options.quick else "cuda")
    facts = {"commit": commit(), "quick": options.quick, "machine": console.machine()}
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    (out / "results.json").write_text(json.dumps({**facts, "items": found}, indent=2) + "\n")
    print(f"\n{console.table(columns, rows)}\n\n{report.machine_line(device)}")
    return int(any(row[1] not in (OK, NO_TIME) for row in rows))


def commit() -> str | None:
    """Return the commit of the checkout; None without git."""
    try:
        ended = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ended.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())

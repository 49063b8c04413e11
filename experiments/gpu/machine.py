"""Measure what bounds a training on this machine: memory, products, launches, factorisations."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.bench import race
from lit_fanions.cli import console

# Batches of square matrices, as (batch, size); columns of the tall matrices that are factorised.
PRODUCTS = ((1, 8192), (1, 4096), (48, 768), (14, 768), (7, 768), (8, 2048))
TALL = ((48, 768, 16), (12, 3072, 16), (48, 768, 40), (1, 5000, 8), (1, 5000, 32))
QUICK_PRODUCTS, QUICK_TALL = ((1, 64), (4, 32)), ((4, 32, 8),)
_LAUNCHES = 1000


def measure(device: torch.device, *, quick: bool) -> dict[str, object]:
    """Return the machine's limits.

    Args:
        device: Device to measure.
        quick: Use tiny sizes.
    """

    def seconds(work: Callable[[], object], repeats: int = 5) -> float:
        work()
        return statistics.median(race.timed(work, device)[0] for _ in range(repeats))

    source = torch.randn(2**16 if quick else 2**30, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    rates = {}
    for batch, n in QUICK_PRODUCTS if quick else PRODUCTS:
        x = torch.randn(batch, n, n, device=device, dtype=torch.bfloat16)
        rates[f"{batch}x{n}x{n}"] = 2 * batch * n**3 / seconds(lambda x=x: torch.bmm(x, x)) / 1e12  # type: ignore[misc]
    tiny = torch.zeros(8, device=device)
    launches = seconds(lambda: [tiny.add_(1) for _ in range(_LAUNCHES)])
    factorisations = {}
    for shape in QUICK_TALL if quick else TALL:
        x = torch.randn(*shape, device=device)
        gram = (x.mT @ x).double()
        name = "x".join(map(str, shape))
        for what, work in (
            (f"qr {name}", lambda x=x: torch.linalg.qr(x)),
            (f"cholesky_ex of its Gram matrix, {name}", lambda g=gram: torch.linalg.cholesky_ex(g)),
            (f"eigh of its Gram matrix, {name}", lambda g=gram: torch.linalg.eigh(g)),
        ):
            factorisations[what] = 1e3 * seconds(work)
    return {
        "machine": console.machine(),
        "device": str(device),
        "copy_GB_s": copy / 1e9,
        "bf16_TFLOP_s": rates,
        "launch_us": 1e6 * launches / _LAUNCHES,
        "factorisations_ms": factorisations,
    }


def main(args: Sequence[str] | None = None) -> int:
    """Measure the machine and save the numbers.

    Args:
        args: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", type=race.device, default="auto", metavar="auto|cpu|cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args(args)
    found = measure(options.device, quick=options.quick)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(options.json.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time optimizer steps of a NanoGPT recipe on random bytes: tokens a second, MFU, peak memory.

  python -m experiments.gpu.throughput --config configs/nanogpt/track3_muon.yaml --json FILE

All options of fit are accepted.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import race
from experiments.gpu.training import QUIET, StepClock
from lit_fanions.cli import console

# Dense bf16 operations a second by the datasheets of the SXM modules.
PEAKS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12}


def measure(options: argparse.Namespace, fit: Sequence[str]) -> dict[str, Any]:
    """Train some steps of a recipe and return their times.

    Args:
        options: Options of the command.
        fit: Arguments of fit.

    Raises:
        Refused: If jsonargparse is missing.
    """
    console.require("jsonargparse", "training a recipe")
    from experiments.bench.recipe import builder

    with tempfile.TemporaryDirectory() as folder:
        _write_shards(Path(folder), options.tokens)
        data = f"--data.data_dir={folder}", "--data.tokenizer=bytes", "--data.shards=1"
        limits = f"--trainer.max_steps={options.steps}", "--model.sample_tokens=0"
        given = "--config", str(options.config), *QUIET, *data, *limits, "--model.network.bos=256"
        with builder(*given, *fit) as build:
            recipe, clock = build(), StepClock(every_step=True)
            recipe.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
            recipe.trainer.fit(recipe.model, datamodule=recipe.datamodule)
    seconds = [end - start for start, end in itertools.pairwise(clock.times)]
    # The first third includes compilation, and steps before the allocator has settled.
    step = statistics.median(seconds[len(seconds) // 3 :])
    on_gpu = recipe.trainer.strategy.root_device.type == "cuda"
    batch = recipe.datamodule.batch_tokens
    network: Any = recipe.model.network
    flops = 3 * network.flops_per_token(recipe.datamodule.sequence_length)
    card = torch.cuda.get_device_name() if on_gpu else ""
    peak = next((rate for name, rate in PEAKS.items() if name in card), None)
    return {
        "machine": console.machine(),
        "recipe": options.config.stem,
        "options": list(fit),
        "first_step_seconds": seconds[0],
        "step_seconds": step,
        "all_step_seconds": seconds,
        "tokens_per_second": batch / step,
        "flops_per_token": flops,
        "model_flops_utilization": flops * batch / step / peak if peak else None,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "loss": float(recipe.trainer.callback_metrics["train/loss"]),
    }


def _write_shards(folder: Path, tokens: int) -> None:
    from datamodules.shards import write_shard

    random = np.random.default_rng(0)
    for name, count in (("train_000001", tokens), ("val_000000", 20_000)):
        text = random.integers(0, 256, count).astype(np.uint16)
        text[::1000] = 256  # the start of a document
        write_shard(folder / f"random_{name}.bin", text)


def main(args: Sequence[str] | None = None) -> int:
    """Time the steps and save the numbers.

    Args:
        args: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    parser.add_argument("--steps", type=race.whole, default=20, help="steps (default: 20)")
    parser.add_argument("--tokens", type=race.whole, default=12_000_000, help=argparse.SUPPRESS)
    options, fit = parser.parse_known_args(args)
    try:
        found = measure(options, fit)
    except console.Refused as error:
        parser.error(str(error))
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

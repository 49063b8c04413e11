r"""Do learning rates transfer from one width of NanoGPT to another?

  python -m experiments.width_transfer coordinates    # half a minute
  python -m experiments.width_transfer sweep          # an hour or two on 2 cores

Both compare `base_width` (models/width_transfer.py) with rules that are common without it: AdamW's
lr for the head at every width, and steps of the RMS of AdamW's for the matrices.

`coordinates` takes a few steps at each width and shows how much the features change. Where the lr
transfers, the changes do not depend on the width: the slopes of their logarithms over that of the
width are 0. `sweep` trains on Python's documentation at several factors on all learning rates and
shows the loss of each. Where the lr transfers, one factor is the best at every width.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bench import race
from lit_fanions.cli import console
from lit_fanions.progress import Progress

HEAD_WIDTH = 32
ADAMW = {"algorithm": "adamw", "momentum": 0.9, "beta2": 0.95, "eps": 1e-10}
LR = {"matrix": 0.02, "other": 0.003}  # at the smallest width
RULES = ("transferred", "as given")


def build(width: int, base_width: int, rule: str, factor: float = 1.0, layers: int = 2) -> Any:
    """Return a NanoGPT.

    Args:
        width: Features of the residual stream.
        base_width: Width that the learning rates are meant for.
        rule: One of ``RULES``.
        factor: Factor on all learning rates.
        layers: Number of blocks.
    """
    from models import NanoGPT

    optimizer = {
        "matrix": {"algorithm": "muon", "lr": factor * LR["matrix"], "scale": "match_rms_adamw"},
        "other": {**ADAMW, "lr": factor * LR["other"]},
        "schedule": {"shape": "linear", "cooldown": 0.7},
    }
    network = {"vocab_size": 257, "context_length": 256, "layers": layers, "bos": 256}
    size = {"width": width, "heads": width // HEAD_WIDTH}
    transfer = base_width if rule == "transferred" else None
    given: tuple[Any, Any] = optimizer, {**network, **size}
    return NanoGPT(*given, base_width=transfer)


# --- coordinates ---


def feature_changes(module: Any, steps: int, seed: int = 0) -> dict[str, float]:
    """Return the RMS by which the features at each place of a network change in some steps.

    Args:
        module: See ``build``; it is trained on one batch of random tokens.
        steps: Number of steps.
        seed: Seed of the tokens.
    """
    from lit_fanions import configure_optimizers

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (8, 65), generator=generator)
    config = module.fanion_config.updated({"schedule": {"shape": "constant"}})
    optimizer = configure_optimizers(module, config, total_steps=steps)["optimizer"]
    before = _features(module.network, tokens[:, :-1])
    for _ in range(steps):
        optimizer.zero_grad()
        module.network(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        optimizer.step()
    after = _features(module.network, tokens[:, :-1])
    return {name: float((after[name] - x).square().mean().sqrt()) for name, x in before.items()}


@torch.no_grad()
def _features(network: Any, tokens: Tensor) -> dict[str, Tensor]:
    features = {}
    places = {"embedding": network.embedding_norm}
    places |= {f"block {i}": block for i, block in enumerate(network.blocks)}
    places |= {"logits": network.head}
    hooks = [
        place.register_forward_hook(
            lambda _, args, output, name=name: features.update({name: output.clone()})
        )
        for name, place in places.items()
    ]
    network(tokens)
    for hook in hooks:
        hook.remove()
    return features


def slopes(changes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Return the slope of each logarithm of a change over the logarithm of the width."""
    widths = [math.log(width) for width in changes]
    return {
        name: statistics.linear_regression(
            widths, [math.log(each[name]) for each in changes.values()]
        ).slope
        for name in next(iter(changes.values()))
    }


def coordinates(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the changes at all widths, and print them with their slopes."""
    from lightning.pytorch import seed_everything

    found: dict[str, Any] = {}
    rows = []
    for rule in options.rules:
        changes = {}
        for width in options.widths:
            seed_everything(options.seed, verbose=False)
            module = build(width, options.widths[0], rule)
            changes[width] = feature_changes(module, options.steps or 4, options.seed)
        found[rule] = {"changes": changes, "slopes": slopes(changes)}
        for name, slope in found[rule]["slopes"].items():
            each = [f"{change[name]:.3g}" for change in changes.values()]
            rows.append([rule, name, *each, f"{slope:+.2f}"])
    print(console.table(["rule", "features", *map(str, options.widths), "slope"], rows))
    return found


# --- sweep ---


def validation_loss(module: Any, options: argparse.Namespace) -> float:
    """Train on Python's documentation, and return the loss in nats per byte."""
    from lightning.pytorch import Trainer

    from datamodules import PydocDataModule

    data = PydocDataModule(shuffle=True, val_tokens=65536)
    trainer = Trainer(
        max_steps=options.steps or 300, accelerator="auto", devices=1, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return metrics["val/loss"]


def _losses(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lightning.pytorch import seed_everything

    progress = Progress(len(options.rules) * len(options.widths) * len(options.factors))
    for rule in options.rules:
        for width in options.widths:
            for factor in options.factors:
                seed_everything(options.seed, verbose=False)
                module = build(width, options.widths[0], rule, factor, layers=4)
                loss = validation_loss(module, options)
                name = f"{rule}, width {width}, lr x {factor:g}"
                print(progress.advance(name, f"{loss:.4f}"), flush=True)
                yield {"rule": rule, "width": width, "factor": factor, "loss": loss}


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train at all widths and factors, and print the losses and each width's best factor."""
    found = list(_losses(options))
    rows = []
    for rule in options.rules:
        for width in options.widths:
            own = [each for each in found if (each["rule"], each["width"]) == (rule, width)]
            best = min(own, key=lambda each: each["loss"])
            rows.append([rule, width, *(f"{each['loss']:.4f}" for each in own), best["factor"]])
    factors = [f"lr x {factor:g}" for factor in options.factors]
    print(console.table(["rule", "width", *factors, "best"], rows))
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.width_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("coordinates", "sweep"))
    parser.add_argument("--widths", type=race.whole, nargs="+", metavar="N", default=(64, 128, 256))
    parser.add_argument("--steps", type=race.whole, metavar="N", help="default: 4, or 300 to sweep")
    factors = [2.0**n for n in range(-3, 4)]
    parser.add_argument("--factors", type=race.positive, nargs="+", default=factors, metavar="X")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, help="default: both")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers")
    options = parser.parse_args(args)
    if any(width % HEAD_WIDTH for width in options.widths):
        parser.error(f"--widths: choose multiples of {HEAD_WIDTH}")
    logging.disable(logging.INFO)  # the split of the parameters, for each network
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {"coordinates": coordinates, "sweep": sweep}[options.command](options)
    finally:
        logging.disable(logging.NOTSET)
    if options.json:
        contents = {"machine": console.machine(), "command": options.command, "results": found}
        options.json.write_text(json.dumps(contents, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

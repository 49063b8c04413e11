"""A whole optimizer step: Fanion's algorithms against torch.optim.Muon.

All matrices of GPT-2 small, with fresh Gaussian gradients in every round. Also how good the
directions of torch and of ours are on matrices of these shapes, and what a step needs of memory
beyond parameters, gradients and state: as a multiple of the largest stack of same-shape
parameters that Fanion handles at once.

  python -m experiments.bench step --layers 12 --plot step.png
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.bench import polar, race
from lit_fanions import Fanion, lmo
from lit_fanions.cli import console
from lit_fanions.optim.stacking import stack_entries

WIDTH, QUICK_WIDTH = 768, 64
COMMON: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
TORCH, OURS, FEWER = "torch.optim.Muon", "muon", "muon, 4 steps"
ALGORITHMS: dict[str, dict[str, Any]] = {
    OURS: {"algorithm": "muon"},
    FEWER: {"algorithm": "muon", "polar_steps": 4},
    "f_muon": {"algorithm": "f_muon"},
    "s_muon": {"algorithm": "s_muon"},
    "neon": {"algorithm": "neon"},
    "fanion, rank 8": {"algorithm": "fanion", "rank": 8},
    "fanion, rank 32": {"algorithm": "fanion", "rank": 32},
    "dion, rank 32": {"algorithm": "dion", "rank": 32},
    "nsgd": {"algorithm": "nsgd"},
    "signum": {"algorithm": "signum"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--layers",
        type=race.whole,
        metavar="N",
        help="blocks of the network: 6 matrices each (default: 12, with --quick 1)",
    )
    race.add_arguments(parser)


def run(options: argparse.Namespace) -> console.Report:
    """Time, judge and measure the steps.

    Args:
        options: ``layers`` and those of ``race.add_arguments``.
    """
    width = QUICK_WIDTH if options.quick else WIDTH
    layers = options.layers or (1 if options.quick else 12)
    shapes = block_shapes(width)
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, device=options.device)) for shape in shapes * layers
    ]
    for p in parameters:
        p.grad = torch.empty_like(p)
    steppers = optimizers(parameters)
    stack = largest_stack(parameters, steppers[OURS])
    seconds = race.take_turns(
        {name: _turn(optimizer) for name, optimizer in steppers.items()},
        repeats=options.repeats,
        device=options.device,
        before=lambda seed: fill_gradients(parameters, seed),
    )
    peaks = {name: peak_bytes(each.step, options.device) for name, each in steppers.items()}
    medians = race.medians(seconds)
    entries: list[dict[str, Any]] = [
        {
            "optimizer": name,
            "seconds": seconds[name],
            "median_seconds": medians[name],
            "ratio_to_torch": medians[name] / medians[TORCH],
            "ratio_to_muon": medians[name] / medians[OURS],
            "peak_bytes": peaks[name],
            "peak_in_stacks": peaks[name] / stack,
        }
        for name in steppers
    ]
    judged = list(_qualities(sorted(set(shapes)), options.device))
    size = sum(p.numel() for p in parameters)
    products = {**polar.products(options.device), "the solvers of rank k": "float32"}
    return console.Report(
        title=f"one optimizer step: {len(parameters)} matrices, {size / 1e6:.3g} million entries",
        columns=["optimizer", "ms", "x torch", "x muon", "extra MiB", "in stacks"],
        rows=[
            [
                entry["optimizer"],
                1e3 * entry["median_seconds"],
                entry["ratio_to_torch"],
                entry["ratio_to_muon"],
                entry["peak_bytes"] / 2**20,
                entry["peak_in_stacks"],
            ]
            for entry in entries
        ],
        notes=[
            f"extra: most memory of a step beyond parameters, gradients and state; a stack: the "
            f"{stack / 2**20:.4g} MiB of same-shape parameters that Fanion handles at once",
            *race.notes(options, products),
        ],
        data={
            **race.conditions(options, products),
            "layers": layers,
            "width": width,
            "stack_bytes": stack,
            "results": entries,
            "quality": judged,
        },
        more=[
            console.Table(
                "<M, D> / |M|_* of the direction D of a matrix M",
                ["shape", "spectrum", TORCH, OURS, FEWER],
                [
                    [
                        polar.shape_text(each["shape"]),
                        each["spectrum"],
                        *(each[name] for name in (TORCH, OURS, FEWER)),
                    ]
                    for each in judged
                ],
            )
        ],
        panels=[
            console.Panel("one optimizer step", "ms", _scale(medians, 1e3)),
            console.Panel("extra memory of a step", "MiB", _scale(peaks, 2**-20)),
        ],
    )


def block_shapes(width: int) -> list[tuple[int, int]]:
    """Return the shapes of a transformer block's matrices: q, k, v, output, and two of the MLP."""
    return [*[(width, width)] * 4, (width, 4 * width), (4 * width, width)]


def optimizers(parameters: list[torch.nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """Return the competitors by name, torch's first, all of them on the same parameters.

    Raises:
        Refused: If torch has no Muon.
    """
    theirs = {TORCH: polar.torch_muon().Muon(parameters, **COMMON)}
    return theirs | {
        name: Fanion(parameters, **COMMON, **options) for name, options in ALGORITHMS.items()
    }


def fill_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    """Fill the gradients with standard normal numbers."""
    for i, p in enumerate(parameters):
        assert p.grad is not None
        generator = torch.Generator(p.device).manual_seed(1000 * seed + i)
        p.grad.normal_(generator=generator)


def largest_stack(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the largest stack of same-shape parameters that Fanion handles at once.

    Args:
        parameters: The parameters, of one dtype and device.
        optimizer: The Fanion that steps them.
    """
    limit = stack_entries(optimizer.param_groups[0], parameters[0].device)
    sizes = []
    for _, same in itertools.groupby(sorted(parameters, key=_shape), key=_shape):
        stack = list(same)
        entries = stack[0].numel()
        sizes.append(entries * min(len(stack), max(1, limit // entries)))
    return max(sizes) * parameters[0].element_size()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that a call has allocated at any time, beyond what there was before.

    Args:
        function: The call.
        device: Whose memory is meant.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted(
        (event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]
    )
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def _turn(optimizer: torch.optim.Optimizer) -> race.Turn:
    return lambda turn: optimizer.step()


def _scale(values: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in values.items()}


def _shape(p: Tensor) -> tuple[int, ...]:
    return tuple(p.shape)


def _qualities(shapes: list[tuple[int, int]], device: torch.device) -> Iterator[dict[str, Any]]:
    """How good the directions of torch and of ours are."""
    for shape in shapes:
        for spectrum, matrix in polar.spectra(shape).items():
            m = matrix.to(device)
            norm = polar.nuclear_norm(m)
            yield {
                "shape": shape,
                "spectrum": spectrum,
                TORCH: polar.quality(m, polar.torch_newton_schulz(m), norm),
                OURS: polar.quality(m, lmo.direction(m), norm),
                FEWER: polar.quality(m, lmo.direction(m, polar_steps=4), norm),
            }


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the profiler's library writes to the standard error away."""
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

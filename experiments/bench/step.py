"""A whole optimizer step: Fanion's algorithms against torch.optim.Muon.

Steps all matrices of GPT-2 small, with fresh Gaussian gradients in every round. Also shown are the
quality of torch's and of our directions on matrices of these shapes, and the memory that a step
needs beyond parameters, gradients and state, as a multiple of the largest stack of same-shape
parameters that Fanion handles at once.

  python -m experiments.bench step --layers 12 --plot step.png
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.bench import polar, race, report, roofline
from lit_fanions import Fanion, lmo
from lit_fanions.cli import console
from lit_fanions.optim.stacking import stack_entries

WIDTH, QUICK_WIDTH = 768, 64
COMMON: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}  # both with Nesterov
TORCH, OURS, FAST = "torch.optim.Muon", "muon", "muon, fast"
ALGORITHMS: dict[str, dict[str, Any]] = {
    OURS: {"algorithm": "muon"},
    FAST: {"algorithm": "muon", "polar": "fast"},
    "f_muon": {"algorithm": "f_muon"},
    "s_muon": {"algorithm": "s_muon"},
    "neon": {"algorithm": "neon"},
    "fanion, rank 8": {"algorithm": "fanion", "rank": 8},
    "fanion, rank 32": {"algorithm": "fanion", "rank": 32},
    "dion, rank 32": {"algorithm": "dion", "rank": 32},
    "nsgd": {"algorithm": "nsgd"},
    "signum": {"algorithm": "signum"},
}
# Where kernels are plain, they would be raced against themselves.
BY_TRITON: dict[str, dict[str, Any]] = {
    "muon, triton": {"algorithm": "muon", "kernels": "triton"},
    "fanion, rank 32, triton": {"algorithm": "fanion", "rank": 32, "kernels": "triton"},
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


def run(options: argparse.Namespace) -> report.Report:
    """Time, judge and measure the steps.

    Args:
        options: ``layers`` and the options of ``race.add_arguments``.
    """
    width = QUICK_WIDTH if options.quick else WIDTH
    layers = options.layers or (1 if options.quick else 12)
    shapes = block_shapes(width)
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, device=options.device)) for shape in shapes * layers
    ]
    for p in parameters:
        p.grad = torch.empty_like(p)
    competitors = optimizers(parameters)
    stack = largest_stack(parameters, competitors[OURS])
    entries = _race(competitors, parameters, stack, options)
    judged = list(_qualities(sorted(set(shapes)), options.device))
    rates = roofline.measure_rates(options.device)
    for entry in entries:
        work = roofline.count(competitors[entry["optimizer"]].step)
        flops = {str(dtype).removeprefix("torch."): x for dtype, x in work.flops.items()}
        entry |= {"flops": flops, "traffic": work.traffic, "seconds_at_rates": rates.seconds(work)}
    size = sum(p.numel() for p in parameters)
    products = {**polar.products(options.device), "the solvers of rank k": "float32"}
    table = console.Table(
        f"one optimizer step: {len(parameters)} matrices, {size / 1e6:.3g} million entries",
        ["optimizer", "ms", "x torch", "x muon", "extra MiB", "in stacks"],
        [_row(entry) for entry in entries],
    )
    notes = [
        f"extra: most memory of a step beyond parameters, gradients and state; a stack: the "
        f"{stack / 2**20:.4g} MiB of same-shape parameters that Fanion handles at once",
        *race.notes(options, products),
    ]
    facts = {"layers": layers, "width": width, "stack_bytes": stack}
    results = {"results": entries, "quality": judged}
    return report.Report(
        title=table.title,
        columns=table.columns,
        rows=table.rows,
        notes=notes,
        data={**race.conditions(options, products), **facts, **results},
        more=[_roofline_table(entries, rates), _quality_table(judged)],
        panels=[
            _panel("one optimizer step", "ms", entries, "median_seconds", 1e3),
            _panel("extra memory of a step", "MiB", entries, "peak_bytes", 2**-20),
        ],
    )


def block_shapes(width: int) -> list[tuple[int, int]]:
    """Return the shapes of a transformer block's matrices: q, k, v, output, two of the MLP."""
    return [*[(width, width)] * 4, (width, 4 * width), (4 * width, width)]


def optimizers(parameters: list[torch.nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """Return the competitors by name, torch's first; all step the same parameters.

    Raises:
        Refused: If this torch has no Muon.
    """
    theirs = {TORCH: polar.torch_muon().Muon(parameters, **COMMON)}
    ours = {**ALGORITHMS, **(BY_TRITON if parameters[0].device.type == "cuda" else {})}
    return theirs | {
        name: Fanion(parameters, **COMMON, **options) for name, options in ours.items()
    }


def fill_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    """Fill the gradients with standard normal numbers.

    Args:
        parameters: Parameters that have gradients.
        seed: Random seed.
    """
    for i, p in enumerate(parameters):
        assert p.grad is not None
        generator = torch.Generator(p.device).manual_seed(1000 * seed + i)
        p.grad.normal_(generator=generator)


def largest_stack(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the largest stack of same-shape parameters that Fanion handles at once.

    Args:
        parameters: Parameters of one dtype and device.
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
    """Return the peak memory of a call, in bytes beyond what was allocated before.

    Args:
        function: The function to call.
        device: Device whose memory is measured.
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


def _race(
    competitors: Mapping[str, torch.optim.Optimizer],
    parameters: list[torch.nn.Parameter],
    stack: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return the times and the memory of each competitor's steps."""
    seconds = race.take_turns(
        {name: _turn(optimizer) for name, optimizer in competitors.items()},
        repeats=options.repeats,
        device=options.device,
        longest=options.longest,
        before=lambda seed: fill_gradients(parameters, seed),
    )
    medians = race.medians(seconds)
    entries = []
    for name, optimizer in competitors.items():
        peak = peak_bytes(optimizer.step, options.device)
        entries.append(
            {
                "optimizer": name,
                "seconds": seconds[name],
                "median_seconds": medians[name],
                "ratio_to_torch": medians[name] / medians[TORCH],
                "ratio_to_muon": medians[name] / medians[OURS],
                "peak_bytes": peak,
                "peak_in_stacks": peak / stack,
            }
        )
    return entries


def _turn(optimizer: torch.optim.Optimizer) -> race.Turn:
    return lambda turn: optimizer.step()


def _row(entry: Mapping[str, Any]) -> list[object]:
    ratios = entry["ratio_to_torch"], entry["ratio_to_muon"]
    memory = entry["peak_bytes"] / 2**20, entry["peak_in_stacks"]
    return [entry["optimizer"], 1e3 * entry["median_seconds"], *ratios, *memory]


def _panel(
    title: str, unit: str, entries: Sequence[Mapping[str, Any]], key: str, factor: float
) -> report.Panel:
    return report.Panel(title, unit, {e["optimizer"]: factor * e[key] for e in entries})


def _shape(p: Tensor) -> tuple[int, ...]:
    return tuple(p.shape)


def _qualities(shapes: list[tuple[int, int]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the quality of torch's directions and of ours, for each shape and spectrum."""
    for shape in shapes:
        for spectrum, matrix in polar.spectra(shape).items():
            m = matrix.to(device)
            norm = polar.nuclear_norm(m)
            yield {
                "shape": shape,
                "spectrum": spectrum,
                TORCH: polar.quality(m, polar.torch_newton_schulz(m), norm),
                OURS: polar.quality(m, lmo.direction(m), norm),
                FAST: polar.quality(m, lmo.direction(m, polar="fast"), norm),
            }


def _roofline_table(entries: Sequence[Mapping[str, Any]], rates: roofline.Rates) -> console.Table:
    """Return each step's products, traffic and the time that they need on this machine."""
    title = (
        "rates here: {:.3g} GFLOP/s in bfloat16, {:.3g} in float32, {:.3g} GB/s of memory".format(
            *(rates.products[dtype] / 1e9 for dtype in (torch.bfloat16, torch.float32)),
            rates.memory / 1e9,
        )
    )
    rows = [
        [
            entry["optimizer"],
            *(entry["flops"].get(name, 0) / 1e9 for name in ("bfloat16", "float32")),
            entry["traffic"] / 1e9,
            1e3 * entry["seconds_at_rates"],
            entry["seconds_at_rates"] / entry["median_seconds"],
        ]
        for entry in entries
    ]
    columns = ["optimizer", "bf16 GFLOP", "fp32 GFLOP", "GB", "ms at these rates", "of its time"]
    return console.Table(title, columns, rows)


def _quality_table(judged: Sequence[Mapping[str, Any]]) -> console.Table:
    names = TORCH, OURS, FAST
    return console.Table(
        "<M, D> / |M|_* of the direction D of a matrix M",
        ["shape", "spectrum", *names],
        [
            [polar.shape_text(each["shape"]), each["spectrum"], *(each[name] for name in names)]
            for each in judged
        ],
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what the profiler's C++ library writes to the standard error."""
    with open(os.devnull, "w") as devnull:
        original = os.dup(2)
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)

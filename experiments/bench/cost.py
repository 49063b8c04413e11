"""Predict what a step costs on 8 to 4,096 GPUs: operations, memory traffic and communication.

Nothing is timed. Operations are those of the oracles (``Oracle.flops``), owners those that the
optimizer would choose, bytes those that its collectives bring; memory traffic is counted on fake
CUDA tensors. Times follow from the machine below, without overlap, as a part of the time that
forward and backward take. Tests compare operations and bytes with counted ones.

  python -m experiments.bench cost --model 7B --json cost.json
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.bench import report
from lit_fanions import Fanion
from lit_fanions.cli.console import Table
from lit_fanions.lmo import newton_schulz
from lit_fanions.lmo.costs import polar_flops
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.options import default_options
from lit_fanions.optim.sharded_products import (
    gains_by_products,
    received_by_products,
    repeated_flops,
)
from lit_fanions.optim.sharing import assign_owners, is_worth_sending, solve_flops

GPUS = (8, 64, 512, 4096)
ALGORITHM_NAMES = ("muon", "f_muon", "kyfan", "fanion", "dion", "neon", "nsgd")
_COUNTED = (1024, 1024)  # a matrix whose memory traffic is counted
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_")
_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
Shape = tuple[int, int]


class Machine(NamedTuple):
    """A GPU and its links: H100 SXM, eight in a node, by the vendor's data sheets.

    Attributes:
        bf16: bfloat16 products, operations a second, at an assumed 60 % of the peak.
        fp32: float32 products, the same.
        memory: Bytes a second.
        node: Bytes a second that a GPU receives from others of its node.
        network: Bytes a second that a GPU receives from other nodes.
        training: Operations a second of forward and backward, at an assumed 40 % of the peak.
        gpus: GPUs of a node.
    """

    bf16: float = 0.6 * 989e12
    fp32: float = 0.6 * 67e12
    memory: float = 3.35e12
    node: float = 450e9
    network: float = 50e9
    training: float = 0.4 * 989e12
    gpus: int = 8


class Model(NamedTuple):
    """A transformer by the shapes of its matrices.

    Attributes:
        layers: Number of blocks.
        shapes: Matrices of a block, each a parameter.
        parameters: Parameters of all, for the operations of forward and backward.
        tokens: Tokens of a step over all GPUs.
    """

    layers: int
    shapes: tuple[tuple[int, int], ...]
    parameters: float
    tokens: float


def _llama(layers: int, width: int, kv: int, hidden: int, total: float, tokens: float) -> Model:
    attention = ((width, width), (kv, width), (kv, width), (width, width))
    return Model(layers, (*attention, *[(hidden, width)] * 2, (width, hidden)), total, tokens)


MODELS = {
    "124M": Model(12, (*[(768, 768)] * 4, (3072, 768), (768, 3072)), 124e6, 2**19),
    "1B": _llama(16, 2048, 512, 8192, 1.24e9, 2**21),
    "7B": _llama(32, 4096, 4096, 11008, 6.74e9, 2**22),
    "70B": _llama(80, 8192, 1024, 28672, 70.6e9, 2**23),
    "405B": _llama(126, 16384, 1024, 53248, 405e9, 2**24),
}


class Strategy(NamedTuple):
    """How parameters lie on GPUs and who shares the work.

    Attributes:
        sharers: Most ranks that share the matrices; 1: every rank solves all of them.
        shards: Most shards of a parameter; 1: it is replicated.
    """

    sharers: float
    shards: float


STRATEGIES = {
    "DDP, not shared": Strategy(1, 1),
    "DDP, shared in each node": Strategy(8, 1),
    "DDP, shared by all": Strategy(math.inf, 1),
    "HSDP, shards in each node": Strategy(math.inf, 8),
    "FSDP2, gathered": Strategy(1, math.inf),
    "FSDP2, shared (also with TP)": Strategy(math.inf, math.inf),
}
# Bytes of weight, gradient, momentum and what activations need, for each parameter.
_STATE_BYTES = 16
_GPU_BYTES = 80e9


class Cost(NamedTuple):
    """What a step costs the busiest GPU.

    Attributes:
        flops: Operations of matrix products.
        received: Bytes from other GPUs.
        traffic: Bytes of memory read and written besides matrix products.
    """

    flops: float
    received: float
    traffic: float


def group_options(algorithm: str) -> dict[str, Any]:
    """Return the options of a group of an algorithm."""
    return {"algorithm": algorithm, **default_options(algorithm)}


def sent_bytes(shape: Shape, group: dict[str, Any]) -> tuple[float, float]:
    """Return the bytes of a float32 direction, with what feedback captures, and of a basis."""
    solver, entries = oracle(group, *shape), math.prod(shape)
    narrow = solver.takes_unit and not group["error_feedback"] and min(shape) > 64
    feedback = 4 * entries if group["error_feedback"] else 0
    return (2 if narrow else 4) * entries + feedback, 4 * shape[1] * (solver.basis_columns or 0)


def step_cost(shapes: Sequence[Shape], algorithm: str, sharers: int, shards: int) -> Cost:
    """Return what a step of float32 matrices costs the busiest GPU.

    Args:
        shapes: Shapes of all matrices.
        algorithm: Name of the algorithm.
        sharers: Ranks that share the work; 1: every rank solves all matrices.
        shards: Shards of a parameter; 1: it is replicated.
    """
    group = group_options(algorithm)
    flops = {shape: solve_flops(torch.Size(shape), group) for shape in set(shapes)}
    sent = {shape: sent_bytes(shape, group) for shape in flops}
    by_products = (
        [] if sharers == 1 else [s for s in shapes if is_multiplied(s, group, sharers, shards)]
    )
    left = [shape for shape in shapes if shape not in set(by_products)]
    everywhere = [
        shape for shape in left
        if sharers == 1 or (shards == 1 and not is_worth_sending(torch.Size(shape), group))
    ]  # fmt: skip
    shared = [shape for shape in left if shape not in set(everywhere)]
    costs = tuple(max(flops[shape], float(math.prod(shape))) for shape in shared)
    loads, entries = [0.0] * sharers, [0.0] * sharers
    for shape, owner in zip(shared, assign_owners(tuple(shared), costs, sharers), strict=True):
        loads[owner] += flops[shape]
        entries[owner] += math.prod(shape)
    # Shards of N go to the owners, or to all; of directions a rank needs its shard, of bases all.
    gathered = max(entries) + sum(map(math.prod, everywhere))
    received = 4 * gathered * (1 - 1 / shards)
    for shape in shared:
        direction, basis = sent[shape]
        received += (1 - 1 / sharers) * (direction / shards + basis)
    for shape in by_products:
        received += (1 - 1 / shards) * received_by_products(torch.Size(shape), group, 0)
    return Cost(
        flops=max(loads)
        + sum(flops[shape] for shape in everywhere)
        + sum(strip_flops(shape, group, shards) for shape in by_products),
        received=received,
        traffic=traffic_per_entry(algorithm) * sum(map(math.prod, shapes)) / shards,
    )


def is_multiplied(shape: Shape, group: dict[str, Any], sharers: int, shards: int) -> bool:
    """Return whether a float32 matrix in strips of rows on GPUs is solved by products with them."""
    if shards == 1 or oracle(group, *shape).products_solver(torch.device("cuda")) is None:
        return False
    return gains_by_products(torch.Size(shape), group, 0, shards, sharers)


def strip_flops(shape: Shape, group: dict[str, Any], shards: int) -> float:
    """Return the operations of a rank that multiplies its rows of a matrix."""
    solver, size = oracle(group, *shape), torch.Size(shape)
    every, own = repeated_flops(size, group, 0), solve_flops(size, group)
    if solver.warms_up:
        return every + (own - every) / shards
    # Of Dion they count no Gram matrices, because whole matrices take none where they are counted.
    return every + (own + 4.0 * shape[0] * (solver.basis_columns or 0) ** 2) / shards


@functools.cache
def traffic_per_entry(algorithm: str) -> float:
    """Return the bytes that a step reads and writes for each entry besides matrix products.

    Counted on fake CUDA tensors: inputs and outputs of every operation of the second step.
    """
    bfloat16 = mock.patch.object(newton_schulz, "_has_bf16", lambda device: device == "cuda")
    with bfloat16, FakeTensorMode(allow_non_fake_inputs=True):
        p = torch.nn.Parameter(torch.empty(_COUNTED, device="cuda"))
        optimizer = Fanion([p], algorithm=algorithm)
        p.grad = torch.empty_like(p)
        optimizer.step()
        with CountBytes() as counted:
            optimizer.step()
    return counted.total / p.numel()


class CountBytes(TorchDispatchMode):
    """Count the bytes that operations read and write, but those of views and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        if not is_view and name not in (*PRODUCTS, *_ALLOCATIONS):
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.total += sum(_bytes(x) for x in (*read, *written))
        return out


def _bytes(x: Tensor) -> int:
    """Return the bytes of a tensor without those that a broadcast repeats."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.itemsize


class Prediction(NamedTuple):
    """Predicted times of a step, in seconds."""

    solve: float
    receive: float
    traffic: float
    training: float

    @property
    def part(self) -> float:
        """What the optimizer takes, as a part of forward and backward."""
        return (self.solve + self.receive + self.traffic) / self.training


def predict(model: Model, algorithm: str, strategy: Strategy, gpus: int) -> Prediction:
    """Predict the times of a step of a model on a machine as ``Machine`` says."""
    machine = Machine()
    sharers, shards = (int(min(most, gpus)) for most in strategy)
    cost = step_cost(model.shapes * model.layers, algorithm, sharers, shards)
    solver = oracle(group_options(algorithm), *model.shapes[0])
    has_polar = solver.flops >= polar_flops(solver.case)  # in bfloat16; the rest in float32
    far = gpus > machine.gpus and max(sharers, shards) > machine.gpus
    # In an all-gather the GPUs of a node fetch a part each and pass it on.
    network = machine.network * (machine.gpus if shards == 1 else 1)
    return Prediction(
        cost.flops / (machine.bf16 if has_polar else machine.fp32),
        cost.received / (network if far else machine.node),
        cost.traffic / machine.memory,
        6 * model.parameters * model.tokens / gpus / machine.training,
    )


def fitting(model: Model, gpus: int) -> dict[str, Strategy]:
    """Return the strategies under which a model fits into the memory of the GPUs."""
    need = model.parameters * _STATE_BYTES
    return {name: s for name, s in STRATEGIES.items() if need / min(s.shards, gpus) <= _GPU_BYTES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "--model", choices=MODELS, action="append", help="a model, repeatable (default: all)"
    )


def run(options: argparse.Namespace) -> report.Report:
    """Predict every algorithm for models, numbers of GPUs and strategies."""
    entries = [
        {"model": name, "gpus": gpus, "strategy": strategy, "algorithm": algorithm,
         **predict(MODELS[name], algorithm, how, gpus)._asdict()}
        for name in options.model or MODELS
        for gpus in GPUS
        for strategy, how in fitting(MODELS[name], gpus).items()
        for algorithm in ALGORITHM_NAMES
    ]  # fmt: skip
    return report.Report(
        title="predicted, not measured: time of a step of muon beside forward and backward",
        columns=["model", "GPUs", "strategy", "solve ms", "receive ms", "memory ms", "% of step"],
        rows=[_row(entry) for entry in entries if entry["algorithm"] == "muon"],
        more=[_best_table(entries)],
        notes=[
            f"assumed: {Machine()}",
            "solve: the busiest GPU's products; receive: its bytes over its links, without "
            "overlap; memory: momentum, decay and update; %: of forward and backward",
            f"strategies shown fit into {_GPU_BYTES / 1e9:g} GB, {_STATE_BYTES} bytes a parameter",
        ],
        data={"machine_assumed": Machine()._asdict(), "results": entries},
    )


def _part(entry: dict[str, Any]) -> float:
    return Prediction(*(entry[name] for name in Prediction._fields)).part


def _row(entry: dict[str, Any]) -> list[object]:
    times = [1e3 * entry[name] for name in ("solve", "receive", "traffic")]
    return [entry["model"], entry["gpus"], entry["strategy"], *times, 100 * _part(entry)]


def _best_table(entries: list[dict[str, Any]]) -> Table:
    """Return each algorithm's time over that of forward and backward, by its best strategy."""
    best: dict[tuple[str, str], dict[int, float]] = {}
    for entry in entries:
        parts = best.setdefault((entry["model"], entry["algorithm"]), {})
        parts[entry["gpus"]] = min(_part(entry), parts.get(entry["gpus"], math.inf))
    rows = [
        [*key, *(f"{100 * parts[gpus]:.3g}" if gpus in parts else "-" for gpus in GPUS)]
        for key, parts in best.items()
    ]
    columns = ["model", "algorithm", *(f"{gpus} GPUs" for gpus in GPUS)]
    title = "the same in % of forward and backward, by the best strategy that fits"
    return Table(title, columns, rows)

"""A few gloo processes on CPU, and a network that two cannot share evenly."""

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_fanions import Fanion, configure_optimizers
from tests.optim.reference import EXACT

RANKS = 2
STEPS = 4
PATIENCE = 40  # seconds


def on_ranks(folder: Path, work: Callable[..., Any], *args: Any, count: int = RANKS) -> list[Any]:
    """Return the results of ``work(rank, *args)`` in processes; fail with their tracebacks."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, count, folder, work, args))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
    assert not errors and not hanging, f"hanging ranks: {hanging}\n" + "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]


def _rank(
    rank: int, count: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count,
            timeout=datetime.timedelta(seconds=PATIENCE / 4),
        )  # fmt: skip
        torch.save(work(rank, *args), folder / f"rank{rank}.pt")
        dist.barrier()
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(f"rank {rank}\n{traceback.format_exc()}")
    os._exit(0)  # without the clean-up of what the parent owns


class Net(nn.Module):
    """Rows that two ranks cannot share evenly, weights of one row, a bias of one entry."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 5, bias=False)
        self.gate = nn.Linear(5, 1)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.last = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).tanh())
        x = x * self.gate(x)
        return self.last((x @ self.experts).sum(0))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :2].sin()


def make_optimizer(net: nn.Module, algorithm: str = "muon", **options: Any) -> Fanion:
    config = {
        "matrix": {"algorithm": algorithm, "lr": 0.02, "weight_decay": 0.1, **options},
        "overrides": {"head": {"algorithm": "sgd", "lr": 0.01}},
    }
    return configure_optimizers(net, config)["optimizer"]


def train(
    net: nn.Module, optimizer: Fanion, start: int = 0, steps: int = STEPS, rank: int | None = None
) -> None:
    """Step on the whole batch, or on this rank's half of it."""
    for step in range(start, start + steps):
        x, y = batch(step)
        if rank is not None:
            x, y = x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def full_copy(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): full_copy(p) for n, p in net.named_parameters()}


def states(net: nn.Module, optimizer: Fanion) -> dict[str, Tensor]:
    return {
        f"{name}: {key}": full_copy(value)
        for name, p in net.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def shard(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (net.first, net.second, net.gate, net.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol, msg=name)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert that both ranks have the same bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def alone(algorithm: str, **options: Any) -> dict[str, Tensor]:
    """Return weights and states after training in one process."""
    net = Net()
    optimizer = make_optimizer(net, algorithm, **options)
    train(net, optimizer)
    return {**weights(net), **states(net, optimizer)}


def solvers(algorithm: str) -> dict[str, str]:
    """Return exact solvers for matrices; AdamW and SGD take none."""
    return {} if algorithm in ("adamw", "sgd") else EXACT

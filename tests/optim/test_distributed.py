"""Two gloo processes on CPU: DDP, FSDP2 with uneven shards, distributed checkpoints."""

import copy
import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lit_fanions import Fanion, configure_optimizers

pytestmark = pytest.mark.timeout(90)

RANKS = 2
STEPS = 4
PATIENCE = 40  # seconds
EVERY = [
    "muon", "neon", "fanion", "kyfan", "nsgd", "signum", "coordinate", "f_muon", "f_neon",
    "f_fanion", "s_muon", "s_neon", "s_fanion", "dion", "adamw", "sgd",
]  # fmt: skip


def on_ranks(folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns on each of two processes; their tracebacks if it fails."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, folder, work, args)) for rank in range(RANKS)
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
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def _rank(rank: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS,
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


def optimizer_of(net: nn.Module, algorithm: str = "muon", **options: Any) -> Fanion:
    config = {
        "matrix": {"algorithm": algorithm, "lr": 0.02, "weight_decay": 0.1, **options},
        "overrides": {"head": {"algorithm": "sgd", "lr": 0.01}},
    }
    return configure_optimizers(net, config)["optimizer"]


def train(
    net: nn.Module, optimizer: Fanion, start: int = 0, steps: int = STEPS, rank: int | None = None
) -> None:
    """Steps on the whole batch, or on this rank's half of it."""
    for step in range(start, start + steps):
        x, y = batch(step)
        if rank is not None:
            x, y = x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): whole(p) for n, p in net.named_parameters()}


def states(net: nn.Module, optimizer: Fanion) -> dict[str, Tensor]:
    return {
        f"{name}: {key}": whole(value)
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
    """Ranks agree to the bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def alone(algorithm: str, **options: Any) -> dict[str, Tensor]:
    net = Net()
    optimizer = optimizer_of(net, algorithm, **options)
    train(net, optimizer)
    return {**weights(net), **states(net, optimizer)}


# One process = DDP = FSDP2. With exact solvers, so that rounding is all that can differ.

EXACT = {"polar": "exact", "solver": "exact"}


def solvers(algorithm: str) -> dict[str, str]:
    return {} if algorithm in ("adamw", "sgd") else EXACT


def _ddp(rank: int, algorithm: str, options: dict[str, Any]) -> dict[str, Tensor]:
    net = nn.parallel.DistributedDataParallel(Net())
    optimizer = optimizer_of(net.module, algorithm, **options)
    train(net, optimizer, rank=rank)
    return {**weights(net.module), **states(net.module, optimizer)}


@pytest.mark.parametrize("algorithm", ["muon", "f_neon", "dion", "adamw"])
def test_ddp_equals_one_process(tmp_path, algorithm):
    options = solvers(algorithm)
    first, second = on_ranks(tmp_path, _ddp, algorithm, options)
    assert_equal(first, second)
    assert_close(first, alone(algorithm, **options), atol=1e-6)


def _fsdp(rank: int, algorithm: str, options: dict[str, Any]) -> dict[str, Tensor]:
    net = shard(Net())
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in net.parameters())
    assert rank == 0 or not net.gate.weight.to_local().numel()
    optimizer = optimizer_of(net, algorithm, **options)
    train(net, optimizer, rank=rank)
    return {**weights(net), **states(net, optimizer)}


@pytest.mark.parametrize("algorithm", EVERY)
def test_fsdp2_equals_one_process(tmp_path, algorithm):
    options = solvers(algorithm)
    first, second = on_ranks(tmp_path, _fsdp, algorithm, options)
    assert_equal(first, second)
    assert_close(first, alone(algorithm, **options), atol=1e-6)


MIXTURES = [
    {"algorithm": "f_muon", "renormalize": True, "scale": "match_rms_adamw"},
    {"algorithm": "neon", "error_feedback": True},
    {"algorithm": "muon", "nonfinite": "error"},
    {"algorithm": "muon", "nonfinite": "propagate"},
    {"algorithm": "muon", "momentum_dtype": "float32"},
]


@pytest.mark.parametrize("options", MIXTURES, ids=str)
def test_fsdp2_equals_one_process_with_any_option(tmp_path, options):
    options = {**EXACT, **options}
    algorithm = options.pop("algorithm")
    first, _ = on_ranks(tmp_path, _fsdp, algorithm, options)
    assert_close(first, alone(algorithm, **options), atol=1e-6)


# Any placement.


def _placed(rank: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (RANKS,))
    updates = {}
    for placement in (Shard(0), Shard(1), Replicate()):
        for shape in [(7, 5), (1, 6), (6, 1), (3, 5, 2)]:
            torch.manual_seed(1)
            w, g = torch.randn(shape), torch.randn(shape)
            p = nn.Parameter(distribute_tensor(w, mesh, [placement]))
            optimizer = Fanion([p], algorithm="f_muon", scale="match_rms_adamw", **EXACT)
            p.grad = distribute_tensor(g, mesh, [placement])
            optimizer.step()
            assert p.placements == (placement,)
            updates[f"{placement} {shape}"] = whole(p)
    return updates


def test_every_placement_steps_the_whole_matrix(tmp_path):
    first, second = on_ranks(tmp_path, _placed)
    for name, got in first.items():
        assert torch.equal(got, second[name])
        torch.manual_seed(1)
        shape = got.shape
        p, g = nn.Parameter(torch.randn(shape)), torch.randn(shape)
        optimizer = Fanion([p], algorithm="f_muon", scale="match_rms_adamw", **EXACT)
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(got, p.detach(), rtol=0, atol=1e-6, msg=name)


def _partial(rank: int, algorithm: str) -> Tensor:
    mesh = init_device_mesh("cpu", (RANKS,))
    p = nn.Parameter(distribute_tensor(torch.ones(5, 4), mesh, [Replicate()]))
    optimizer = Fanion([p], algorithm=algorithm, lr=0.1)
    for step in range(3):
        # Each rank holds a part of the sum, as tensor parallelism leaves it.
        p.grad = DTensor.from_local(_share(step, rank), mesh, [Partial()], run_check=False)
        optimizer.step()
    return whole(p)


def _share(step: int, rank: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))


@pytest.mark.parametrize("algorithm", ["muon", "adamw", "sgd"])
def test_partial_gradients_of_a_replicated_parameter_are_summed(tmp_path, algorithm):
    first, second = on_ranks(tmp_path, _partial, algorithm)
    assert torch.equal(first, second)
    p = nn.Parameter(torch.ones(5, 4))
    optimizer = Fanion([p], algorithm=algorithm, lr=0.1)
    for step in range(3):
        p.grad = sum(_share(step, rank) for rank in range(RANKS))
        optimizer.step()
    torch.testing.assert_close(first, p.detach(), rtol=0, atol=1e-5)


# A gradient that is broken on one rank only.


def _broken(rank: int, algorithm: str, nonfinite: str) -> dict[str, Any]:
    net = shard(Net())
    optimizer = optimizer_of(net, algorithm, nonfinite=nonfinite)
    train(net, optimizer, rank=rank)
    before = {**weights(net), **states(net, optimizer)}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    if rank == 1:
        net.first.weight.grad.to_local()[0, 0] = torch.nan
        net.first.bias.grad.to_local()[0] = torch.inf
    try:
        optimizer.step()
        error = ""
    except FloatingPointError as raised:
        error = str(raised)
    return {"before": before, "after": {**weights(net), **states(net, optimizer)}, "error": error}


@pytest.mark.parametrize("algorithm", ["muon", "neon", "dion", "adamw"])
def test_a_gradient_broken_on_one_rank_is_skipped_on_all(tmp_path, algorithm):
    first, second = on_ranks(tmp_path, _broken, algorithm, "skip")
    for result in (first, second):
        before, after = result["before"], result["after"]
        for name, value in after.items():
            broken = name.startswith(("first.weight", "first.bias"))
            if name.endswith("skipped"):
                assert value == before[name] + broken, name
            elif broken:
                assert torch.equal(value, before[name]), name
            assert value.isfinite().all()
        assert not torch.equal(after["second.weight"], before["second.weight"])
    assert_equal(first["after"], second["after"])


def test_an_error_is_raised_on_all_ranks(tmp_path):
    for result in on_ranks(tmp_path, _broken, "muon", "error"):
        assert "first.weight" in result["error"]
        for name, value in result["after"].items():
            assert torch.equal(value, result["before"][name]), name


# Distributed checkpoints: torch takes a dummy step with zero gradients and lr 0.

CHECKPOINTED = [
    {"algorithm": "muon", "renormalize": True},
    {"algorithm": "f_fanion", "rank": 2},
    {"algorithm": "kyfan"},
    {"algorithm": "neon", "error_feedback": True, "renormalize": True},
    {"algorithm": "dion"},
    {"algorithm": "adamw"},
    {"algorithm": "signum"},
]
FORMS = [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}]


def resumed(net: nn.Module, make: Callable[[], nn.Module], options: dict[str, Any],
            form: dict[str, bool], rank: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Trains, saves, restores into a fresh model and trains on, beside the uninterrupted run."""
    how = dcp.StateDictOptions(**form)
    optimizer = optimizer_of(net, **options)
    fresh = weights(net)
    empty = dcp.get_optimizer_state_dict(net, optimizer, options=how)
    unchanged = all(torch.equal(fresh[name], value) for name, value in weights(net).items())
    optimizer.zero_grad()
    train(net, optimizer, rank=rank)
    saved = copy.deepcopy(dcp.get_state_dict(net, optimizer, options=how))
    train(net, optimizer, start=STEPS, rank=rank)

    other = make()
    other_optimizer = optimizer_of(other, **options)
    dcp.set_state_dict(
        other, other_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=how
    )
    loaded = weights(other)
    same = all(torch.equal(whole(saved[0][name]), value) for name, value in loaded.items())
    train(other, other_optimizer, start=STEPS, rank=rank)
    return {
        "straight": {**weights(net), **states(net, optimizer)},
        "resumed": {**weights(other), **states(other, other_optimizer)},
        "unchanged": unchanged, "same": same, "empty": bool(empty),
    }  # fmt: skip


def assert_resumed(result: dict[str, Any]) -> None:
    assert result["unchanged"], "the dummy step has moved the weights"
    assert result["same"], "loading has moved the weights"
    assert_close(result["resumed"], result["straight"], atol=0)
    assert all(value.isfinite().all() for value in result["resumed"].values())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
def test_a_distributed_checkpoint_of_one_process(options, form):
    assert_resumed(resumed(Net(), Net, options, form))


def _checkpoint(rank: int, options: dict[str, Any], form: dict[str, bool]) -> dict[str, Any]:
    def make() -> nn.Module:
        return shard(Net())

    return resumed(make(), make, options, form, rank)


@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
def test_a_distributed_checkpoint_of_fsdp2(tmp_path, options):
    for result in on_ranks(tmp_path, _checkpoint, options, {}):
        assert_resumed(result)


# Lightning.


def _lightning_net() -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return configure_optimizers(
                self, algorithm="f_fanion", rank=2, **EXACT, schedule={"shape": "linear"}
            )

    return Module()


def _fit(path: Path, batch_size: int, **options: Any) -> dict[str, Tensor]:
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(*(torch.cat(parts) for parts in zip(*map(batch, range(3)), strict=True)))
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    module = _lightning_net()
    sampler = None
    if "strategy" in options:
        # Rank r takes the r-th half of each batch of the run of one process.
        sampler = Halves(len(data), 2 * batch_size)
    trainer.fit(module, DataLoader(data, batch_size, sampler=sampler))
    return weights(module.net)


class Halves:
    """Indices of this rank's half of every global batch."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return self.size // 2

    def __iter__(self):
        half, rank = self.batch_size // 2, dist.get_rank()
        for start in range(0, self.size, self.batch_size):
            yield from range(start + rank * half, start + (rank + 1) * half)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightnings_ddp_equals_one_process(tmp_path):
    want = _fit(tmp_path, 8)
    got = _fit(tmp_path, 4, strategy="ddp_fork", devices=2)
    assert_close(got, want, atol=1e-6)

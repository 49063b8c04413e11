"""DDP, FSDP2 with uneven shards, tensor placements and Lightning, on two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lit_fanions import Fanion, configure_optimizers
from tests.optim.ranks import (
    RANKS,
    Net,
    alone,
    assert_close,
    assert_equal,
    batch,
    full_copy,
    make_optimizer,
    on_ranks,
    shard,
    solvers,
    states,
    train,
    weights,
)
from tests.optim.reference import EXACT

pytestmark = pytest.mark.timeout(90)


def _ddp(rank: int, algorithm: str, options: dict[str, Any]) -> dict[str, Tensor]:
    net = nn.parallel.DistributedDataParallel(Net())
    optimizer = make_optimizer(net.module, algorithm, **options)
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
    optimizer = make_optimizer(net, algorithm, **options)
    train(net, optimizer, rank=rank)
    return {**weights(net), **states(net, optimizer)}


# One of each kind of state and shape: matrices are gathered before any algorithm sees them.
@pytest.mark.parametrize(
    "algorithm",
    ["muon", "kyfan", "f_fanion", "s_neon", "dion", "coordinate", "row", "adamw", "sgd"],
)
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
    {"algorithm": "cosmos", "adapt_rank": 1},
]


@pytest.mark.parametrize("options", MIXTURES, ids=str)
def test_fsdp2_equals_one_process_with_any_option(tmp_path, options):
    options = {**EXACT, **options}
    algorithm = options.pop("algorithm")
    first, _ = on_ranks(tmp_path, _fsdp, algorithm, options)
    assert_close(first, alone(algorithm, **options), atol=1e-6)


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
            updates[f"{placement} {shape}"] = full_copy(p)
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
    return full_copy(p)


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


def _broken(rank: int, algorithm: str, nonfinite: str) -> dict[str, Any]:
    net = shard(Net())
    optimizer = make_optimizer(net, algorithm, nonfinite=nonfinite)
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

"""Predicted operations and bytes are those that are counted; predictions are called predictions."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench import cost
from lit_fanions import Fanion
from lit_fanions.lmo import newton_schulz
from tests.optim.ranks import on_ranks
from tests.optim.test_sharing import counted_step

pytestmark = pytest.mark.timeout(120)

SHAPES = [(96, 96), (96, 96), (384, 96), (96, 384)] * 4


def optimizer(algorithm: str, place: Any = lambda x: x, **options: Any) -> Fanion:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        p = nn.Parameter(place(torch.ones(shape)))
        p.grad = place(torch.randn(shape, generator=generator))
        parameters.append(p)
    return Fanion(parameters, lr=0.01, algorithm=algorithm, **options)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    # Processors differ in whether polar factors are computed, and so sent, in bfloat16.
    monkeypatch.setattr(newton_schulz, "_has_bf16", lambda device: True)


def _baddbmm_flops(self_shape: Any, a_shape: Any, b_shape: Any, **kwargs: Any) -> int:
    batch, rows, inner = a_shape
    return 2 * batch * rows * inner * b_shape[-1]


@pytest.mark.parametrize("algorithm", cost.ALGORITHM_NAMES)
def test_predicted_operations_are_those_counted(algorithm):
    stepped = optimizer(algorithm)
    stepped.step()
    # torch counts no products in place, by which a blend is fused into the last one.
    in_place = {
        torch.ops.aten.baddbmm_: _baddbmm_flops,
        torch.ops.aten.addmm_: lambda c, a, b, **kwargs: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        stepped.step()
    predicted = cost.step_cost(SHAPES, algorithm, 1, 1)
    assert counter.get_total_flops() == pytest.approx(predicted.flops, rel=0.05)
    assert predicted.received == 0


def _counted(rank: int, kind: str, algorithm: str) -> tuple[float, int]:
    if kind == "ddp":
        return counted_step(optimizer(algorithm, process_group=dist.group.WORLD))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return counted_step(optimizer(algorithm, lambda x: distribute_tensor(x, mesh, [Shard(0)])))


@pytest.mark.parametrize(
    ("kind", "algorithm", "ranks"),
    [
        ("ddp", "muon", 4),
        ("ddp", "neon", 2),
        ("fsdp2", "muon", 4),
        ("fsdp2", "fanion", 2),
        ("fsdp2", "dion", 2),
    ],
)
def test_predicted_bytes_are_those_counted(tmp_path, kind, algorithm, ranks):
    predicted = cost.step_cost(SHAPES, algorithm, ranks, ranks if kind == "fsdp2" else 1)
    for flops, received in on_ranks(tmp_path, _counted, kind, algorithm, count=ranks):
        assert received == pytest.approx(predicted.received, rel=0.05)
        assert flops <= 1.05 * predicted.flops


def test_the_report_says_that_it_is_predicted():
    shown = cost.run(cost.argparse.Namespace(model=["7B"]))
    assert "predicted, not measured" in str(shown)
    # What has no memory for whole states is not shown.
    assert {row[2] for row in shown.rows if row[1] == 8} == {
        "HSDP, shards in each node", "FSDP2, gathered", "FSDP2, shared (also with TP)",
    }  # fmt: skip


def test_sharing_is_predicted_to_save_work_in_every_strategy():
    one, two = (cost.step_cost(SHAPES, "muon", sharers, 1).flops for sharers in (1, 2))
    assert two == pytest.approx(one / 2)

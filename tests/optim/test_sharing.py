"""Shared work: each rank solves the matrices it owns, and steps equal those of redundant work."""

import copy
import itertools
import math
import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from lit_fanions import Fanion, configure_optimizers
from lit_fanions.lmo.newton_schulz import fast_dtype
from lit_fanions.optim import exchange, sharing
from lit_fanions.optim.sharing import assign_owners, format_owners, shard_map
from tests.optim.ranks import full_copy, on_ranks

pytestmark = pytest.mark.timeout(120)

SHAPES = [
    (48, 40),
    (40, 40),
    (40, 40),
    (40, 100),
    (96, 32),
    (48, 40),
    (40, 40),
    (7, 40),
    (3, 40, 32),
]
OPTIONS: list[dict[str, Any]] = [
    {"algorithm": "muon"},
    {"algorithm": "muon", "polar": "exact", "nesterov": False},
    {"algorithm": "f_muon", "scale": "match_rms_adamw", "renormalize": True},
    {"algorithm": "fanion", "rank": 7, "adapt": "rows"},
    {"algorithm": "kyfan", "adapt": "entries"},
    {"algorithm": "dion", "momentum_dtype": "float64"},  # others are solved by products
    {"algorithm": "s_fanion", "error_feedback": True, "momentum_dtype": "float64"},
]


def group_options(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"layout": "batch"} if len(shape) == 3 else {"splits": 3} if shape[0] == 96 else {}


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def first_weights() -> list[Tensor]:
    return gradients(-1)


def stepped(parameters: list[Tensor], place: Any, **options: Any) -> dict[str, Tensor]:
    """Return weights and states after a few steps; the second skips one parameter."""
    alike = [[p for p in parameters if p.shape == shape] for shape in dict.fromkeys(SHAPES)]
    groups = [
        {"params": [(f"{i}.{j}", p) for j, p in enumerate(ps)], "name": str(i),
         **group_options(ps[0].shape)} for i, ps in enumerate(alike)
    ]  # fmt: skip
    optimizer = Fanion(groups, lr=0.02, weight_decay=0.1, **options)
    for step in range(3):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = place(gradient)
        if step == 1:
            parameters[0].grad = place(gradients(step)[0].fill_(torch.nan))
            parameters[1].grad = None
        optimizer.step()
    found = {}
    for i, p in enumerate(parameters):
        found[f"{i}"] = full_copy(p)
        found |= {f"{i}.{key}": full_copy(x) for key, x in optimizer.state[p].items()}
    return found


def redundantly_stepped(options: dict[str, Any]) -> dict[str, Tensor]:
    parameters = [nn.Parameter(w) for w in first_weights()]
    return stepped(parameters, lambda gradient: gradient, **options)


def _replicated(rank: int) -> list[dict[str, Tensor]]:
    sharing._WORTH_SENDING = 0  # so that matrices of a test are shared
    return [
        stepped(
            [nn.Parameter(w) for w in first_weights()], lambda g: g,
            process_group=dist.group.WORLD, **options,
        )
        for options in OPTIONS
    ]  # fmt: skip


def assert_equal_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_replicated_parameters_are_stepped_as_by_every_rank(tmp_path):
    wanted = [redundantly_stepped(options) for options in OPTIONS]
    for found in on_ranks(tmp_path, _replicated, count=3):
        for got, want in zip(found, wanted, strict=True):
            assert_equal_bits(got, want)


PLACEMENTS = [
    ((3,), [Shard(0)]),
    ((2,), [Shard(1)]),
    ((2,), [Replicate()]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(0)]),
]


def _sharded(
    rank: int, sizes: tuple[int, ...], placements: list[Any], every: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", sizes)

    def place(x: Tensor) -> DTensor:
        return distribute_tensor(x, mesh, placements)

    return [
        stepped([nn.Parameter(place(w)) for w in first_weights()], place, **options)
        for options in every
    ]


@pytest.mark.parametrize(("sizes", "placements"), PLACEMENTS, ids=str)
def test_sharded_parameters_are_stepped_as_whole_ones(tmp_path, sizes, placements):
    every = OPTIONS if sizes == (3,) else [OPTIONS[i] for i in (0, 3, 5)]
    wanted = [redundantly_stepped(options) for options in every]
    for found in on_ranks(tmp_path, _sharded, sizes, placements, every, count=math.prod(sizes)):
        for got, want in zip(found, wanted, strict=True):
            assert_equal_bits(got, want)


def test_owners_get_about_the_same_work():
    costs = (8.0, 1.0, 4.0, 4.0, 1.0, 2.0, 4.0)
    shapes = (torch.Size((4, 4)),) * len(costs)
    owners = assign_owners(shapes, costs, 3)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(3)]
    assert sorted(loads) == [8, 8, 8]


def test_ranks_own_as_many_parameters_of_each_shape():
    shapes = (torch.Size((8, 4)), torch.Size((4, 8))) * 4
    owners = assign_owners(shapes, (1.0,) * 8, 2)
    assert sorted(owners[::2]) == sorted(owners[1::2]) == [0, 0, 1, 1]


def test_the_table_of_owners_names_what_each_rank_solves():
    names = [("a", (96, 96)), ("b", (96, 96)), ("c", (192, 96)), ("d", (4, 4))]
    optimizer = Fanion([(name, nn.Parameter(torch.zeros(shape))) for name, shape in names])
    first, *lines = format_owners(optimizer.param_groups, 2).splitlines()
    assert first.startswith("Solved by 2 ranks that replicate the parameters")
    assert [line.partition(":")[2] for line in lines] == [" c", " a, b"]


WIDTH = 96
LAYER = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
LAYERS = 4


def transformer_optimizer(place: Any = lambda x: x, **options: Any) -> Fanion:
    """Return an optimizer of the matrices of a small GPT-2, with gradients."""
    groups = []
    for shape in LAYER:
        parameters = [nn.Parameter(place(torch.ones(shape))) for _ in range(LAYERS)]
        for i, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(p.numel() + i)
            p.grad = place(torch.randn(shape, generator=generator))
        splits = {"splits": 3} if shape[0] == 3 * WIDTH else {}
        groups.append({"params": parameters, "name": str(shape), **splits})
    return Fanion(groups, **options)


def counted_step(optimizer: Fanion) -> tuple[float, float]:
    """Return the operations of this rank's second step and the bytes that others send it."""
    optimizer.step()
    received: list[float] = []
    gather, to_all, add = exchange._all_gather, dist.all_to_all_single, dist.all_reduce

    def all_gather(everything: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(everything.nbytes - own.nbytes)
        return gather(everything, own, *args, **kwargs)

    def all_to_all(into: Tensor, out: Tensor, sizes: list[int], *args: Any, **kwargs: Any) -> Any:
        received.append(into.nbytes - sizes[dist.get_rank()])
        return to_all(into, out, sizes, *args, **kwargs)

    def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_floating_point():  # no flags
            ranks = dist.get_world_size()
            received.append(2 * (ranks - 1) / ranks * x.nbytes)  # by a ring
        return add(x, *args, **kwargs)

    exchange._all_gather, dist.all_to_all_single = all_gather, all_to_all
    dist.all_reduce = all_reduce
    try:
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    finally:
        exchange._all_gather, dist.all_to_all_single, dist.all_reduce = gather, to_all, add
    return counter.get_total_flops(), sum(received)


def _counted(rank: int, kind: str, options: dict[str, Any]) -> tuple[float, int]:
    if kind == "ddp":
        return counted_step(transformer_optimizer(process_group=dist.group.WORLD, **options))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return counted_step(
        transformer_optimizer(lambda x: distribute_tensor(x, mesh, [Shard(0)]), **options)
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_does_its_part_of_the_work(tmp_path, kind, ranks):
    redundant, _ = counted_step(transformer_optimizer())
    entries = LAYERS * sum(math.prod(shape) for shape in LAYER)
    for flops, received in on_ranks(tmp_path, _counted, kind, {}, count=ranks):
        assert flops <= 1.15 / ranks * redundant
        # DDP: the directions of others. FSDP2: shards of what this rank owns, and of directions.
        step = 2 if fast_dtype(torch.device("cpu"), torch.float32) == torch.bfloat16 else 4
        each = entries * (ranks - 1) / ranks
        predicted = each * step if kind == "ddp" else each / ranks * (4 + step)
        assert received == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_option_switches_sharing_off(tmp_path, kind):
    redundant, _ = counted_step(transformer_optimizer())
    for flops, received in on_ranks(tmp_path, _counted, kind, {"share_work": False}):
        assert (flops, received) == (redundant, 0)


def _alone(rank: int) -> tuple[float, int]:
    return counted_step(transformer_optimizer())


def test_a_process_group_that_is_not_given_is_not_used(tmp_path):
    redundant, _ = counted_step(transformer_optimizer())
    for flops, received in on_ranks(tmp_path, _alone):
        assert (flops, received) == (redundant, 0)


def _without_a_gradient(rank: int, kind: str) -> tuple[str, bool]:
    options: dict[str, Any] = {"process_group": dist.group.WORLD}
    place: Any = lambda x: x  # noqa: E731
    if kind == "dtensor":
        mesh = init_device_mesh("cpu", (2,))
        options, place = {}, lambda x: distribute_tensor(x, mesh, [Shard(0)])
    parameters = [nn.Parameter(place(torch.ones(40, 40))) for _ in range(3)]
    optimizer = Fanion([(f"layer{i}.weight", p) for i, p in enumerate(parameters)], **options)
    for i, p in enumerate(parameters):
        gradient = place(torch.ones(40, 40))
        p.grad = None if (rank, i) == (1, 2) else gradient
    try:
        optimizer.step()
    except RuntimeError as error:
        unchanged = all(torch.equal(full_copy(p), torch.ones(40, 40)) for p in parameters)
        return str(error), unchanged
    return "", False


@pytest.mark.parametrize("kind", ["replicated", "dtensor"])
def test_a_gradient_missing_on_one_rank_is_an_error_on_all(tmp_path, kind):
    for message, unchanged in on_ranks(tmp_path, _without_a_gradient, kind):
        assert message.startswith("layer2.weight: a gradient on some of the 2 ranks")
        assert unchanged


def _with_own_seed(rank: int, kind: str, algorithm: str) -> tuple[str, bool]:
    os.environ["PL_GLOBAL_SEED"] = str(42 + rank)  # as seed_everything(42 + rank) leaves it
    options: dict[str, Any] = {"process_group": dist.group.WORLD}
    place: Any = lambda x: x  # noqa: E731
    if kind == "dtensor":
        mesh = init_device_mesh("cpu", (2,))
        options, place = {}, lambda x: distribute_tensor(x, mesh, [Shard(0)])
    p = nn.Parameter(place(torch.ones(40, 40)))
    optimizer = Fanion([("layer.weight", p)], algorithm=algorithm, **options)
    p.grad = place(torch.eye(40))
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), torch.equal(full_copy(p), torch.ones(40, 40))
    return "", False


@pytest.mark.parametrize("kind", ["replicated", "dtensor"])
def test_seeds_that_differ_between_ranks_are_an_error_on_all(tmp_path, kind):
    for message, unchanged in on_ranks(tmp_path, _with_own_seed, kind, "fanion"):
        assert message.startswith("layer.weight: the 2 ranks have different seeds, from 42 to 43")
        assert unchanged


def test_seeds_may_differ_where_no_solver_starts_at_random(tmp_path):
    for message, unchanged in on_ranks(tmp_path, _with_own_seed, "replicated", "muon"):
        assert (message, unchanged) == ("", False)


def _seeds_of_the_factory(rank: int) -> list[int]:
    from lightning.pytorch.strategies import DDPStrategy

    os.environ["PL_GLOBAL_SEED"] = str(42 + rank)
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net._trainer = SimpleNamespace(strategy=DDPStrategy())
    config = {"matrix": {"algorithm": "neon"}, "overrides": {"head": {"algorithm": "fanion"}}}
    optimizer = configure_optimizers(net, config, total_steps=1)["optimizer"]
    return [group["seed"] for group in optimizer.param_groups if "seed" in group]


@pytest.mark.filterwarnings("ignore:group 'head'")
def test_the_factory_gives_all_ranks_the_seed_of_the_first(tmp_path):
    assert on_ranks(tmp_path, _seeds_of_the_factory) == [[42, 42], [42, 42]]


def _observed(rank: int) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    optimizer = transformer_optimizer(
        process_group=dist.group.WORLD if rank < 2 else None,
        algorithm="f_muon",
        scale="match_rms_adamw",
    )
    if rank != 1:
        optimizer.observers = (lambda shown: seen.append(contents(shown)),)
    optimizer.step()
    return seen


def contents(observation: Any) -> dict[str, Any]:
    """Return copies of what an observer is shown."""
    fields = ("gradient", "momentum", "direction", "factor", "before", "after", "finite")
    return {name: torch.as_tensor(getattr(observation, name)).clone() for name in fields}


def test_an_observer_on_one_rank_sees_the_directions_of_all(tmp_path):
    first, second = on_ranks(tmp_path, _observed)
    want = _observed(2)
    assert (len(first), len(second)) == (len(want), 0)
    for got, expected in zip(first, want, strict=True):
        assert_equal_bits(got, expected)


def test_copies_of_an_optimizer_share_nothing(tmp_path):
    for copied in on_ranks(tmp_path, _copied):
        assert copied == (None, None)


def _copied(rank: int) -> tuple[Any, Any]:
    optimizer = transformer_optimizer(process_group=dist.group.WORLD)
    pickled = pickle.loads(pickle.dumps(optimizer))
    return copy.deepcopy(optimizer).process_group, pickled.process_group


def _tensor_parallel(rank: int, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the weights of layers sharded by tensor parallelism and FSDP2, and of whole ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found = []
    for sharded in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 40))
        if sharded:
            plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
            parallelize_module(net, mesh["tensor"], plan)
            fully_shard(net, mesh=mesh["data"])
            assert all(shard_map(p) is not None for p in net.parameters())
        parameters = [net[0].weight, net[1].weight]
        optimizer = Fanion(parameters, **options)
        for step in range(3):
            for p in parameters:
                generator = torch.Generator().manual_seed(step)
                gradient = torch.randn(p.shape, generator=generator)
                if sharded:
                    gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
                p.grad = gradient
            optimizer.step()
        found.append({name: full_copy(p) for name, p in net.named_parameters()})
    return found


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3]], ids=str)
def test_tensor_parallel_fsdp2_steps_whole_matrices(tmp_path, options):
    for sharded, whole in on_ranks(tmp_path, _tensor_parallel, options, count=4):
        assert_equal_bits(sharded, whole)


SIDE = 128


def _peak_memory(rank: int) -> float:
    """Return the most memory that a step of sharded matrices takes, in float32 matrices."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = []
    for _ in range(12):
        p = nn.Parameter(distribute_tensor(torch.ones(SIDE, SIDE), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.randn(SIDE, SIDE), mesh, [Shard(0)])
        parameters.append(p)
    optimizer = Fanion(parameters, stack_entries=2 * SIDE**2)
    optimizer.step()
    peaks = []
    for _ in range(3):  # threads of gloo that the machine makes wait hold their buffers longer
        with profile(profile_memory=True) as profiler:
            optimizer.step()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        peaks.append(max(itertools.accumulate(size for _, size in changes)))
    return min(peaks) / (4 * SIDE**2)


def test_a_step_of_shards_takes_the_memory_of_two_stacks(tmp_path):
    for matrices in on_ranks(tmp_path, _peak_memory):
        assert 1 < matrices <= 2 * (2 * 2)  # a stack has stack_entries for each of two ranks


def test_a_scalar_lies_whole_on_each_rank():
    whole, shard, again = torch.tensor(2.0), torch.zeros(()), torch.zeros(())
    region = sharing._region([])
    region.cut(whole, shard)
    region.paste(shard, again)
    assert region.shape == () and shard == again == whole

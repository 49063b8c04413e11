"""Rank-k directions from products with strips: steps as by one process, no matrix travels."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_fanions import Fanion
from lit_fanions.optim import shared_step
from lit_fanions.optim.options import default_options
from lit_fanions.optim.sharded_products import strips_to_multiply
from tests.optim.ranks import full_copy, on_ranks

pytestmark = pytest.mark.timeout(120)

SHAPES = [(65, 80), (65, 80), (100, 50)]
PLANTED = 8
OPTIONS: list[dict[str, Any]] = [
    {"algorithm": "neon"},
    {"algorithm": "fanion", "rank": 8},
    {"algorithm": "fanion", "rank": 3, "solver": "subspace", "solver_steps": 2, "oversampling": 2},
    {"algorithm": "f_neon", "nesterov": False},
    {"algorithm": "s_fanion", "rank": 5, "scale": "match_rms_adamw"},
    {"algorithm": "fanion", "rank": 4, "error_feedback": True},
    {"algorithm": "dion", "rank": 6},
    {"algorithm": "dion", "rank": 6, "error_feedback": False, "alpha": 0.7},
]
ROWS, COLUMNS = ((2,), [Shard(0)]), ((2,), [Shard(1)])


def gradients(step: int, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Return matrices with eight leading singular values apart from the others, in any step."""
    fixed, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + step))
    found = []
    for rows, cols in shapes:
        u, v = (torch.randn(size, PLANTED, generator=fixed) for size in (rows, cols))
        found.append(3 * u @ v.mT + torch.randn(rows, cols, generator=own))
    return found


def make(place: Any, shapes: list[tuple[int, int]] = SHAPES, **options: Any) -> Fanion:
    parameters = [nn.Parameter(place(torch.zeros(shape))) for shape in shapes]
    return Fanion(parameters, lr=0.5, weight_decay=0.1, **options)


def train(optimizer: Fanion, place: Any, steps: range = range(3)) -> None:
    """Step; the gradient of the first parameter is not finite in step 1."""
    parameters = optimizer.param_groups[0]["params"]
    for step in steps:
        shapes = [p.shape for p in parameters]
        for p, gradient in zip(parameters, gradients(step, shapes), strict=True):
            p.grad = place(gradient)
        if step == 1:
            broken = gradients(step, [parameters[0].shape])[0]
            broken[-1, -1] = torch.nan  # on the last rank
            parameters[0].grad = place(broken)
        optimizer.step()


def contents(optimizer: Fanion) -> dict[str, Tensor]:
    """Return weights and states; of bases their projectors, as signs of columns are arbitrary."""
    found = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        found[f"{i}"] = full_copy(p)
        for key, x in optimizer.state[p].items():
            x = full_copy(x)
            found[f"{i}.{key}"] = x @ x.mT if key == "basis0" else x
    return found


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, x in want.items():
        error = (got[key].double() - x.double()).norm()
        # Columns of a basis beyond the rank have small singular values: rounding errors are larger.
        bound = 1e-4 if key.endswith("basis0") else 1e-5
        assert error <= bound * x.double().norm(), f"{key}: {error}"


def assert_equal_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def identity(x: Tensor) -> Tensor:
    return x


def alone(steps: range = range(3), **options: Any) -> dict[str, Tensor]:
    optimizer = make(identity, **options)
    train(optimizer, identity, steps)
    return contents(optimizer)


def placing(sizes: tuple[int, ...], placements: list[Any]) -> Any:
    mesh = init_device_mesh("cpu", sizes)
    return lambda x: distribute_tensor(x, mesh, placements)


class CountSteps:
    """Count the parameters that are stepped by products."""

    def __init__(self) -> None:
        self.count, self._step = 0, shared_step._step_strips
        shared_step._step_strips = self._counted

    def _counted(self, pieces: Any, *args: Any) -> None:
        self.count += len(pieces)
        self._step(pieces, *args)


def _stepped(
    rank: int, sizes: tuple[int, ...], placements: list[Any], every: list[dict[str, Any]]
) -> list[tuple[dict[str, Tensor], int]]:
    place, found, counter = placing(sizes, placements), [], CountSteps()
    for options in every:
        before = counter.count
        optimizer = make(place, **options)
        train(optimizer, place)
        found.append((contents(optimizer), counter.count - before))
    return found


def assert_stepped_as_alone(
    ranks: list[Any], every: list[dict[str, Any]], count: int = 3 * len(SHAPES)
) -> None:
    for i, options in enumerate(every):
        want = alone(**options)
        assert want["0.skipped"] == 1
        for rank in ranks:
            got, by_products = rank[i]
            assert by_products == count, options
            assert_close(got, want)
            assert_equal_bits(got, ranks[0][i][0])


@pytest.mark.parametrize(("sizes", "placements"), [ROWS, COLUMNS], ids=str)
def test_strips_are_stepped_as_whole_matrices(tmp_path, sizes, placements):
    assert_stepped_as_alone(on_ranks(tmp_path, _stepped, sizes, placements, OPTIONS), OPTIONS)


@pytest.mark.parametrize(("sizes", "placements"), [((3,), [Shard(0)]), ((3,), [Shard(1)])], ids=str)
def test_uneven_strips_are_stepped_as_whole_matrices(tmp_path, sizes, placements):
    every = [OPTIONS[i] for i in (0, 4, 6)]
    ranks = on_ranks(tmp_path, _stepped, sizes, placements, every, count=3)
    assert_stepped_as_alone(ranks, every)


def test_a_rank_without_rows_takes_part(tmp_path):
    # torch.chunk gives the third rank none of four rows.
    every = [{"algorithm": "f_neon", "oversampling": 0, "solver": "subspace", "shapes": [(4, 80)]}]
    ranks = on_ranks(tmp_path, _stepped, (3,), [Shard(0)], every, count=3)
    assert_stepped_as_alone(ranks, every, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("placements", [[Replicate(), Shard(0)], [Shard(1), Replicate()]], ids=str)
def test_replicas_of_strips_are_stepped_as_whole_matrices(tmp_path, placements):
    ranks = on_ranks(tmp_path, _stepped, (2, 2), placements, OPTIONS, count=4)
    assert_stepped_as_alone(ranks, OPTIONS)


def _propagated(rank: int) -> list[bool]:
    found = []
    for placement in (Shard(0), Shard(1)):
        place = placing((2,), [placement])
        for algorithm in ("f_neon", "dion"):
            optimizer = make(place, algorithm=algorithm, rank=2, nonfinite="propagate")
            train(optimizer, place, range(2))
            states = contents(optimizer)
            found += [bool(states["0"].isnan().all()), bool(states["1"].isfinite().all())]
            found.append(bool(states["0.basis0"].isfinite().all()))
    return found


def test_a_gradient_that_is_not_finite_is_propagated_to_all_strips(tmp_path):
    for found in on_ranks(tmp_path, _propagated):
        assert all(found), found


def _widened(rank: int) -> tuple[dict[str, Tensor], int]:
    place, counter = placing(*ROWS), CountSteps()
    return _grown(place), counter.count


def _grown(place: Any) -> dict[str, Tensor]:
    optimizer = make(place, algorithm="fanion", rank=2)
    train(optimizer, place, range(2, 4))
    optimizer.param_groups[0]["rank"] = 5
    train(optimizer, place, range(4, 6))
    return contents(optimizer)


def test_an_owner_widens_the_bases_of_a_rank_that_grows(tmp_path):
    want = _grown(identity)
    for got, by_products in on_ranks(tmp_path, _widened):
        assert by_products == 3 * len(SHAPES)  # of four steps
        assert_close(got, want)


def _resumed(rank: int) -> list[dict[str, Any]]:
    found = []
    for options in OPTIONS[-3:]:
        place = placing(*ROWS)
        optimizer = make(place, **options)
        train(optimizer, place)
        saved = copy.deepcopy(optimizer.state_dict())
        other = make(place, **options)
        for p, q in zip(*(o.param_groups[0]["params"] for o in (other, optimizer)), strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(saved)
        full = copy.deepcopy(saved)
        for state in full["state"].values():
            state.update({key: full_copy(x) for key, x in state.items()})
        weights = [full_copy(p) for p in optimizer.param_groups[0]["params"]]
        for each in (optimizer, other):
            train(each, place, range(3, 5))
        found.append({
            "straight": contents(optimizer), "resumed": contents(other),
            "full": full, "weights": weights,
        })  # fmt: skip
    return found


def test_strips_resume_to_the_bit_and_by_one_process(tmp_path):
    for rank in on_ranks(tmp_path, _resumed):
        for result, options in zip(rank, OPTIONS[-3:], strict=True):
            assert_equal_bits(result["resumed"], result["straight"])
            optimizer = make(identity, **options)
            optimizer.load_state_dict(result["full"])
            for p, w in zip(optimizer.param_groups[0]["params"], result["weights"], strict=True):
                p.data.copy_(w)
            train(optimizer, identity, range(3, 5))
            assert_close(contents(optimizer), result["straight"])


class CountCollectives(TorchDispatchMode):
    """List the bytes of the largest tensor of each collective but those of flags."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            name = func.overloadpacket.__name__
            are_numbers = any(x.is_floating_point() for x in tensors)
            if tensors and (are_numbers or not name.startswith("allreduce")):
                self.sizes.append(max(x.nbytes for x in tensors))
        return func(*args, **(kwargs or {}))


LIKE = [(64, 96)] * 5
WARMING = 8  # passes of the first step before the one of every step
LENGTHS = 8 * len(LIKE)


def _counted(rank: int, algorithm: str, placement: Any) -> list[list[int]]:
    place, found = placing((2,), [placement]), []
    optimizer = make(place, LIKE, algorithm=algorithm, rank=4)
    for step in (0, 2):
        parameters = optimizer.param_groups[0]["params"]
        for p, gradient in zip(parameters, gradients(step, LIKE), strict=True):
            p.grad = place(gradient)
        with CountCollectives() as counter:
            optimizer.step()
        found.append(counter.sizes)
    return found


@pytest.mark.parametrize(("algorithm", "width"), [("fanion", 12), ("dion", 4)])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_a_step_sends_blocks_of_k_columns_alone(tmp_path, algorithm, width, placement):
    (rows, cols), count = LIKE[0], len(LIKE)
    gram = 2 * 8 * width**2 if placement.dim == 0 else 0
    for first, second in on_ranks(tmp_path, _counted, algorithm, placement):
        # One collective for all matrices: lengths, two Gram matrices or a sum, and a block.
        assert len(second) == (4 if placement.dim == 0 else 3)
        assert sum(second) <= count * ((rows + cols) * width * 4 + gram) + LENGTHS
        passes = 1 + (WARMING if algorithm == "fanion" else 0)
        assert max(first) <= count * max(rows, cols) * width * 4
        assert sum(first) <= 1.1 * passes * count * ((rows + cols) * width * 4 + gram)


def _strips(rank: int, every: list[tuple[dict[str, Any], Any]]) -> list[bool]:
    found = []
    mesh, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for options, placements in every:
        options = {"algorithm": "fanion", "rank": 8, **options}
        x = torch.zeros(options.pop("shape", (96, 96)), dtype=options.pop("dtype", torch.float32))
        group = {**default_options(options["algorithm"]), "alpha": 1.0, "blend": "frobenius"}
        p: DTensor = distribute_tensor(x, mesh if len(placements) == 1 else grid, placements)
        found.append(strips_to_multiply(p, {**group, **options}) is not None)
    return found


ROW = [Shard(0)]
BY_PRODUCTS: list[tuple[dict[str, Any], list[Any]]] = [
    ({}, ROW),
    ({}, [Shard(1)]),
    ({}, [Shard(0), Replicate()]),
    ({"alpha": 0.5, "blend": "sign"}, ROW),
    ({"algorithm": "dion"}, ROW),
    ({"dtype": torch.bfloat16, "rank": 2}, ROW),
]
BY_OWNERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"algorithm": "muon", "rank": "full"}, ROW),
    ({"algorithm": "kyfan"}, ROW),
    ({"alpha": 0.5, "blend": "row"}, ROW),
    ({"alpha": 0.0}, ROW),
    ({"solver": "lanczos"}, ROW),
    ({"solver": "polar"}, ROW),
    ({"solver": "randomized"}, ROW),
    ({"rank": 40}, ROW),  # an owner receives less
    ({"shape": (32, 96), "rank": 1}, ROW),  # auto is the exact solver on a CPU
    ({"adapt": "rows"}, ROW),
    ({"renormalize": True}, ROW),
    ({"splits": 3}, ROW),
    ({"layout": "transposed"}, ROW),
    ({"share_work": False}, ROW),
    ({"dtype": torch.float64}, ROW),
    ({"shape": (96, 48, 2)}, ROW),
    ({}, [Replicate()]),
    ({}, [Shard(0), Shard(1)]),
    ({}, [Shard(0), Shard(0)]),
]
CASES = BY_PRODUCTS + BY_OWNERS


def test_products_are_taken_where_they_suffice_and_send_less(tmp_path):
    for found in on_ranks(tmp_path, _strips, CASES, count=4):
        assert [case for case, is_chosen in zip(CASES, found, strict=True) if is_chosen] == (
            BY_PRODUCTS
        )

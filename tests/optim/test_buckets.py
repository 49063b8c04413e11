"""Small parameters of adamw and sgd that accelerators step as views of a few tensors."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from lit_fanions import Fanion
from lit_fanions.optim import buckets
from lit_fanions.optim.together import has_own_storage
from tests.lmo.conftest import DeviceBranches
from tests.optim.ranks import full_copy, on_ranks
from tests.optim.stepping import normal
from tests.optim.steps import through_a_file

SHAPES = [(5,), (7,), (3, 4), ()]
ALGORITHMS = pytest.mark.parametrize("algorithm", ["adamw", "sgd"])


def make(algorithm: str, **options) -> Fanion:
    params = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    return Fanion(params, algorithm=algorithm, **{"lr": 0.1, "weight_decay": 0.1, **options})


def params_of(optimizer: Fanion) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def step(optimizer: Fanion, seeds: range, without: int | None = None, nan: int | None = None):
    """Step by the branches for accelerators."""
    for seed in seeds:
        for i, p in enumerate(params_of(optimizer)):
            gradient = normal(*p.shape, seed=100 * seed + i).to(p.dtype)
            p.grad = None if i == without else gradient * torch.nan if i == nan else gradient
        with DeviceBranches():
            optimizer.step()


def are_together(optimizer: Fanion, key: str = "skipped") -> bool:
    states = [optimizer.state[p] for p in params_of(optimizer)]
    return len({state[key].untyped_storage().data_ptr() for state in states}) == 1


def assert_same(first: Fanion, second: Fanion) -> None:
    for p, q in zip(params_of(first), params_of(second), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(first.state[p], second.state[q], rtol=0, atol=0)


def test_states_are_views_and_are_saved_with_their_own_size():
    optimizer = make("adamw")
    step(optimizer, range(1))
    assert all(are_together(optimizer, key) for key in ("exp_avg", "exp_avg_sq", "step", "skipped"))
    saved = optimizer.state_dict()["state"]
    assert all(has_own_storage(x) for state in saved.values() for x in state.values())


@ALGORITHMS
@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
def test_copies_train_on_alike(algorithm, how):
    optimizer = make(algorithm)
    step(optimizer, range(2))
    if how == "load":
        twin = Fanion(copy.deepcopy(params_of(optimizer)), algorithm=algorithm, lr=1)
        twin.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        twin = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}[how](
            optimizer
        )
    for each in (twin, optimizer):
        step(each, range(2, 4), nan=1)
    assert are_together(twin)
    assert_same(twin, optimizer)


def zero_in_place(state: dict, key: str) -> None:
    state[key].zero_()


def zero_by_another_tensor(state: dict, key: str) -> None:
    state[key] = torch.zeros_like(state[key])


def zero_by_data(state: dict, key: str) -> None:
    state[key].data = torch.zeros_like(state[key])


@pytest.mark.parametrize("key", ["exp_avg_sq", "step"])
@pytest.mark.parametrize("change", [zero_by_another_tensor, zero_by_data])
def test_a_change_of_a_state_reaches_the_bucket(change, key):
    found, wanted = make("adamw"), make("adamw")
    for optimizer, zero in ((found, change), (wanted, zero_in_place)):
        step(optimizer, range(2))
        zero(optimizer.state[params_of(optimizer)[1]], key)
        step(optimizer, range(2, 4))
    assert_same(found, wanted)
    assert are_together(found, key)


@ALGORITHMS
def test_parameters_without_a_gradient_stay_as_they_are(algorithm, monkeypatch):
    def train() -> Fanion:
        optimizer = make(algorithm)
        step(optimizer, range(2))
        frozen = params_of(optimizer)[1]
        before = frozen.detach().clone()
        step(optimizer, range(2, 4), without=1, nan=2)
        assert torch.equal(frozen, before)
        step(optimizer, range(4, 5))
        return optimizer

    found = train()
    assert are_together(found)
    monkeypatch.setattr(buckets, "_SMALL", 0)
    assert_same(found, train())


@ALGORITHMS
def test_changed_parameters_are_stepped_as_if_they_had_no_bucket(algorithm, monkeypatch):
    """One is cast, one replaced by another, and then NaN is let through."""

    def train() -> Fanion:
        optimizer = make(algorithm)
        step(optimizer, range(1))
        a, b, *_ = params_of(optimizer)
        a.data = a.data.double()
        params_of(optimizer)[1], before = nn.Parameter(b.detach().clone()), b.detach().clone()
        step(optimizer, range(1, 3))
        assert torch.equal(b, before)
        optimizer.param_groups[0]["nonfinite"] = "propagate"
        step(optimizer, range(3, 4), nan=2)
        assert params_of(optimizer)[2].isnan().all()
        return optimizer

    found = train()
    monkeypatch.setattr(buckets, "_SMALL", 0)
    torch.testing.assert_close(
        [p.detach() for p in params_of(found)],
        [p.detach() for p in params_of(train())],
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


@ALGORITHMS
def test_buckets_step_16_bit_parameters_as_each_alone(algorithm, monkeypatch):
    def train() -> Fanion:
        params = [nn.Parameter(normal(*shape, seed=1).bfloat16()) for shape in SHAPES]
        optimizer = Fanion(params, algorithm=algorithm, lr=0.1)
        step(optimizer, range(3), nan=1)
        return optimizer

    found = train()
    monkeypatch.setattr(buckets, "_SMALL", 0)
    assert_same(found, train())


def train_shards(rank: int, algorithm: str, sharded: bool) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (1,))
    place = (lambda x: distribute_tensor(x, mesh, [Replicate()])) if sharded else (lambda x: x)
    params = [nn.Parameter(place(normal(*shape, seed=i))) for i, shape in enumerate(SHAPES)]
    optimizer = Fanion(params, algorithm=algorithm, lr=0.1)
    for seed in range(3):
        for i, p in enumerate(params):
            gradient = normal(*p.shape, seed=100 * seed + i)
            p.grad = place(gradient * torch.nan if (i, seed) == (1, 1) else gradient)
        with DeviceBranches():
            optimizer.step()
    tensors = [x for p in params for x in (p, *optimizer.state[p].values())]
    return [full_copy(x) for x in tensors]


@ALGORITHMS
def test_small_shards_are_stepped_as_parameters_are(algorithm, tmp_path):
    (found,) = on_ranks(tmp_path, train_shards, algorithm, True, count=1)
    (wanted,) = on_ranks(tmp_path, train_shards, algorithm, False, count=1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

"""Momenta that accelerators keep as one tensor for all parameters of a shape."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lit_fanions import Fanion
from lit_fanions.optim import together
from tests.lmo.conftest import DeviceBranches
from tests.matrices import gaussian
from tests.optim.steps import EVERY, through_a_file

SHAPES = [(8, 6), (8, 6), (8, 6), (5, 9)]


def optimizer_of_stacks(algorithm: str = "muon", **options) -> Fanion:
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    return Fanion(params, **{"algorithm": algorithm, "lr": 0.05, **options})


def step(optimizer: Fanion, seeds: range, without: int | None = None) -> None:
    """Step by the branches for accelerators, one parameter without a gradient if asked for."""
    (group,) = optimizer.param_groups
    for seed in seeds:
        for i, p in enumerate(group["params"]):
            gradient = gaussian(*p.shape, seed=100 * seed + i).to(p.dtype)
            p.grad = None if i == without else torch.empty_like(p).copy_(gradient)
        with DeviceBranches():
            optimizer.step()


def momenta(optimizer: Fanion) -> list[torch.Tensor]:
    return [optimizer.state[p]["momentum"] for p in optimizer.param_groups[0]["params"]]


def are_stacked(optimizer: Fanion) -> bool:
    storages = [m.untyped_storage().data_ptr() for m in momenta(optimizer)[:3]]
    return len(set(storages)) == 1


def assert_same(first: Fanion, second: Fanion) -> None:
    a, b = first.param_groups[0]["params"], second.param_groups[0]["params"]
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(first.state[p], second.state[q], rtol=0, atol=0)


def test_momenta_of_one_shape_are_views_of_one_tensor():
    optimizer = optimizer_of_stacks()
    step(optimizer, range(1))
    assert are_stacked(optimizer)
    assert all(map(together.has_own_storage, momenta(optimizer)[3:]))


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_second_step_makes_no_new_storage_in_the_state(algorithm, on_cpu):
    optimizer = optimizer_of_stacks(algorithm)

    def addresses() -> list[int]:
        states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        return [x.data_ptr() for state in states for x in state.values()]

    step(optimizer, range(1))
    before = addresses()
    if on_cpu:
        optimizer.step()
    else:
        step(optimizer, range(1, 2))
    assert addresses() == before


def convolutions() -> Fanion:
    """Return an optimizer of weights in channels_last."""
    draws = [gaussian(8, 3, 2, 2, seed=i) for i in range(3)]
    params = [nn.Parameter(x.to(memory_format=torch.channels_last)) for x in draws]
    return Fanion(params, algorithm="muon", lr=0.05)


def test_momenta_of_weights_in_channels_last_are_stacked_loaded_and_kept_in_this_order():
    optimizer, resumed = convolutions(), convolutions()
    step(optimizer, range(2))
    addresses = [m.data_ptr() for m in momenta(optimizer)]
    assert are_stacked(optimizer)
    for p, q in zip(*(x.param_groups[0]["params"] for x in (optimizer, resumed)), strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for same in (optimizer, resumed):
        step(same, range(2, 4))
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in momenta(same))
        assert are_stacked(same)
    assert [m.data_ptr() for m in momenta(optimizer)] == addresses
    assert_same(optimizer, resumed)


def test_a_saved_state_does_not_carry_its_stack():
    optimizer = optimizer_of_stacks()
    step(optimizer, range(2))
    state = optimizer.state_dict()["state"]
    assert all(together.has_own_storage(x) for own in state.values() for x in own.values())
    buffer = io.BytesIO()
    torch.save(state[0]["momentum"], buffer)
    lone = io.BytesIO()
    torch.save(state[0]["momentum"].clone(), lone)
    assert len(buffer.getvalue()) == len(lone.getvalue())
    assert len(pickle.dumps(optimizer)) < 1.3 * len(pickle.dumps(optimizer_of_cpu()))


def optimizer_of_cpu() -> Fanion:
    optimizer = optimizer_of_stacks()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle"])
@pytest.mark.parametrize("algorithm", ["muon", "f_fanion", "dion"])
def test_copies_of_a_stacked_state_train_on_alike(algorithm, how):
    optimizer = optimizer_of_stacks(algorithm)
    step(optimizer, range(2))
    if how == "load":
        twin = Fanion(copy.deepcopy(optimizer.param_groups[0]["params"]), algorithm=algorithm, lr=1)
        twin.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        twin = (
            copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        )
    step(twin, range(2, 4))
    step(optimizer, range(2, 4))
    assert are_stacked(twin)
    assert_same(twin, optimizer)


def test_a_change_of_a_state_reaches_the_stack():
    optimizer, other = optimizer_of_stacks(), optimizer_of_stacks()
    step(optimizer, range(2))
    step(other, range(2))
    momenta(optimizer)[1].zero_()  # in place
    p = other.param_groups[0]["params"][1]
    other.state[p]["momentum"] = torch.zeros_like(p)  # by another tensor
    for each in (optimizer, other):
        step(each, range(2, 4))
    assert_same(optimizer, other)


@pytest.mark.parametrize("algorithm", ["muon", "dion"])
def test_parameters_without_a_gradient_step_as_without_a_stack(algorithm, monkeypatch):
    found = optimizer_of_stacks(algorithm)
    step(found, range(2))
    step(found, range(2, 4), without=1)
    step(found, range(4, 5))
    assert are_stacked(found)
    monkeypatch.setattr(together, "_LARGE", 0)
    wanted = optimizer_of_stacks(algorithm)
    step(wanted, range(2))
    step(wanted, range(2, 4), without=1)
    step(wanted, range(4, 5))
    assert not are_stacked(wanted)
    assert_same(found, wanted)

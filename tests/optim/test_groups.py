"""Parameter groups: their parameters, their names, and groups added later."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lit_fanions import Fanion
from tests.matrices import gaussian, parameter, parameter64
from tests.optim.steps import snapshot, take_steps, trained


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (lambda p: [nn.Parameter(torch.ones(4))], ValueError, r"\(4,\), which is no matrix"),
        (lambda p: [nn.Parameter(torch.ones(()))], ValueError, "no matrix"),
        (lambda p: [nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))], TypeError, "complex"),
        (lambda p: [torch.ones(3, 3, dtype=torch.int)], TypeError, "int32"),
        (lambda p: [p], ValueError, "more than one"),
        (lambda p: {p}, TypeError, "set"),
        (lambda p: ["w"], TypeError, "str"),
    ],
)
def test_impossible_parameters_are_refused_and_leave_no_trace(params, kind, message):
    p = parameter64(6, 4)
    optimizer = Fanion([p])
    before = snapshot(optimizer)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": params(p), "name": "new"})
    assert snapshot(optimizer) == before
    optimizer.add_param_group({"params": [parameter64(6, 4)], "name": "new"})  # the name is free


def test_a_group_must_be_a_dict():
    with pytest.raises(TypeError, match="dict"):
        Fanion([parameter64(3, 3)]).add_param_group([parameter64(3, 3)])


def test_every_group_has_a_unique_name_of_its_own():
    groups = [{"params": [parameter64(4, 4)]} for _ in range(3)]
    groups.append({"params": [parameter64(4, 4)], "algorithm": "neon"})
    optimizer = Fanion(groups)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["muon", "muon_1", "muon_2", "neon"]


@pytest.mark.parametrize("how", ["load", "pickle", "deepcopy"])
def test_groups_added_later_get_the_constructors_options(how):
    _, optimizer = trained("fanion", 2, rank=3, weight_decay=0.1)
    if how == "load":
        _, other = trained("fanion", 0, rank=3, weight_decay=0.1)
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
    else:
        optimizer = copy.deepcopy(optimizer) if how == "deepcopy" else (
            pickle.loads(pickle.dumps(optimizer))
        )  # fmt: skip
    optimizer.add_param_group({"params": [("c", parameter(9, 7, dtype=torch.float32))]})
    group = optimizer.param_groups[1]
    assert (group["rank"], group["weight_decay"], group["name"]) == (3, 0.1, "fanion_1")
    take_steps(optimizer, 2, start=2)
    with pytest.raises(ValueError, match="did you mean"):
        optimizer.add_param_group({"params": [("d", parameter64(9, 7))], "algoritm": "muon"})


def test_every_group_keeps_its_own_options():
    ps = [parameter(8, 8, seed=i) for i in range(2)]
    both = Fanion([{"params": [ps[0]], "alpha": 0.3, "lr": 0.1}, {"params": [ps[1]]}],
                  algorithm="f_muon")  # fmt: skip
    alone = [parameter(8, 8, seed=i) for i in range(2)]
    first = Fanion([alone[0]], algorithm="f_muon", alpha=0.3, lr=0.1)
    second = Fanion([alone[1]], algorithm="f_muon")
    for i in range(3):
        for j in range(2):
            ps[j].grad = alone[j].grad = gaussian(8, 8, seed=10 * i + j)
        for optimizer in (both, first, second):
            optimizer.step()
    assert torch.equal(ps[0], alone[0]) and torch.equal(ps[1], alone[1])


@pytest.mark.parametrize("value", [5, "world", True])
def test_what_is_no_process_group_is_refused(value):
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup"):
        Fanion([parameter(4, 3)], process_group=value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "a parameter group needs params, got an empty"),
        ({"params": None}, "a parameter group needs params"),
        ({"params": [parameter(4, 3)], 5: 1}, "keys of a parameter group must be strings, got 5"),
        ({"params": [(5, parameter(4, 3))]}, "name of a parameter must be a string, got 5"),
    ],
)
def test_what_is_no_group_is_refused_in_words(group, message):
    with pytest.raises(TypeError, match=message):
        Fanion([group])

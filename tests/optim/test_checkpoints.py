"""Saving, loading and copying an optimizer."""

import copy
import pickle

import pytest
import torch

from lit_fanions import Fanion
from tests.matrices import gaussian64, parameter, parameter64
from tests.optim.steps import (
    EVERY,
    SAVED,
    assert_same_state,
    build,
    one_matrix,
    snapshot,
    take_steps,
    through_a_file,
    trained,
)


# In float32 and without a file: test_contract.py.
@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [*((name, torch.bfloat16) for name in EVERY), ("neon", torch.float32), ("dion", torch.float32)],
)
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(algorithm, dtype):
    straight, optimizer = trained(algorithm, 3, dtype)
    state = through_a_file(optimizer.state_dict())
    weights = [p.detach().clone() for p in straight]
    take_steps(optimizer, 3, start=3)

    resumed, other = trained(algorithm, 0, dtype)
    with torch.no_grad():
        for p, weight in zip(resumed, weights, strict=True):
            p.copy_(weight)
    other.load_state_dict(state)
    take_steps(other, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert_same_state(optimizer, other)


def test_the_state_is_complete_after_one_step_without_some_gradients():
    named = [("a", parameter64(8, 6)), ("b", parameter64(8, 6)), ("c", parameter64(4))]
    optimizer = Fanion(
        [{"params": named[:2], "algorithm": "neon"},
         {"params": named[2:], "algorithm": "adamw", "lr": 0.1}]
    )  # fmt: skip
    named[0][1].grad = gaussian64(8, 6)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert state[0].keys() == state[1].keys() == {"momentum", "basis0", "warm", "skipped"}
    assert state[2].keys() == {"step", "exp_avg", "exp_avg_sq", "skipped"}
    assert torch.equal(named[1][1], gaussian64(8, 6))


def test_loading_keeps_the_momentum_dtype():
    (p, _), optimizer = trained("fanion", 3, torch.bfloat16, momentum_dtype="float32")
    (q, _), other = trained("fanion", 0, torch.bfloat16, momentum_dtype="float32")
    other.load_state_dict(optimizer.state_dict())
    for key, dtype in (("momentum", torch.float32), ("skipped", torch.int64)):
        assert other.state[q][key].dtype == dtype
        assert torch.equal(other.state[q][key], optimizer.state[p][key])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("matrices", "muon", SAVED[0][2]), SAVED[1]], "'matrix' there, 'matrices' here"),
        ([("matrix", "neon", SAVED[0][2]), SAVED[1]], "'muon' there, 'neon' here"),
        ([("matrix", "muon", [("v", (4, 3))]), SAVED[1]], "'w' there, 'v' here"),
        ([("matrix", "muon", [("w", (3, 4))]), SAVED[1]], r"\(4, 3\).*\(3, 4\)"),
        ([SAVED[0], ("other", "adamw", [("b", (5,))])], r"\(4,\).*\(5,\)"),
        ([SAVED[0]], "groups"),
        ([*SAVED, ("more", "sgd", [("c", (2,))])], "groups"),
        ([SAVED[0], ("other", "adamw", [("b", (4,)), ("c", (4,))])], "'c' here"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(groups, message):
    saved, optimizer = build(SAVED), build(groups)
    take_steps(saved, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert snapshot(optimizer) == before


def test_a_checkpoint_with_another_number_of_unnamed_parameters_is_refused_in_words():
    saved = Fanion([parameter64(4, 3), parameter64(4, 3)])
    with pytest.raises(ValueError, match=r"param|group") as error:
        Fanion([parameter64(4, 3)]).load_state_dict(saved.state_dict())
    assert "zip()" not in str(error.value)


def test_a_checkpoint_of_another_optimizer_is_refused():
    p = parameter64(4, 3)
    with pytest.raises(ValueError, match="checkpoint"):
        Fanion([p]).load_state_dict(torch.optim.AdamW([p]).state_dict())


@pytest.mark.parametrize(
    "damaged", [{"lr": float("nan")}, {"rank": -3}, {"polar_steps": 10**6}, {"blend": "ball"}]
)
def test_a_checkpoint_with_an_impossible_option_is_refused(damaged):
    optimizer = one_matrix()
    before = snapshot(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(damaged)
    with pytest.raises(ValueError, match=f"checkpoint's group 'muon': {next(iter(damaged))}"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def test_loading_takes_the_options_that_may_change():
    saved = one_matrix(lr=0.3, algorithm="f_muon", alpha=0.7)
    take_steps(saved, 1)
    optimizer = one_matrix(lr=0.1, algorithm="f_muon")
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["alpha"]) == (0.3, 0.7)


def test_loading_leaves_the_given_dict_alone():
    saved = one_matrix()
    take_steps(saved, 1)
    state = copy.deepcopy(saved.state_dict())
    optimizer = one_matrix()
    optimizer.load_state_dict(state_dict=state)
    assert str(state) == str(saved.state_dict())


@pytest.mark.parametrize("algorithm", ["neon", "dion", "f_muon", "adamw"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_independently(algorithm, how):
    _, optimizer = trained(algorithm, 2)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    take_steps(optimizer, 2, start=2)
    take_steps(twin, 2, start=2)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, twin)), strict=True):
        assert torch.equal(p, q)
    assert_same_state(optimizer, twin)


@pytest.mark.parametrize("algorithm", ["muon", "neon", "dion", "adamw", "sgd"])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float64, torch.bfloat16])
def test_a_momentum_of_another_dtype_can_be_loaded_and_stepped(algorithm, loaded):
    p = parameter(8, 6, dtype=torch.bfloat16)
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    take_steps(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for value in (state["state"][0][key] for key in ("momentum", "exp_avg", "exp_avg_sq")
                  if key in state["state"][0]):  # fmt: skip
        value.data = value.data.to(loaded)
    other = Fanion([p], algorithm=algorithm, lr=0.02)
    other.load_state_dict(state)
    take_steps(other, 2, start=2)
    assert p.isfinite().all()


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_step_without_gradients_makes_the_whole_state(algorithm):
    p = parameter(8, 6)
    before = p.detach().clone()
    optimizer = Fanion([p], algorithm=algorithm, lr=0.02)
    optimizer.step()
    keys = set(optimizer.state[p])
    assert torch.equal(p, before) and keys
    take_steps(optimizer, 2)
    assert set(optimizer.state[p]) == keys


def test_a_checkpoint_from_before_an_option_existed_can_be_stepped():
    p = parameter(6, 4)
    optimizer = Fanion([p])
    take_steps(optimizer, 1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["renormalize"]
    optimizer.load_state_dict(saved)
    take_steps(optimizer, 1)
    assert optimizer.param_groups[0]["renormalize"] is False


YOUNGER = ["solver_steps", "oversampling", "stack_entries"]


@pytest.mark.parametrize("algorithm", ["muon", "neon", "f_fanion", "dion", "adamw", "sgd"])
def test_a_pickle_from_before_options_existed_can_be_stepped(algorithm):
    optimizer = Fanion([parameter(6, 4)], algorithm=algorithm, lr=0.02)
    take_steps(optimizer, 1)
    straight = copy.deepcopy(optimizer)
    for option in YOUNGER:
        optimizer.param_groups[0].pop(option, None)
    old = pickle.loads(pickle.dumps(optimizer))
    take_steps(old, 1, start=1)
    take_steps(straight, 1, start=1)
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in (old, straight)))
    assert old.param_groups[0].keys() == straight.param_groups[0].keys()


def test_an_old_state_dict_leaves_younger_options_as_they_were_configured():
    optimizer = Fanion([parameter(6, 4)], algorithm="fanion", rank=2)
    take_steps(optimizer, 1)
    saved = optimizer.state_dict()
    for option in YOUNGER:
        del saved["param_groups"][0][option]
    other = Fanion([parameter(6, 4)], algorithm="fanion", rank=2, oversampling=1, stack_entries=7)
    other.load_state_dict(saved)
    take_steps(other, 1)
    group = other.param_groups[0]
    assert [group[option] for option in YOUNGER] == [None, 1, 7]
    assert YOUNGER[0] not in saved["param_groups"][0]

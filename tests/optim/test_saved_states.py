"""Odd and damaged state_dicts are refused in words, and leave the optimizer as it was."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_fanions import Fanion
from lit_fanions.optim.schedules import GroupSchedule, ScheduleConfig
from tests.matrices import parameter64
from tests.optim.steps import snapshot, take_steps

MODES = ["error", "keep_momentum"]
every_mode = pytest.mark.parametrize("mode", MODES)
WHOLE = "no state_dict of an optimizer"


def optimizer_of(mode: str, algorithm: str = "neon") -> Fanion:
    groups = [
        {"params": [("a", parameter64(6, 4)), ("b", parameter64(4, 4))], "algorithm": algorithm},
        {"params": [("v", parameter64(5))], "algorithm": "adamw", "lr": 0.1},
    ]
    return Fanion(groups, on_mismatch=mode)


def saved_state() -> dict[str, Any]:
    optimizer = optimizer_of("error")
    take_steps(optimizer, 2)
    return copy.deepcopy(optimizer.state_dict())


def assert_refused(state: Any, message: str, mode: str, algorithm: str = "neon") -> None:
    optimizer = optimizer_of(mode, algorithm)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


@every_mode
@pytest.mark.parametrize("given", [None, 5, [1], "state param_groups", {}, {"state": {}}])
def test_what_is_no_state_dict_is_refused(given, mode):
    assert_refused(given, WHOLE, mode)


FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "state of nothing": (lambda s: s.update(state=None), "its 'state' is a NoneType"),
    "state in a list": (lambda s: s.update(state=[1]), "its 'state' is a list"),
    "groups of nothing": (lambda s: s.update(param_groups=None), "'param_groups' is a NoneType"),
    "groups of numbers": (lambda s: s.update(param_groups=[1, 2]), "group 0 has no list of params"),
    "no params": (lambda s: s["param_groups"][1].pop("params"), "group 1 has no list of params"),
    "params are text": (lambda s: s["param_groups"][0].update(params="ab"), "no list of params"),
    "params are lists": (lambda s: s["param_groups"][0].update(params=[[0]]), "no list of params"),
    "a parameter twice": (lambda s: s["param_groups"][0].update(params=[0, 0]), "0 is in it twice"),
    "a name twice": (
        lambda s: s["param_groups"][0].update(param_names=["a", "a"]), "'a' is in it twice",
    ),
    "too few names": (lambda s: s["param_groups"][0].update(param_names=["a"]), "no names of"),
    "names of nothing": (lambda s: s["param_groups"][0].update(param_names=None), "no names of"),
    "numbers as names": (lambda s: s["param_groups"][0].update(param_names=[1, 2]), "no names of"),
    "other numbers": (
        lambda s: s["param_groups"][0].update(params=[7, 8]), "parameter 0 has a state and is in",
    ),
    "an entry of nothing": (lambda s: s["state"].update({0: None}), "parameter 0 is a NoneType"),
    "an entry that is a tensor": (
        lambda s: s["state"].update({0: torch.ones(2)}), "parameter 0 is a Tensor",
    ),
}  # fmt: skip


@every_mode
@pytest.mark.parametrize("name", list(FORMS))
def test_other_forms_are_refused(name, mode):
    damage, message = FORMS[name]
    state = saved_state()
    damage(state)
    assert_refused(state, f"{WHOLE}.*{message}", mode)


VALUES: list[tuple[int, Any, Any, str]] = [
    (0, "momentum", None, "momentum of a is a NoneType, not a tensor"),
    (0, "momentum", 1.0, "momentum of a is a float, not a tensor"),
    (0, "momentum", torch.zeros(6, 4, dtype=torch.int64), "momentum of a is torch.int64"),
    (0, "momentum", torch.zeros(6, 4, dtype=torch.complex64), "momentum of a is torch.complex64"),
    (0, "momentum", torch.zeros(6, 4).to_sparse(), "momentum of a is .*sparse"),
    (0, "momentum", torch.zeros(6, 4, device="meta"), "momentum of a is .*on meta"),
    (0, "momentum", torch.full((6, 4), math.nan), "momentum of a is not finite: take an earlier"),
    (0, "momentum", torch.full((6, 4), math.inf), "momentum of a is not finite"),
    (0, "basis0", None, "basis0 of a is a NoneType"),
    (0, "basis0", torch.zeros(1), r"basis0 of a has shape \(1,\), which is no batch"),
    (0, "basis0", torch.full((1, 4, 3), math.nan), "basis0 of a is not finite"),
    (0, "second0", torch.zeros(2, 2), r"second0 of a has shape \(2, 2\), which is no batch"),
    (0, "skipped", None, "skipped of a must be a number"),
    (0, "skipped", "two", "skipped of a must be a number"),
    (0, "skipped", -1, "skipped of a must be a number of at least 0"),
    (0, "skipped", torch.zeros(3), "skipped of a must be a number"),
    (0, "warm", "yes", "warm of a must be a number"),
    (0, "note", "text", "note of a is a str; states are tensors and numbers"),
    (0, 3, 1.0, "state of a has a key 3, not a name"),
    (2, "step", None, "step of v must be a number"),
    (2, "step", torch.tensor(math.nan), "step of v must be a number"),
    (2, "step", torch.tensor(-3.0), "step of v must be a number of at least 0"),
    (2, "step", torch.ones(3), "step of v must be a number"),
    (2, "exp_avg_sq", torch.full((5,), -1.0), "exp_avg_sq of v is negative"),
    (2, "exp_avg_sq", torch.full((5,), math.inf), "exp_avg_sq of v is not finite"),
]


@pytest.mark.parametrize(("mode", "algorithm"), [("error", "neon"), ("keep_momentum", "muon")])
@pytest.mark.parametrize(("number", "key", "value", "message"), VALUES)
def test_damaged_values_are_refused(number, key, value, message, mode, algorithm):
    state = saved_state()
    state["state"][number][key] = value
    assert_refused(state, message, mode, algorithm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": [100]}, "splits .100. do not add up to the 6 rows"),
        ({"error_feedback": True, "rank": "full"}, "error feedback keeps"),
        ({"initial_lr": "fast"}, "initial_lr must be a number"),
        ({"initial_lr": math.nan}, "initial_lr must be a number"),
        ({"initial_momentum": [1]}, "initial_momentum must be a number"),
        ({"initial_rank": 0}, "initial_rank must be a whole number"),
        ({"heads": 5}, "cannot be cut|heads|splits"),
    ],
)
def test_impossible_options_of_a_checkpoint_are_refused(options, message):
    state = saved_state()
    state["param_groups"][0].update(options)
    assert_refused(state, f"the checkpoint's group 'neon'.*({message})", "error")


def test_a_diverged_state_is_loaded_where_nonfinite_gradients_are_propagated():
    p = parameter64(6, 4)
    optimizer = Fanion([("w", p)], nonfinite="propagate")
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    other = Fanion([("w", parameter64(6, 4))], nonfinite="propagate")
    other.load_state_dict(optimizer.state_dict())
    assert other.state[other.param_groups[0]["params"][0]]["momentum"].isnan().all()


# Schedules.


def schedule_of(mode: str) -> GroupSchedule:
    return GroupSchedule(optimizer_of(mode), [ScheduleConfig(shape="linear")] * 2, 20)


@every_mode
@pytest.mark.parametrize("given", [None, [1], 5, {}, {"last_epoch": "x"}, {"last_epoch": -5},
                                   {"last_epoch": 2.5}])  # fmt: skip
def test_what_is_no_state_of_a_schedule_is_refused(given, mode):
    with pytest.raises(ValueError, match=r"no state_dict of a schedule|last_epoch must be"):
        schedule_of(mode).load_state_dict(given)


@pytest.mark.parametrize(
    "base_lrs", [None, 0.1, [0.1], [0.1] * 3, [0.1, math.nan], [0.1, "x"], [0.1, -1.0]]
)
def test_base_lrs_that_do_not_fit_are_refused(base_lrs):
    schedule = schedule_of("error")
    before = copy.copy(vars(schedule))
    with pytest.raises(ValueError, match="base_lrs"):
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": base_lrs})
    assert vars(schedule) == before


@every_mode
def test_state_of_a_schedule_replaces_nothing_but_its_counts(mode):
    schedule = schedule_of(mode)
    odd = {"optimizer": 5, "schedules": [], "step": None, "steps_left": 1, "total_steps": 3}
    schedule.load_state_dict({**schedule.state_dict(), **odd, "last_epoch": 5})
    take_steps(schedule.optimizer, 1)
    schedule.step()
    assert schedule.last_epoch == 6 and schedule.total_steps == 20

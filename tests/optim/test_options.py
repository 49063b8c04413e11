"""Options of groups: what is refused, what wins, what takes effect later."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lit_fanions import Fanion
from tests.matrices import gaussian64, parameter, parameter64
from tests.optim.reference import Case, assert_follows_reference
from tests.optim.steps import EVERY, MATRIX, one_matrix, snapshot, take_steps, update

REFUSED = [
    ({"lr": -1.0}, "lr must be a number of at least 0"),
    ({"lr": math.nan}, "lr"),
    ({"lr": math.inf}, "lr"),
    ({"lr": "0.1"}, "lr"),
    ({"lr": True}, "lr"),
    ({"momentum": 1.0}, "momentum must be"),
    ({"momentum": -0.1}, "momentum"),
    ({"weight_decay": -1e-9}, "weight_decay"),
    ({"nesterov": 1}, "nesterov must be true or false"),
    ({"renormalize": "yes"}, "renormalize"),
    ({"error_feedback": 1}, "error_feedback"),
    ({"algorithm": "mion"}, "did you mean 'muon'"),
    ({"algorithm": "adam"}, "did you mean 'adamw'"),
    ({"rank": 0}, "rank must be a whole number"),
    ({"rank": -1}, "rank"),
    ({"rank": 1.5}, "rank"),
    ({"rank": 0.0}, "rank"),
    ({"rank": True}, "rank"),
    ({"rank": "half"}, "rank"),
    ({"alpha": math.nan}, "alpha"),
    ({"alpha": math.inf}, "alpha"),
    ({"alpha": "1"}, "alpha"),
    ({"blend": "frobenious"}, "did you mean 'frobenius'"),
    ({"sign_scale": -1.0}, "sign_scale"),
    ({"polar": "jrdan"}, "jordan"),
    ({"polar": "quintic", "polar_steps": 6}, "exactly 5 steps"),
    ({"polar": "exact", "polar_steps": 3}, "exact"),
    ({"polar_steps": 0}, "steps"),
    ({"polar_steps": 10**6}, "polar_steps must be a whole number from 1 to 100"),
    ({"solver_steps": 10**6}, "solver_steps"),
    ({"lr": 10**400}, "lr must be a number"),
    ({"seed": 2**64}, "seed"),
    ({"solver": "lancos"}, "did you mean 'lanczos'"),
    ({"scale": "orignal"}, "did you mean 'original'"),
    ({"splits": 0}, "splits"),
    ({"splits": []}, "splits"),
    ({"splits": 1.5}, "splits"),
    ({"splits": [2, -2]}, "splits"),
    ({"splits": 4}, "splits 4 does not divide the 6 rows"),
    ({"splits": [2, 2]}, "do not add up to the 6 rows"),
    ({"layout": "flat"}, "did you mean 'flatten'"),
    ({"nonfinite": "skipp"}, "did you mean 'skip'"),
    ({"momentum_dtype": "float23"}, "did you mean 'float32'"),
    ({"momentum_dtype": torch.int32}, "momentum_dtype"),
    ({"seed": 0.5}, "seed"),
    ({"algorithm": "muon", "error_feedback": True}, "error feedback"),
    ({"algorithm": "muon", "beta2": 0.5}, "set adapt"),
    ({"algorithm": "muon", "p": 4}, "p belongs to the Schatten ball"),
    ({"algorithm": "schatten", "p": 0.9}, "p must be"),
    ({"algorithm": "nsgd", "error_feedback": True, "rank": 2}, "error feedback"),
    ({"algorithm": "dion", "alpha": 0.0}, "alpha"),
]


GROUP_REFUSED = [
    *REFUSED,
    ({"nesterv": True}, "did you mean 'nesterov'"),
    ({"betas": (0.9, 0.99)}, "betas"),
    ({"name": "matrix"}, "name"),
    ({"name": 3}, "name"),
    ({"algorithm": "adamw"}, "set lr"),
    ({"algorithm": "adamw", "lr": 0.1, "rank": 2}, "rank"),
    ({"algorithm": "adamw", "lr": 0.1, "beta2": 1.0}, "beta2"),
    ({"algorithm": "adamw", "lr": 0.1, "eps": -1.0}, "eps"),
    ({"algorithm": "sgd", "lr": 0.1, "beta2": 0.9}, "beta2"),
]


@pytest.mark.parametrize(("options", "message"), GROUP_REFUSED)
def test_impossible_options_are_refused_by_name_wherever_they_are_given(options, message):
    optimizer = Fanion([{"params": [("a", parameter64(6, 4))], "name": "matrix"}])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("w", parameter64(6, 4))], **options})
    assert snapshot(optimizer) == before
    group = {"params": [("w", parameter64(6, 4))], **options}
    with pytest.raises(ValueError, match=message):
        Fanion([{"params": [("a", parameter64(6, 4))], "name": "matrix"}, group])
    if (options, message) in REFUSED:
        with pytest.raises(ValueError, match=message) as error:
            one_matrix(**options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lr", "message"),
    [(torch.ones(2), "one element"), (torch.tensor(math.nan), "lr must be a number")],
)
def test_impossible_tensors_of_lr_are_refused(lr, message):
    with pytest.raises(ValueError, match=message):
        one_matrix(lr=lr)


@pytest.mark.parametrize("options", [{"rank": 2}, {"polar": "jordan"}, {"alpha": 0.3}])
def test_options_that_the_constructors_algorithm_lacks_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Fanion([parameter64(4, 4)], algorithm="adamw", lr=1e-3, **options)


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_option_stands_in_the_group(algorithm):
    group = Fanion([("w", parameter64(8, 6))], algorithm=algorithm, lr=0.1).param_groups[0]
    want = {"lr", "momentum", "weight_decay", "nonfinite", "name", "param_names"}
    if algorithm in MATRIX:
        want |= {
            "nesterov", "rank", "alpha", "blend", "sign_scale", "polar", "polar_steps", "solver",
            "scale", "renormalize", "error_feedback", "splits", "momentum_dtype",
        }  # fmt: skip
    assert want <= group.keys()
    assert group["param_names"] == ["w"]


def test_explicit_options_win_over_the_name_but_not_over_another_groups_name():
    first, second, third = Fanion(
        [
            {"params": [parameter64(8, 8)]},
            {"params": [parameter64(8, 8)], "algorithm": "neon"},
            {"params": [parameter64(8, 8)], "algorithm": "f_muon", "alpha": 0.9},
        ],
        algorithm="fanion",
        rank=3,
        weight_decay=0.1,
    ).param_groups
    assert (first["rank"], second["rank"], third["rank"]) == (3, 1, "full")
    assert third["alpha"] == 0.9
    assert first["weight_decay"] == second["weight_decay"] == 0.1


@pytest.mark.parametrize("algorithms", [("muon", "adamw", "sgd"), ("adamw", "muon", "sgd")])
def test_weight_decay_of_the_constructor_is_that_of_every_group(algorithms):
    groups = [
        {"params": [parameter64(4, 4)], "algorithm": algorithm, "lr": 0.01}
        for algorithm in algorithms
    ]
    groups.append({**groups[1], "params": [parameter64(4, 4)], "weight_decay": 0.0})
    optimizer = Fanion(groups, algorithm=algorithms[0], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0]


def test_defaults_hold_only_what_every_group_has():
    optimizer = Fanion([parameter64(3, 3)])
    assert set(optimizer.defaults) == {"lr", "momentum", "weight_decay", "algorithm"}


def test_error_feedback_turns_nesterov_off_and_says_so_in_the_group():
    for options in ({"algorithm": "dion"}, {"algorithm": "neon", "error_feedback": True}):
        with pytest.warns(UserWarning, match="no effect of nesterov True"):
            optimizer = Fanion([parameter64(4, 4)], nesterov=True, **options)
        assert optimizer.param_groups[0]["nesterov"] is False


def count_warnings(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("alpha", [-0.5, 1.5])
def test_alpha_outside_the_unit_interval_warns_once_and_works(alpha):
    p = parameter64(6, 4)

    def train() -> None:
        optimizer = Fanion([p], algorithm="f_muon", alpha=alpha)
        for i in range(3):
            update(optimizer, p, gaussian64(6, 4, seed=i))

    (message,) = count_warnings(train)
    assert str(alpha) in message and "[0, 1]" in message
    assert_follows_reference(Case("f_muon", alpha=alpha), (6, 4))


@pytest.mark.parametrize("algorithm", ["fanion", "f_fanion", "dion"])
def test_a_rank_beyond_the_matrix_is_clamped_with_one_warning(algorithm):
    ps = [parameter64(8, 6), parameter64(12, 3), parameter64(2, 9)]

    def train() -> None:
        optimizer = Fanion(ps, algorithm=algorithm, rank=4, lr=0.02)
        for _ in range(2):
            for p in ps:
                p.grad = gaussian64(*p.shape)
            optimizer.step()

    (message,) = count_warnings(train)
    assert "rank 4" in message and "clamped" in message


def test_fractions_never_warn_and_round_to_at_least_one():
    assert not count_warnings(lambda: Fanion([parameter64(3, 90)], algorithm="fanion", rank=0.01))
    case = Case("fanion", rank=0.01)
    assert_follows_reference(case, (3, 5))


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("muon", {"lr": 0.3}),
    ("muon", {"momentum": 0.5}),
    ("muon", {"nesterov": False}),
    ("muon", {"weight_decay": 0.5}),
    ("muon", {"rank": 2}),
    ("muon", {"alpha": 0.5}),
    ("f_muon", {"blend": "sign"}),
    ("s_muon", {"sign_scale": 0.1}),
    ("muon", {"polar": "jordan"}),
    ("muon", {"polar_steps": 2}),
    ("muon", {"scale": "match_rms_adamw"}),
    ("muon", {"renormalize": True}),
    ("muon", {"splits": 2}),
    ("adamw", {"beta2": 0.5}),
    ("adamw", {"eps": 0.1}),
    ("sgd", {"nesterov": True}),
]


@pytest.mark.parametrize(("algorithm", "change"), CHANGES, ids=str)
def test_a_change_in_a_group_takes_effect_and_travels_with_checkpoints(algorithm, change):
    def start() -> tuple[nn.Parameter, Fanion]:
        p = parameter(10, 6)
        optimizer = Fanion([p], algorithm=algorithm, lr=0.1)
        take_steps(optimizer, 2)
        return p, optimizer

    (p, plain), (q, changed), (r, loaded) = start(), start(), start()
    changed.param_groups[0].update(change)
    loaded.load_state_dict(copy.deepcopy(changed.state_dict()))
    for optimizer in (plain, changed, loaded):
        take_steps(optimizer, 2, start=2)
    assert not torch.equal(p, q)
    assert torch.equal(q, r)


@pytest.mark.parametrize("options", [{"algorithm": "fanion", "rank": 5}, {"alpha": 1.5}], ids=str)
def test_warnings_about_a_group_show_the_line_that_makes_it(options):
    with pytest.warns(UserWarning, match="clamped|outside") as found:
        optimizer = Fanion([nn.Parameter(torch.ones(4, 3))], **options)
    with pytest.warns(UserWarning, match="clamped|outside") as later:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 3))], **options})
    assert {warning.filename for warning in [*found, *later]} == {__file__}

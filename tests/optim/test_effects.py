"""Options that change nothing are refused or warned of, and none that change something are."""

import warnings

import pytest
from torch import nn

from lit_fanions import Fanion, configure_optimizers
from lit_fanions.optim.schedules import GroupSchedule, ScheduleConfig
from tests.matrices import parameter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "signum", "rank": 8}, "rank 8 has no effect"),
        ({"algorithm": "schatten", "rank": 3}, "rank 3 has no effect"),
        ({"algorithm": "nsgd", "alpha": 0.5, "blend": "row", "rank": 2}, "rank 2 has no effect"),
        ({"algorithm": "muon", "p": 5.0}, "p belongs to the Schatten ball"),
        ({"algorithm": "muon", "blend": "sign"}, "set alpha too"),
        ({"algorithm": "muon", "blend": "schatten", "p": 2.0}, "set alpha too"),
        ({"algorithm": "muon", "cautious_decay": True}, "set weight_decay too"),
        ({"algorithm": "muon", "eps": 1e-3}, "set adapt too"),
    ],
)
def test_options_that_change_nothing_are_refused_wherever_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        Fanion([parameter(6, 4)], **options)
    with pytest.raises(ValueError, match=message):
        Fanion([{"params": [parameter(6, 4)], **options}, {"params": [parameter(6, 4)]}])
    with pytest.raises(ValueError, match=message):
        configure_optimizers(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), total_steps=1, **options
        )
    optimizer = Fanion([parameter(6, 4)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(6, 4)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"algorithm": "muon", "sign_scale": 0.1}, "sign_scale 0.1"),
        (
            {"algorithm": "muon", "solver": "randomized", "oversampling": 2},
            "solver 'randomized', o",
        ),
        ({"algorithm": "neon", "polar": "jordan", "polar_steps": 9}, "polar 'jordan', polar_steps"),
        ({"algorithm": "schatten", "polar_steps": 3}, "polar_steps 3"),
        ({"algorithm": "dion", "solver": "exact"}, "solver 'exact'"),
        ({"algorithm": "dion", "nesterov": True}, "nesterov True"),
    ],
)
def test_settings_that_change_nothing_are_warned_of_once(options, names):
    with pytest.warns(UserWarning, match=f"no effect of {names}") as caught:
        Fanion([{"params": [parameter(6, 4)], **options}])
    assert len(caught) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "fanion", "rank": 2, "solver": "exact"},
        {"algorithm": "fanion", "rank": 4, "polar": "jordan"},  # the whole matrix
        {"algorithm": "fanion", "rank": "full", "solver": "exact"},
        {"algorithm": "kyfan", "polar": "jordan", "solver": "subspace"},
        {"algorithm": "schatten", "p": 4.0, "polar": "exact"},
        {"algorithm": "signum", "sign_scale": 0.1},
        {"algorithm": "signum", "alpha": 0.5, "blend": "fanion", "rank": 2, "oversampling": 2},
        {"algorithm": "muon", "alpha": 1.0, "blend": "sign", "sign_scale": 0.1},
        {"algorithm": "s_muon", "alpha": 1.0},
        {"algorithm": "f_muon", "blend": "schatten", "p": 4.0},
        {"algorithm": "muon", "cautious_decay": True, "weight_decay": 0.0},
        {"algorithm": "muon", "adapt": "none", "beta2": 0.9},
        {"algorithm": "dion", "nesterov": False},
    ],
)
def test_options_with_an_effect_and_those_switched_off_on_purpose_are_taken(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fanion([parameter(6, 4)], **options)


def test_options_of_the_constructor_may_be_meant_for_one_group():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fanion(
            [
                {"params": [parameter(6, 4)]},
                {"params": [parameter(6, 4)], "algorithm": "schatten"},
                {"params": [parameter(6, 4)], "algorithm": "neon"},
            ],
            p=4.0,
            polar="jordan",
            solver="exact",
        )


def test_groups_of_a_recipe_share_options():
    config = {
        "matrix": {"algorithm": "f_muon", "polar": "jordan", "cautious_decay": True,
                   "weight_decay": 0.1},
        "overrides": {"mine": {"parameters": ["0.weight"], "algorithm": "neon"}},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        configure_optimizers(net, config, total_steps=1)


def test_a_schedule_makes_use_of_a_blend_and_a_solver():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    ends = {"alpha_end": 0.5, "rank_end": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_optimizers(net, blend="sign", solver="exact", schedule=ends, total_steps=4)


def test_an_end_of_rank_is_warned_of_where_no_direction_has_one():
    optimizer = Fanion([parameter(6, 4)], algorithm="signum")
    with pytest.warns(UserWarning, match="the schedule of rank has no effect"):
        GroupSchedule(optimizer, [ScheduleConfig(rank_end=0.5)], 8)
    assert optimizer.param_groups[0]["rank"] == "full"


def test_checkpoints_of_values_without_an_effect_load():
    optimizer = Fanion([parameter(6, 4)], algorithm="signum")
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"rank": 8, "cautious_decay": True}
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rank"] == 8

"""Schedules of alpha and rank."""

import copy
import math

import pytest
import torch
from torch import nn

from lit_fanions import Fanion, ScheduleConfig
from lit_fanions.optim.schedules import GroupSchedule, alpha_at, rank_at
from tests.matrices import gaussian, parameter


def test_alpha_and_rank_change_linearly_over_the_transition():
    schedule = ScheduleConfig(alpha_end=0.5, rank_end=2, transition_start=0.25, transition=4)
    assert schedule.needs_total
    alphas = [alpha_at(schedule, 1.1, step, 8) for step in range(8)]
    assert alphas == pytest.approx([1.1, 1.1, 1.1, 0.95, 0.8, 0.65, 0.5, 0.5])
    assert [rank_at(schedule, 6, step, 8) for step in range(8)] == [6, 6, 6, 5, 4, 3, 2, 2]
    assert type(rank_at(schedule, 6, 4, 8)) is int
    falling = ScheduleConfig(rank_end=0.25, transition=2)
    assert ScheduleConfig(rank_end=0.25).needs_total and not falling.needs_total
    assert [rank_at(falling, "full", step, 0) for step in range(4)] == ["full", 0.625, 0.25, 0.25]
    at_once = ScheduleConfig(alpha_end=0.5, transition=0, transition_start=2)
    assert [alpha_at(at_once, 1.0, step, 0) for step in range(4)] == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"algorithm": "muon", "alpha": 1.1}, {"alpha_end": 0.5}),
        ({"algorithm": "fanion", "rank": 6}, {"rank_end": 1}),
        ({"algorithm": "f_muon"}, {"rank_end": 0.25, "alpha_end": 1.0}),
        ({"algorithm": "dion", "rank": 1.0}, {"rank_end": 0.25}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is outside")
def test_runs_with_a_transition_resume_bit_equal(options, ends):
    def start() -> tuple[nn.Parameter, Fanion, GroupSchedule]:
        p = parameter(12, 8)
        optimizer = Fanion([{"params": [p], "lr": 0.1, **options}])
        schedule = ScheduleConfig(transition=6, **ends)
        return p, optimizer, GroupSchedule(optimizer, [schedule], 8)

    def train(p: nn.Parameter, optimizer: Fanion, scheduler: GroupSchedule, steps: range) -> None:
        for seed in steps:
            p.grad = gaussian(12, 8, seed=seed)
            optimizer.step()
            scheduler.step()

    straight, resumed = start(), start()
    train(*straight, range(4))
    with torch.no_grad():
        resumed[0].copy_(straight[0])
    for mine, other in zip(resumed[1:], straight[1:], strict=True):
        mine.load_state_dict(copy.deepcopy(other.state_dict()))
    for run in (straight, resumed):
        train(*run, range(4, 8))
    assert torch.equal(straight[0], resumed[0])
    group = straight[1].param_groups[0]
    for name, end in ends.items():
        assert group[name.removesuffix("_end")] == end
    assert group == {**resumed[1].param_groups[0], "params": group["params"]}


@pytest.mark.parametrize(
    ("options", "ends", "message"),
    [
        ({"algorithm": "fanion", "rank": 6}, {"rank_end": 0.5}, "must both be whole numbers"),
        ({"algorithm": "muon"}, {"rank_end": 3}, "must both be whole numbers"),
        ({"algorithm": "neon", "error_feedback": True}, {"alpha_end": 0.0}, "error feedback"),
    ],
)
def test_ends_that_a_group_cannot_reach_are_refused(options, ends, message):
    optimizer = Fanion([parameter(6, 4)], **options)
    with pytest.raises(ValueError, match=message):
        GroupSchedule(optimizer, [ScheduleConfig(**ends)], 8)


@pytest.mark.parametrize(
    "ends",
    [{"alpha_end": math.nan}, {"rank_end": 0}, {"rank_end": "full"}, {"transition": 1.5}],
)
def test_impossible_transitions_are_refused(ends):
    with pytest.raises(ValueError, match=next(iter(ends))):
        ScheduleConfig(**ends)


def test_a_transition_leaves_groups_of_adamw_alone():
    optimizer = Fanion([parameter(6, 4)], algorithm="adamw", lr=1e-3)
    with pytest.warns(UserWarning, match="the schedule of (alpha|rank) has no effect"):
        GroupSchedule(optimizer, [ScheduleConfig(alpha_end=0.5, rank_end=0.5)], 8)
    assert {"alpha", "initial_alpha", "rank", "initial_rank"}.isdisjoint(optimizer.param_groups[0])

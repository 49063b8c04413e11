"""Schedules against slow closed forms, and as schedulers of torch's kind."""

import copy
import io
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_fanions import Fanion, ScheduleConfig, configure_optimizers
from lit_fanions.optim.schedules import GroupSchedule, lr_multiplier, momentum_at

TOTAL = 40


def whole_steps(span: int | float, total: int) -> int:
    return round(span * total) if isinstance(span, float) else span


def slow_multiplier(s: ScheduleConfig, step: int, total: int) -> float:
    """Straight lines between corner points, exactly."""
    if s.freeze_after is not None and step >= whole_steps(s.freeze_after, total):
        return 0.0
    warmup = whole_steps(s.warmup, total)
    end = total if s.steps is None else whole_steps(s.steps, total)
    if step < warmup:
        share = Fraction(step, warmup)
        return float(Fraction(s.warmup_start) * (1 - share) + share)
    if s.shape == "constant":
        return 1.0
    begin = max(end - whole_steps(s.cooldown, end), warmup)
    if step >= end:
        return s.floor
    if step <= begin:
        return 1.0
    left = Fraction(end - step, end - begin)  # 1 at the beginning of the fall, 0 at its end
    if s.shape == "cosine":
        left = Fraction((1 + math.cos(math.pi * (1 - float(left)))) / 2)
    return s.floor + (1 - s.floor) * float(left)


spans = st.one_of(st.integers(0, 60), st.floats(0, 1).map(lambda x: round(x, 2)))
schedule_configs = st.builds(
    ScheduleConfig,
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=spans,
    warmup_start=st.sampled_from([0.0, 0.1, 1.0]),
    cooldown=spans,
    floor=st.sampled_from([0.0, 0.15, 1.0]),
    steps=st.one_of(st.none(), spans),
    freeze_after=st.one_of(st.none(), spans),
    momentum_warmup=spans,
    momentum_start=st.sampled_from([0.0, 0.85]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(schedule_configs, st.integers(1, 50), st.lists(st.integers(0, 60), max_size=5))
def test_every_schedule_equals_the_slow_one(schedule, total, steps):
    for step in (0, 1, total - 1, total, *steps):
        want = slow_multiplier(schedule, step, total)
        assert lr_multiplier(schedule, step, total) == pytest.approx(want, abs=1e-12)
        assert 0 <= momentum_at(schedule, 0.95, step, total) <= 0.95


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"shape": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"shape": "linear", "floor": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"shape": "linear", "cooldown": 0.5}, [1, 1, 1, 0.5, 0]),
        ({"shape": "linear", "cooldown": 20}, [1, 1, 1, 0.5, 0]),
        ({"shape": "linear", "cooldown": 0}, [1, 1, 1, 1, 0]),
        ({"shape": "cosine"}, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0]),
        ({"warmup": 20}, [0, 0.5, 1, 1, 1]),
        ({"warmup": 0.5, "warmup_start": 0.5}, [0.5, 0.75, 1, 1, 1]),
        ({"shape": "linear", "warmup": 20}, [0, 0.5, 1, 0.5, 0]),
        ({"shape": "linear", "steps": 20}, [1, 0.5, 0, 0, 0]),
        ({"shape": "linear", "steps": 0.5, "floor": 0.1}, [1, 0.55, 0.1, 0.1, 0.1]),
        ({"freeze_after": 20}, [1, 1, 0, 0, 0]),
        ({"freeze_after": 0.25, "warmup": 20}, [0, 0, 0, 0, 0]),
    ],
)
def test_multipliers_at_every_quarter_of_the_run(config, want):
    schedule = ScheduleConfig(**config)
    got = [lr_multiplier(schedule, step, TOTAL) for step in range(0, 41, 10)]
    assert got == pytest.approx(want)


def test_momentum_warms_up_linearly():
    schedule = ScheduleConfig(momentum_warmup=10, momentum_start=0.85)
    got = [momentum_at(schedule, 0.95, step, TOTAL) for step in (0, 5, 10, 99)]
    assert got == pytest.approx([0.85, 0.9, 0.95, 0.95])
    half = ScheduleConfig(momentum_warmup=0.5, momentum_start=0.0)
    assert momentum_at(half, 0.8, 10, TOTAL) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({}, False),
        ({"warmup": 10, "freeze_after": 20, "momentum_warmup": 5}, False),
        ({"warmup": 0.1}, True),
        ({"freeze_after": 0.5}, True),
        ({"momentum_warmup": 0.5}, True),
        ({"shape": "linear"}, True),
        ({"shape": "cosine", "steps": 100}, False),
        ({"shape": "linear", "steps": 0.5}, True),
        ({"shape": "linear", "steps": 100, "cooldown": 0.4}, False),
    ],
)
def test_needs_total_is_true_only_where_the_total_matters(config, needs):
    schedule = ScheduleConfig(**config)
    assert schedule.needs_total is needs
    if not needs:
        values = {tuple(lr_multiplier(schedule, i, total) for i in range(50)) for total in (0, 77)}
        assert len(values) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shape": "linaer"}, "shape 'linaer' is none of constant, linear, cosine; did you mean"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.5}, "warmup"),
        ({"warmup": True}, "warmup"),
        ({"warmup": math.nan}, "warmup"),
        ({"cooldown": "half"}, "cooldown"),
        ({"steps": -3}, "steps"),
        ({"freeze_after": 2.0}, "freeze_after"),
        ({"momentum_warmup": -0.1}, "momentum_warmup"),
        ({"floor": math.nan}, "floor must be"),
        ({"floor": 1.1}, r"floor must be in \[0, 1\]"),
        ({"warmup_start": -0.1}, "warmup_start"),
        ({"momentum_start": 2}, "momentum_start"),
    ],
)
def test_values_out_of_range_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**config)


# GroupSchedule.

SCHEDULES = [
    ScheduleConfig(shape="linear", cooldown=0.5, momentum_warmup=4, momentum_start=0.5),
    ScheduleConfig(warmup=4, freeze_after=8),
]


def scheduled() -> tuple[Fanion, GroupSchedule]:
    torch.manual_seed(0)
    groups = [
        {"params": [nn.Parameter(torch.randn(4, 3))], "name": "matrix", "lr": 0.1},
        {"params": [nn.Parameter(torch.randn(4))], "algorithm": "adamw", "lr": 0.01},
    ]
    optimizer = Fanion(groups)
    return optimizer, GroupSchedule(optimizer, SCHEDULES, 10)


def advance(optimizer: Fanion, schedule: GroupSchedule, steps: int) -> list[tuple[float, ...]]:
    values = []
    for _ in range(steps):
        groups = optimizer.param_groups
        values.append(tuple(group[key] for group in groups for key in ("lr", "momentum")))
        for group in groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
    return values


def test_every_group_follows_its_own_schedule():
    optimizer, schedule = scheduled()
    for step, (lr, momentum, other_lr, other_momentum) in enumerate(
        advance(optimizer, schedule, 12)
    ):
        assert lr == pytest.approx(0.1 * slow_multiplier(SCHEDULES[0], step, 10))
        assert other_lr == pytest.approx(0.01 * slow_multiplier(SCHEDULES[1], step, 10))
        assert momentum == pytest.approx(0.5 + 0.45 * min(1, step / 4))
        assert other_momentum == 0.9
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(("algorithm", "want"), [("sgd", 0.5), ("signum", 0.5), ("adamw", 0.9)])
def test_momentum_warmup_leaves_beta1_of_adamw_alone(algorithm, want):
    p = nn.Parameter(torch.ones(4))
    optimizer = Fanion([p], lr=0.01, momentum=0.9, algorithm=algorithm)
    schedule = ScheduleConfig(momentum_warmup=4, momentum_start=0.5)
    advanced = advance(optimizer, GroupSchedule(optimizer, [schedule], 10), 5)
    momenta = [momentum for _, momentum in advanced]
    assert momenta[0] == want and momenta[-1] == 0.9


def test_momentum_without_a_warmup_is_left_to_others():
    optimizer, schedule = scheduled()
    for group in optimizer.param_groups:
        group["momentum"] = 0.6
    _, warmed, _, other = advance(optimizer, schedule, 6)[-1]
    assert (warmed, other) == (0.95, 0.6)


def test_optimizers_without_momentum_are_scheduled():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(4))], lr=0.1)
    schedule = GroupSchedule(optimizer, [ScheduleConfig(warmup=4, momentum_warmup=2)], 10)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_frozen_group_does_not_move():
    optimizer, schedule = scheduled()
    advance(optimizer, schedule, 8)
    frozen, moving = (group["params"][0] for group in optimizer.param_groups[::-1])
    before, other = frozen.detach().clone(), moving.detach().clone()
    advance(optimizer, schedule, 1)
    assert torch.equal(frozen, before) and not torch.equal(moving, other)


def test_resume_is_bit_equal():
    straight = advance(*scheduled(), 10)
    optimizer, schedule = scheduled()
    advance(optimizer, schedule, 3)
    buffer = io.BytesIO()
    torch.save([schedule.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    saved, saved_optimizer = torch.load(buffer, weights_only=True)
    assert saved.keys() >= {"last_epoch", "base_lrs"}
    assert not {"optimizer", "schedules"} & saved.keys()

    resumed, again = scheduled()
    resumed.load_state_dict(saved_optimizer)
    again.load_state_dict(saved)
    assert advance(resumed, again, 7) == straight[3:]


def test_schedule_made_in_the_middle_of_a_run_continues():
    straight = advance(*scheduled(), 10)
    optimizer, schedule = scheduled()
    advance(optimizer, schedule, 3)
    again = GroupSchedule(optimizer, SCHEDULES, 10, last_epoch=schedule.last_epoch - 1)
    for got, want in zip(advance(optimizer, again, 7), straight[3:], strict=True):
        assert got == pytest.approx(want)


def test_longer_total_stretches_the_schedule_of_a_checkpoint():
    optimizer, schedule = scheduled()
    advance(optimizer, schedule, 3)
    longer = GroupSchedule(scheduled()[0], SCHEDULES, 100)
    longer.load_state_dict(schedule.state_dict())
    assert (longer.last_epoch, longer.total_steps) == (3, 100)


def test_copies_are_independent():
    optimizer, schedule = scheduled()
    twin, twin_schedule = copy.deepcopy((optimizer, schedule))
    advance(optimizer, schedule, 5)
    assert twin_schedule.last_epoch == 0 and twin.param_groups[0]["lr"] == 0.1
    assert twin_schedule.optimizer is twin


def test_number_of_schedules_must_be_that_of_the_groups():
    with pytest.raises(ValueError, match="1 schedules for 2 parameter groups"):
        GroupSchedule(scheduled()[0], SCHEDULES[:1], 10)


def test_factory_gives_overridden_groups_their_own_schedule():
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    config = {
        "schedule": {"shape": "linear"},
        "overrides": {"embedding": {"schedule": {"freeze_after": 0.5}}},
    }
    made = configure_optimizers(module, config, total_steps=10)
    scheduler = made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    for _ in range(5):
        made["optimizer"].step()
        scheduler.step()
    factors = {g["name"]: g["lr"] / g["initial_lr"] for g in made["optimizer"].param_groups}
    assert factors.pop("embedding") == 0
    assert factors == pytest.approx(dict.fromkeys(factors, 0.5))


# Groups that are added after the schedule was made.


def late_group(optimizer: Fanion, **options) -> dict:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer.add_param_group({"params": [p], "name": "late", "lr": 0.4, **options})
    return optimizer.param_groups[-1]


@pytest.mark.parametrize(
    ("options", "like"),
    [
        ({"algorithm": "muon"}, 0),
        ({"algorithm": "adamw"}, 1),
        ({"algorithm": "neon"}, 0),
        ({"algorithm": "neon", "name": "group1.late"}, 1),
    ],
)
def test_late_group_follows_the_schedule_of_the_group_it_resembles(options, like):
    optimizer, schedule = scheduled()
    optimizer.param_groups[1]["name"] = "group1"
    advance(optimizer, schedule, 2)
    group = late_group(optimizer, **options)
    base = 0.4 / slow_multiplier(SCHEDULES[like], 2, 10)
    for step in range(2, 10):
        assert group["lr"] == pytest.approx(base * slow_multiplier(SCHEDULES[like], step, 10))
        advance(optimizer, schedule, 1)
    assert schedule.get_last_lr() == [g["lr"] for g in optimizer.param_groups]


def test_late_group_added_at_an_lr_of_zero_keeps_its_own_lr():
    optimizer = Fanion([nn.Parameter(torch.randn(4, 3))], lr=0.1)
    schedule = GroupSchedule(optimizer, [ScheduleConfig(warmup=2)], 10)
    group = late_group(optimizer)
    advance(optimizer, schedule, 2)
    assert group["lr"] == 0.4


def test_lr_set_by_a_callback_in_a_late_group_is_scaled_from_there():
    optimizer, schedule = scheduled()
    group = late_group(optimizer, algorithm="muon")
    advance(optimizer, schedule, 6)
    group["lr"] = 0.2
    advance(optimizer, schedule, 1)
    ratio = slow_multiplier(SCHEDULES[0], 7, 10) / slow_multiplier(SCHEDULES[0], 6, 10)
    assert group["lr"] == pytest.approx(0.2 * ratio)


def test_resume_with_a_late_group_is_bit_equal():
    optimizer, schedule = scheduled()
    advance(optimizer, schedule, 3)
    late_group(optimizer, algorithm="muon")
    advance(optimizer, schedule, 3)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    resumed, again = scheduled()
    late_group(resumed, algorithm="muon")
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert advance(resumed, again, 4) == advance(optimizer, schedule, 4)


# A function that is asked for the steps left.


def test_function_is_asked_after_every_step_and_not_before_the_first():
    left = iter([9, 8, 3, 2, 1, 0])
    optimizer = Fanion([nn.Parameter(torch.randn(4, 3))], lr=1.0)
    schedule = GroupSchedule(optimizer, [ScheduleConfig(shape="linear")], lambda: next(left))
    assert schedule.total_steps is None
    got = [lr for lr, _ in advance(optimizer, schedule, 6)]
    assert got == pytest.approx([1, 9 / 10, 8 / 10, 3 / 6, 2 / 6, 1 / 6])
    assert schedule.total_steps == 6 and next(left, None) is None
    assert "steps_left" not in schedule.state_dict()

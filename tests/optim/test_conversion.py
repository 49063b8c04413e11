"""States of another configuration are loaded on purpose, with the momenta in the new units."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_fanions import Fanion, FanionConfig, configure_optimizers
from lit_fanions.optim.algorithms import ALGORITHMS
from lit_fanions.optim.conversion import AVERAGES
from lit_fanions.optim.schedules import GroupSchedule, ScheduleConfig
from tests.matrices import gaussian64, parameter64
from tests.optim.steps import assert_same_state, take_steps, through_a_file

pytestmark = pytest.mark.filterwarnings("ignore:.*keep_momentum:UserWarning")

MU, BETA1, BETA2 = 0.95, 0.9, 0.999
STEPS = 6


def one(name: str = "w", **options: Any) -> tuple[Tensor, Fanion]:
    """Return a matrix and its optimizer, which keeps momenta."""
    p = parameter64(6, 4)
    return p, Fanion([(name, p)], on_mismatch="keep_momentum", **{"lr": 0.02, **options})


def saved_by(steps: int = STEPS, **options: Any) -> dict[str, Any]:
    _, optimizer = one(**options)
    take_steps(optimizer, steps)
    return through_a_file(optimizer.state_dict())


def loaded(state: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], Fanion]:
    """Return the state of a matrix after loading, and the optimizer."""
    p, optimizer = one(**options)
    optimizer.load_state_dict(state)
    return optimizer.state[p], optimizer


def gradients(steps: int = STEPS) -> list[Tensor]:
    """Return the gradients of ``take_steps`` on one matrix."""
    return [gaussian64(6, 4, seed=1000 * i) for i in range(steps)]


def average(decay: float, steps: int = STEPS) -> Tensor:
    """Return the running mean (1 - decay) * sum of decay^age * G."""
    weights = [(1 - decay) * decay ** (steps - 1 - i) for i in range(steps)]
    return sum((w * g for w, g in zip(weights, gradients(steps), strict=True)), torch.zeros(()))


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_muon_to_fanion_keeps_the_momentum_and_finds_a_basis():
    state, optimizer = loaded(saved_by(algorithm="muon"), algorithm="fanion", rank=2)
    assert_close(state["momentum"], average(MU))
    take_steps(optimizer, 1, start=STEPS)
    assert state["basis0"].shape[1] == 4 and state["warm"]


def test_muon_to_adamw_is_as_if_adamw_had_seen_the_mean_ten_times():
    state, optimizer = loaded(saved_by(algorithm="muon"), algorithm="adamw", lr=0.1)
    mean = average(MU)
    p, reference = one(algorithm="adamw", lr=0.1)
    for _ in range(10):
        p.grad = mean.clone()
        reference.step()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert_close(state[key], reference.state[p][key])
    weight = optimizer.param_groups[0]["params"][0]
    before = weight.detach().clone()
    weight.grad = gaussian64(6, 4, seed=77)
    optimizer.step()
    assert (weight - before).abs().max() <= 0.102


def test_muon_to_adamw_and_back_is_the_momentum_again():
    first = saved_by(algorithm="muon")
    _, adamw = loaded(first, algorithm="adamw", lr=0.1)
    state, _ = loaded(through_a_file(adamw.state_dict()), algorithm="muon")
    assert_close(state["momentum"], first["state"][0]["momentum"])


def test_adamw_to_muon_is_the_mean_with_its_bias_corrected():
    state, _ = loaded(saved_by(algorithm="adamw"), algorithm="muon")
    assert_close(state["momentum"], average(BETA1) / (1 - BETA1**STEPS))
    assert state.keys() == {"momentum", "skipped"}


def test_sgd_to_muon_is_the_sum_in_the_unit_of_a_mean():
    state, _ = loaded(saved_by(algorithm="sgd"), algorithm="muon")
    assert_close(state["momentum"], average(BETA1))


def test_muon_to_sgd_is_the_mean_in_the_unit_of_a_sum():
    schedule = {"momentum": 0.8}
    state, _ = loaded(saved_by(algorithm="muon"), algorithm="sgd", **schedule)
    assert_close(state["momentum"], average(MU) / (1 - 0.8))


def test_nsgd_to_f_muon_with_error_feedback_is_what_a_constant_gradient_leaves():
    options = {"algorithm": "f_fanion", "rank": 2, "error_feedback": True, "momentum": 0.9}
    state, _ = loaded(saved_by(algorithm="nsgd"), **options)
    assert_close(state["momentum"], average(MU) * 0.9 / 0.1)
    # The unit is that of the formula: a gradient that is captured whole is a fixed point.
    p, optimizer = one(**{**options, "algorithm": "dion", "rank": 4, "scale": "none"})
    gradient = gaussian64(6, 4)
    optimizer.state[p]["momentum"] = gradient * 0.9 / 0.1
    p.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], gradient * 9, rtol=1e-4, atol=1e-4)


def test_error_feedback_to_muon_is_a_mean():
    saved = saved_by(algorithm="dion", rank=2)
    state, _ = loaded(saved, algorithm="muon")
    assert_close(state["momentum"], saved["state"][0]["momentum"] * (1 - MU) / MU)


@pytest.mark.parametrize(
    ("algorithm", "options", "other"),
    [
        ("fanion", {"rank": 2}, {"rank": 3}),
        ("neon", {}, {"alpha": 0.5}),
        ("muon", {"adapt": "rows"}, {"adapt": "entries"}),
        ("muon", {"adapt": "rows"}, {"layout": "transposed"}),
        ("muon", {"adapt": "leading", "adapt_rank": 2}, {"adapt_rank": 3}),
        ("adamw", {}, {"beta2": 0.9}),
    ],
)
def test_other_options_of_one_algorithm_are_kept_and_step(algorithm, options, other):
    saved = saved_by(algorithm=algorithm, **options)
    state, optimizer = loaded(saved, algorithm=algorithm, **{**options, **other})
    before = {key: saved["state"][0][key] for key in saved["state"][0]}
    kept = {key for key in state if torch.equal(state[key], before[key])}
    expected = {
        "rank": {"momentum", "basis0", "warm", "skipped"},
        "alpha": {"momentum", "basis0", "warm", "skipped"},
        "adapt": {"momentum", "skipped"},
        "layout": {"momentum", "skipped"},
        "adapt_rank": {"momentum", "second0", "skipped"},
        "beta2": {"exp_avg", "step", "skipped"},
    }
    name = next(iter(other))
    assert kept == expected[name]
    assert optimizer.param_groups[0][name] == other[name]
    take_steps(optimizer, 2, start=STEPS)
    assert all(p.isfinite().all() for p in optimizer.param_groups[0]["params"])


def test_second_moment_of_adamw_keeps_its_unit_when_beta2_changes():
    saved = saved_by(algorithm="adamw")
    state, _ = loaded(saved, algorithm="adamw", beta2=0.9)
    unit = (1 - 0.9**STEPS) / (1 - BETA2**STEPS)
    assert_close(state["exp_avg_sq"], saved["state"][0]["exp_avg_sq"] * unit)


def test_muon_to_cosmos_does_not_correct_a_bias_that_the_momentum_has_not():
    # A constant gradient: the mean, and what Adam makes of it, are those after many steps.
    gradient, updates = gaussian64(6, 4), []
    for steps in (0, 300):
        p, muon = one(algorithm="muon" if steps else "cosmos", adapt_rank=None)
        for _ in range(steps):
            p.grad = gradient.clone()
            muon.step()
        p, optimizer = one(algorithm="cosmos", adapt_rank=2)
        if steps:
            optimizer.load_state_dict(muon.state_dict())
        before = p.detach().clone()
        p.grad = gradient.clone()
        optimizer.step()
        updates.append(p.detach() - before)
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-4, atol=1e-6)


def test_options_of_the_new_run_stay_and_are_reported():
    saved = saved_by(algorithm="muon", lr=0.3, weight_decay=0.2)
    p, optimizer = one(algorithm="f_muon", lr=0.1, alpha=0.7, momentum=0.9)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.warns(UserWarning, match=r"1 of 1 parameters keep their momentum \(muon to f_muon"):
        optimizer.load_state_dict(saved)
    after = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert after == before and optimizer.param_groups[0]["params"] == [p]


def test_lr_without_a_schedule_and_seed_are_the_checkpoints():
    saved = saved_by(algorithm="fanion", lr=0.3, seed=1)
    _, optimizer = loaded(saved, algorithm="fanion", lr=0.1, seed=2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["seed"], optimizer.keeps_options) == (0.3, 1, False)


@pytest.mark.parametrize("algorithm", ["neon", "adamw"])
def test_schedulers_of_torch_go_on_from_the_decayed_share_of_the_new_lr(algorithm):
    optimizers = [one(algorithm=a, lr=lr)[1] for a, lr in (("muon", 0.02), (algorithm, 0.1))]
    old, new = (torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in optimizers)
    for _ in range(15):
        optimizers[0].step()
        old.step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    new.load_state_dict(old.state_dict())
    for _ in range(3):
        lrs = [o.param_groups[0]["lr"] for o in optimizers]
        assert lrs[1] == pytest.approx(5 * lrs[0])
        for optimizer, schedule in zip(optimizers, (old, new), strict=True):
            optimizer.step()
            schedule.step()


def test_decays_of_groups_that_are_not_here_are_warned_of():
    saved = saved_by(algorithm="muon")
    group = saved["param_groups"][0]
    other = {**group, "params": [1], "param_names": ["v"], "name": "v", "lr": 0.01}
    saved["param_groups"] = [{**group, "initial_lr": 0.02}, {**other, "initial_lr": 0.02}]
    with pytest.warns(UserWarning, match="its groups by 1, 0.5"):
        loaded(saved, algorithm="neon")


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_same_configuration_is_loaded_as_without_the_option(algorithm):
    saved = saved_by(algorithm=algorithm)
    results = []
    for mode in ("error", "keep_momentum"):
        p = parameter64(6, 4)
        optimizer = Fanion([("w", p)], algorithm=algorithm, lr=0.02, on_mismatch=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(saved)
        take_steps(optimizer, 2, start=STEPS)
        results.append((p, optimizer))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


@pytest.mark.parametrize("source", list(ALGORITHMS))
@pytest.mark.parametrize("target", ["muon", "fanion", "dion", "cosmos", "adamw", "sgd"])
def test_every_algorithm_steps_on_from_every_other(source, target):
    _, optimizer = loaded(saved_by(2, algorithm=source), algorithm=target)
    take_steps(optimizer, 2, start=2)
    p = optimizer.param_groups[0]["params"][0]
    assert all(x.isfinite().all() for x in [p, *optimizer.state[p].values()])
    again = through_a_file(optimizer.state_dict())
    _, plain = one(algorithm=target)
    plain.load_state_dict(again)
    assert not plain.keeps_options


def groups(*parts: tuple[str, str, Sequence[str]]) -> Fanion:
    """Return an optimizer of groups (name, algorithm, names of parameters)."""
    shapes = {"a": (6, 4), "b": (4, 4), "c": (5, 3), "v": (7,), "late": (3, 3)}
    return Fanion(
        [{"name": name, "algorithm": algorithm, "lr": 0.01,
          "params": [(x, parameter64(*shapes[x])) for x in names]}
         for name, algorithm, names in parts],
        on_mismatch="keep_momentum",
    )  # fmt: skip


def momenta(optimizer: Fanion) -> dict[str, Tensor]:
    return {
        name: optimizer.state[p][AVERAGES[ALGORITHMS[group["algorithm"]].kind].key]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if p in optimizer.state
    }


def test_parameters_in_other_groups_are_found_by_their_names():
    saved = groups(("matrix", "muon", ["a", "b", "c"]), ("vector", "adamw", ["v"]))
    take_steps(saved, STEPS)
    other = groups(("all", "sgd", ["v", "b"]), ("first", "neon", ["c"]), ("rest", "nsgd", ["a"]))
    other.load_state_dict(through_a_file(saved.state_dict()))
    before, after = momenta(saved), momenta(other)
    assert_close(after["a"], before["a"])
    assert_close(after["b"], before["b"] / (1 - BETA1))
    assert_close(after["c"], before["c"])
    assert_close(after["v"], before["v"] / (1 - BETA1**STEPS) / (1 - BETA1))
    assert [group["name"] for group in other.param_groups] == ["all", "first", "rest"]


def test_missing_parameters_start_anew_and_others_are_dropped_with_a_warning_each():
    saved = groups(("matrix", "muon", ["a", "b"]))
    take_steps(saved, 2)
    other = groups(("matrix", "muon", ["a", "c", "late"]))
    with pytest.warns(UserWarning) as caught:
        other.load_state_dict(saved.state_dict())
    messages = [str(w.message) for w in caught]
    assert len(messages) == 3
    assert "1 of 3 parameters keep their momentum (muon to muon: 1), 2 start anew" in messages[0]
    assert "lacks parameters, which start anew: c, late" in messages[1]
    assert messages[2].endswith("lacks: b")
    assert set(momenta(other)) == {"a"}
    take_steps(other, 1)
    assert set(momenta(other)) == {"a", "c", "late"}


def test_long_lists_of_names_are_cut():
    def many(names: Sequence[str]) -> Fanion:
        pairs = [(name, parameter64(2, 2)) for name in names]
        return Fanion(pairs, on_mismatch="keep_momentum")

    saved = many(["a"])
    take_steps(saved, 1)
    with pytest.warns(UserWarning, match=r"p0, .*p19 and 5 more"):
        many(["a", *(f"p{i}" for i in range(25))]).load_state_dict(saved.state_dict())


def test_parameters_without_names_are_refused_on_either_side():
    nameless = Fanion([parameter64(6, 4)], on_mismatch="keep_momentum", algorithm="neon")
    with pytest.raises(ValueError, match=r"this optimizer does not have: give it .name, parameter"):
        nameless.load_state_dict(saved_by(algorithm="muon"))
    take_steps(nameless, 1)
    _, named = one(algorithm="muon")
    with pytest.raises(ValueError, match="checkpoint does not have: put them into each"):
        named.load_state_dict(nameless.state_dict())
    state = nameless.state_dict()
    state["param_groups"][0]["param_names"] = ["w"]
    named.load_state_dict(state)
    assert len(named.state) == 1


def test_names_in_place_of_numbers_are_taken():
    saved = saved_by(algorithm="muon")
    saved["state"] = {"w": saved["state"][0]}
    saved["param_groups"][0]["params"] = ["w"]
    state, _ = loaded(saved, algorithm="nsgd")
    assert_close(state["momentum"], average(MU))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match=r"the name of one here \(w there, v here\)"):
        one("v", algorithm="neon")[1].load_state_dict(saved_by())
    _, optimizer = one(algorithm="neon")
    state = saved_by()
    state["state"][0]["momentum"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"momentum of w has shape \(3, 4\), the parameter \(6, 4"):
        optimizer.load_state_dict(state)
    assert not optimizer.state


def test_refusal_says_how_to_keep_the_momentum():
    p = parameter64(6, 4)
    with pytest.raises(ValueError, match="on_mismatch: keep_momentum"):
        Fanion([("w", p)], algorithm="neon").load_state_dict(saved_by(algorithm="muon"))


# torch's own optimizers.

TORCH = {
    "AdamW": ({"lr": 0.01}, average(0.9) / (1 - 0.9**STEPS)),
    "Adam": ({"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True}, average(0.8) / (1 - 0.8**STEPS)),
    "NAdam": ({"lr": 0.01}, average(0.9) / (1 - 0.9**STEPS)),
    "SGD": ({"lr": 0.01, "momentum": 0.9, "nesterov": True}, average(0.9)),
    "Muon": ({"lr": 0.01}, average(0.95)),
}


def by_torch(name: str, options: dict[str, Any]) -> dict[str, Any]:
    p = parameter64(6, 4)
    optimizer = getattr(torch.optim, name)([("w", p)], **options)
    for gradient in gradients():
        p.grad = gradient
        optimizer.step()
    return through_a_file(optimizer.state_dict())


@pytest.mark.parametrize("name", list(TORCH))
def test_states_of_torch_are_means_of_gradients(name):
    options, mean = TORCH[name]
    state, optimizer = loaded(by_torch(name, options), algorithm="muon")
    assert_close(state["momentum"], mean)
    take_steps(optimizer, 1, start=STEPS)


def test_adamw_of_torch_is_adamw_here_to_the_bit():
    saved = by_torch("AdamW", {"lr": 0.01, "weight_decay": 0.0})
    state, _ = loaded(saved, algorithm="adamw", lr=0.01)
    for key, value in saved["state"][0].items():
        assert torch.equal(state[key], value)


def test_dampening_of_torchs_sgd_is_part_of_its_unit():
    saved = by_torch("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.5})
    state, _ = loaded(saved, algorithm="muon")
    assert_close(state["momentum"], saved["state"][0]["momentum_buffer"] * 0.1 / 0.5)


def test_sgd_of_torch_without_momentum_has_none_to_keep():
    p, optimizer = one(algorithm="muon")
    with pytest.warns(UserWarning, match="0 of 1 parameters keep .* 1 start anew"):
        optimizer.load_state_dict(by_torch("SGD", {"lr": 0.01}))
    assert p not in optimizer.state


@pytest.mark.parametrize(
    ("name", "message"),
    [("RMSprop", "is of no known optimizer"), ("Adamax", "is of no known optimizer"),
     ("Adagrad", "is of no known optimizer")],
)  # fmt: skip
def test_other_optimizers_of_torch_are_refused(name, message):
    _, optimizer = one(algorithm="muon")
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(by_torch(name, {"lr": 0.01}))


# Dtypes, copies, options.


def test_momentum_gets_the_dtype_of_the_new_run():
    p = nn.Parameter(parameter64(6, 4).detach().bfloat16())
    first = Fanion([("w", p)], momentum_dtype="float32")
    take_steps(first, 2)
    for options, dtype in (
        ({"algorithm": "adamw", "lr": 0.1}, torch.bfloat16),
        ({"algorithm": "neon"}, torch.bfloat16),
        ({"algorithm": "neon", "momentum_dtype": "float64"}, torch.float64),
    ):
        second = Fanion([("w", p)], on_mismatch="keep_momentum", **options)
        second.load_state_dict(first.state_dict())
        key = "exp_avg" if options["algorithm"] == "adamw" else "momentum"
        assert second.state[p][key].dtype == dtype
        take_steps(second, 1)


def test_huge_momentum_leaves_the_second_moment_finite():
    saved = saved_by(algorithm="muon")
    saved["state"][0]["momentum"] = torch.full((6, 4), 1e200, dtype=torch.float64)
    state, _ = loaded(saved, algorithm="adamw")
    assert state["exp_avg_sq"].isfinite().all()


def test_loading_leaves_the_given_state_alone():
    saved = saved_by(algorithm="muon")
    before = copy.deepcopy(saved)
    _, optimizer = loaded(saved, algorithm="nsgd")
    take_steps(optimizer, 2)
    assert str(saved) == str(before)


@pytest.mark.parametrize("value", ["keep", None, True, 3, ["error"]])
def test_unknown_ways_are_refused_where_given(value):
    with pytest.raises(ValueError, match=r"on_mismatch .* is none of error, keep_momentum"):
        Fanion([parameter64(6, 4)], on_mismatch=value)
    with pytest.raises(ValueError, match="on_mismatch"):
        FanionConfig(on_mismatch=value)
    with pytest.raises(ValueError, match="on_mismatch"):
        FanionConfig.from_dict({"on_mismatch": value})
    with pytest.raises(ValueError, match="on_mismatch"):
        configure_optimizers(nn.Linear(3, 2), on_mismatch=value)


def test_it_is_an_option_of_the_optimizer_and_of_no_group():
    with pytest.raises(ValueError, match=r"matrix\.on_mismatch is no option"):
        FanionConfig.from_dict({"matrix": {"on_mismatch": "keep_momentum"}})
    _, optimizer = one()
    assert "on_mismatch" not in optimizer.param_groups[0]
    assert copy.deepcopy(optimizer).on_mismatch == "keep_momentum"
    made = configure_optimizers(nn.Linear(3, 2), on_mismatch="keep_momentum")
    assert made["optimizer"].on_mismatch == "keep_momentum"


# Schedules.


def scheduled(
    algorithm: str, lr: float, count: int = 1, on_mismatch: str = "keep_momentum", **schedule: Any
) -> tuple[Fanion, GroupSchedule]:
    params = [(f"w{i}", parameter64(6, 4)) for i in range(2)]
    parts = [params] if count == 1 else [[pair] for pair in params]
    optimizer = Fanion(
        [{"params": part, "algorithm": algorithm, "lr": lr} for part in parts],
        on_mismatch=on_mismatch,
    )  # fmt: skip
    schedules = [ScheduleConfig(**{"shape": "linear", **schedule})] * count
    return optimizer, GroupSchedule(optimizer, schedules, 20)


def advance(optimizer: Fanion, schedule: GroupSchedule, steps: int) -> list[float]:
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        take_steps(optimizer, 1)
        schedule.step()
    return lrs


@pytest.mark.parametrize("schedule_first", [False, True])
def test_lr_is_that_of_the_new_schedule_at_the_old_step(schedule_first):
    old = scheduled("muon", 1.0)
    advance(*old, 5)
    optimizer, schedule = scheduled("adamw", 0.1, count=2, warmup=10)
    targets = [(optimizer, old[0]), (schedule, old[1])]
    for target, source in reversed(targets) if schedule_first else targets:
        target.load_state_dict(through_a_file(source.state_dict()))
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05)
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.05])
    assert advance(optimizer, schedule, 6) == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.09, 0.1])


def test_schedule_of_the_same_configuration_goes_on_as_without_the_option():
    straight = scheduled("muon", 1.0, warmup=3, momentum_warmup=8)
    advance(*straight, 5)
    saved = [part.state_dict() for part in straight]
    lrs = []
    for mode in ("error", "keep_momentum"):
        resumed = scheduled("muon", 1.0, on_mismatch=mode, warmup=3, momentum_warmup=8)
        for part, state in zip(resumed, saved, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        assert resumed[0].param_groups[0]["momentum"] == straight[0].param_groups[0]["momentum"]
        lrs.append(advance(*resumed, 4))
    assert lrs[0] == lrs[1]


def test_tensor_lr_of_the_new_schedule_is_changed_in_place():
    optimizer, schedule = scheduled("muon", 1.0)
    advance(optimizer, schedule, 5)
    p = parameter64(6, 4)
    other = Fanion([("w0", p)], algorithm="nsgd", lr=torch.tensor(0.5), on_mismatch="keep_momentum")
    its = GroupSchedule(other, [ScheduleConfig(shape="linear")], 20)
    other.load_state_dict(optimizer.state_dict())
    its.load_state_dict(schedule.state_dict())
    lr = other.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) and lr.item() == pytest.approx(0.5 * 15 / 20)


def test_schedule_of_another_class_gives_its_count_with_a_warning():
    p = parameter64(6, 4)
    torchs = torch.optim.AdamW([("w0", p)], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torchs, 20)
    for _ in range(5):
        p.grad = gaussian64(6, 4)
        torchs.step()
        cosine.step()
    optimizer, schedule = scheduled("muon", 1.0)
    optimizer.load_state_dict(torchs.state_dict())
    with pytest.warns(UserWarning, match="another class: its last_epoch, 5, is taken"):
        schedule.load_state_dict(cosine.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="last_epoch must be a whole number"):
        schedule.load_state_dict({})


def test_sum_of_sgd_has_the_unit_of_the_momentum_after_its_warmup():
    saved, _ = scheduled("muon", 1.0)
    take_steps(saved, 3)
    optimizer, _ = scheduled("sgd", 0.1, momentum_warmup=10)
    assert optimizer.param_groups[0]["momentum"] == 0.85
    optimizer.load_state_dict(saved.state_dict())
    assert_close(momenta(optimizer)["w0"], momenta(saved)["w0"] / (1 - 0.9))


def test_momenta_of_another_lr_alone_are_not_rescaled_while_momentum_warms_up():
    saved = saved_by(algorithm="sgd", lr=0.1, momentum=0.9)
    group = saved["param_groups"][0]
    group |= {"initial_momentum": 0.9, "momentum": 0.85, "initial_lr": 0.1}
    before = saved["state"][0]["momentum"].clone()
    state, _ = loaded(saved, algorithm="sgd", lr=0.2, momentum=0.9)
    assert torch.equal(state["momentum"], before)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "muon", "mu": 0.95, "lr": 0.1}, "is of no known optimizer"),
        ({"betas": (0.9, 0.99), "bias_correction": False, "lr": 0.1}, "is of no known optimizer"),
        ({"betas": None, "amsgrad": False}, "betas must be two numbers, got None"),
        ({"betas": (0.9,), "amsgrad": False}, "betas must be two numbers"),
        ({"dampening": "x", "momentum": 0.9}, "dampening must be a number"),
    ],
    ids=str,
)
def test_groups_of_other_packages_and_odd_ones_are_refused(group, message):
    saved = {
        "state": {0: {"momentum": torch.ones(6, 4)}},
        "param_groups": [{**group, "params": [0], "param_names": ["w"]}],
    }
    with pytest.raises(ValueError, match=message):
        loaded(saved, algorithm="neon")


def test_momenta_are_stored_as_the_parameter_that_takes_them():
    p = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    q = torch.nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    old, new = (Fanion([("w", x)], algorithm="muon") for x in (p, q))
    p.grad = torch.randn_like(p)
    old.step()
    new.load_state_dict(old.state_dict())
    momentum = new.state[q]["momentum"]
    assert momentum.stride() == q.stride() != p.stride()
    assert torch.equal(momentum, old.state[p]["momentum"])

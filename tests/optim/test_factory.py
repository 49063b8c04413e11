"""From a configuration to an optimizer: groups, overrides, merged keywords, schedules."""

import dataclasses
from typing import Any

import pytest
import torch

from lit_fanions import (
    Fanion,
    FanionConfig,
    GroupOptions,
    Override,
    ScheduleConfig,
    configure_optimizers,
    split_parameters,
)
from lit_fanions.optim.options import default_options
from tests.optim.networks import small_network
from tests.optim.steps import EVERY


def groups(config: Any = None, **overrides: Any) -> dict[str, dict[str, Any]]:
    optimizer = configure_optimizers(small_network(), config, total_steps=10, **overrides)[
        "optimizer"
    ]
    assert isinstance(optimizer, Fanion)
    return {group["name"]: group for group in optimizer.param_groups}


def test_one_line_makes_optimizer_and_schedule():
    made = configure_optimizers(small_network(), algorithm="f_muon", lr=0.03)
    assert made.keys() == {"optimizer", "lr_scheduler"}
    assert made["lr_scheduler"]["interval"] == "step" and made["lr_scheduler"]["name"] is None
    by_name = {group["name"]: group for group in made["optimizer"].param_groups}
    assert by_name.keys() == {"matrix", "matrix.splits3", "embedding", "head", "vector"}
    for name, group in by_name.items():
        is_matrix = name.startswith("matrix")
        assert group["algorithm"] == ("f_muon" if is_matrix else "adamw")
        assert group["lr"] == (0.03 if is_matrix else 1e-3)
    assert by_name["matrix.splits3"]["splits"] == 3
    assert by_name["matrix"]["alpha"] == 0.5


def test_parameters_keep_their_names():
    module = small_network()
    for group in configure_optimizers(module)["optimizer"].param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert module.get_parameter(name) is p


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_algorithm_steps_every_group(algorithm):
    module = small_network()
    optimizer = configure_optimizers(
        module, {"matrix": {"algorithm": algorithm, "lr": 0.01}}, total_steps=2
    )["optimizer"]
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_matrix_algorithm_can_have_everything(algorithm):
    """`other` may be of any algorithm that takes vectors, `matrix` of any."""
    other = algorithm if algorithm in ("nsgd", "signum", "coordinate", "sgd") else "adamw"
    made = groups({"matrix": {"algorithm": algorithm, "lr": 1.0}, "other": {"algorithm": other}})
    assert made["matrix"]["algorithm"] == algorithm and made["vector"]["algorithm"] == other


def test_every_option_reaches_its_groups():
    matrix = {
        "lr": 0.1, "momentum": 0.8, "nesterov": False, "weight_decay": 0.2, "rank": 2,
        "alpha": 0.7, "blend": "sign", "sign_scale": 0.4, "polar": "jordan", "polar_steps": 3,
        "solver": "exact", "scale": "none", "renormalize": True, "nonfinite": "error",
        "momentum_dtype": "float32", "algorithm": "f_fanion",
    }  # fmt: skip
    other = {"lr": 0.01, "momentum": 0.8, "beta2": 0.9, "eps": 1e-5, "weight_decay": 0.3}
    made = groups({"matrix": matrix, "other": other})
    for name in ("matrix", "matrix.splits3"):
        assert matrix.items() <= made[name].items()
    for name in ("embedding", "head", "vector"):
        assert other.items() <= made[name].items()


def test_every_option_of_an_algorithm_can_be_configured():
    fields = {f.name for f in dataclasses.fields(GroupOptions)}
    for algorithm in EVERY:
        assert set(default_options(algorithm)) <= fields


def test_the_defaults_equal_those_in_the_help():
    made = groups()
    assert (made["matrix"]["lr"], made["head"]["lr"]) == (0.02, 1e-3)
    assert "Default: .02 for" in GroupOptions.__doc__ and "1e-3" in GroupOptions.__doc__


def test_overrides_change_one_group_only():
    made = groups(
        {
            "matrix": {"lr": 0.1, "weight_decay": 0.3},
            "other": {"lr": 0.01, "weight_decay": 0.2},
            "overrides": {
                "embedding": {"lr": 0.5},
                "head": {"weight_decay": 0.0, "beta2": 0.9},
                "vector": {"algorithm": "sgd", "lr": 0.7},
            },
        }
    )
    assert (made["embedding"]["lr"], made["embedding"]["weight_decay"]) == (0.5, 0.2)
    assert (made["head"]["lr"], made["head"]["weight_decay"], made["head"]["beta2"]) == (
        0.01, 0.0, 0.9
    )  # fmt: skip
    assert (made["vector"]["algorithm"], made["vector"]["lr"]) == ("sgd", 0.7)
    assert made["vector"]["weight_decay"] == 0.2
    assert made["matrix"]["lr"] == 0.1


def test_a_group_of_matrices_starts_from_matrix():
    config = {
        "matrix": {"algorithm": "f_muon", "lr": 0.1, "weight_decay": 0.3, "polar": "jordan"},
        "overrides": {"mine": {"parameters": ["body.weight"], "alpha": 0.9}},
    }
    mine = groups(config)["mine"]
    assert (mine["algorithm"], mine["alpha"], mine["lr"]) == ("f_muon", 0.9, 0.1)
    assert (mine["weight_decay"], mine["polar"]) == (0.3, "jordan")


def test_how_a_step_is_made_holds_for_other_parameters_unless_they_say_otherwise():
    runtime = {"nonfinite": "propagate", "capturable": True, "share_work": False}
    made = groups({"matrix": {**runtime, "weight_decay": 0.3}, "other": {"capturable": False}})
    vector = made["vector"]
    assert (vector["nonfinite"], vector["capturable"]) == ("propagate", False)
    assert "share_work" not in vector and vector["weight_decay"] == 0
    made = groups({"matrix": runtime, "other": {"algorithm": "signum"}})
    assert runtime.items() <= made["vector"].items()


def test_another_algorithm_does_not_inherit_what_a_name_stands_for():
    config = {
        "matrix": {"algorithm": "f_fanion", "lr": 0.1, "rank": 2, "alpha": 0.9, "polar": "jordan"},
        "overrides": {"mine": {"parameters": ["body.weight"], "algorithm": "neon"}},
    }
    mine = groups(config)["mine"]
    assert (mine["rank"], mine["alpha"], mine["polar"], mine["lr"]) == (1, 1.0, "jordan", 0.1)


def test_a_matrix_given_to_adamw_starts_from_other_and_says_so():
    config = {
        "other": {"lr": 0.004, "weight_decay": 0.1},
        "overrides": {"mine": {"parameters": ["body.weight"], "algorithm": "adamw"}},
    }
    with pytest.warns(UserWarning, match=r"'mine' \(adamw\) has no lr of its own.*0.004"):
        mine = groups(config)["mine"]
    assert (mine["lr"], mine["weight_decay"]) == (0.004, 0.1)


def test_a_matrix_put_among_the_others_inherits_loudly():
    config = {"overrides": {"head": {"parameters": ["body.weight"]}}}
    with pytest.warns(UserWarning, match=r"'head' \(adamw\) has no lr of its own"):
        assert groups(config)["head"]["lr"] == 1e-3


def test_an_embedding_given_to_muon_starts_from_matrix_and_says_so():
    config = {
        "matrix": {"lr": 0.07},
        "overrides": {"embedding": {"algorithm": "muon"}},
    }
    with pytest.warns(UserWarning, match=r"'embedding' \(muon\).*0.07"):
        assert groups(config)["embedding"]["lr"] == 0.07


def test_a_tag_without_an_override_is_a_group_too():
    module = small_network()
    module["body"].weight.fanion_group = "mine"
    names = {g["name"] for g in configure_optimizers(module)["optimizer"].param_groups}
    assert "mine" in names


def test_plain_configurations_do_not_warn(recwarn):
    groups()
    groups(algorithm="neon", lr=0.1)
    groups({"overrides": {"embedding": {"lr": 0.1}, "mine": {"parameters": ["conv.weight"]}}})
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_an_lr_made_for_muon_is_not_given_to_adamw_silently(algorithm, recwarn):
    """0.02 for AdamW diverges: without an lr, say so or take that of the others."""
    lr = groups(algorithm=algorithm)["matrix"]["lr"]
    assert lr == 1e-3 or any("lr" in str(w.message) for w in recwarn)


def test_keywords_change_the_matrices_of_a_configuration():
    config = FanionConfig(matrix=GroupOptions(algorithm="f_muon", lr=0.1, alpha=0.3))
    made = groups(config, lr=0.2)
    assert (made["matrix"]["lr"], made["matrix"]["alpha"]) == (0.2, 0.3)
    assert config.matrix.lr == 0.1  # unchanged


def test_whole_parts_can_be_keywords():
    made = groups(
        {"other": {"lr": 0.5, "weight_decay": 0.1}},
        other={"lr": 0.6},
        overrides={"head": Override(lr=0.7)},
        schedule=ScheduleConfig(warmup=2, warmup_start=0.5),
    )
    assert (made["vector"]["initial_lr"], made["vector"]["weight_decay"]) == (0.6, 0.1)
    assert made["head"]["initial_lr"] == 0.7
    assert made["head"]["lr"] == 0.35


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"algoritm": "muon"}, "algoritm is no option.*did you mean 'algorithm'"),
        ({"betas": (0.9, 0.99)}, "betas is no option"),
        ({"lr": -1.0}, "lr must be a number"),
        ({"algorithm": "mion"}, "did you mean 'muon'"),
        ({"schedule": {"wormup": 3}}, "schedule.wormup.*did you mean 'warmup'"),
        ({"overrides": {"haed": {"lr": 1.0}}}, "overrides.haed: no parameter is in that group"),
        ({"overrides": {"head": {"lrr": 1.0}}}, "overrides.head.lrr.*did you mean 'lr'"),
        ({"other": {"rank": 2}}, "rank"),
    ],
)
def test_mistakes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        configure_optimizers(small_network(), **overrides)


def test_a_schedule_that_ends_needs_to_know_when():
    config = {"schedule": {"shape": "linear"}}
    with pytest.raises(ValueError, match="total_steps"):
        configure_optimizers(small_network(), config)
    scheduler = configure_optimizers(small_network(), config, total_steps=4)["lr_scheduler"][
        "scheduler"
    ]
    assert scheduler.total_steps == 4
    configure_optimizers(small_network())  # constant: no question


def test_a_groups_own_schedule_needs_total_steps():
    config = {"overrides": {"head": {"schedule": {"shape": "cosine"}}}}
    with pytest.raises(ValueError, match="total_steps"):
        configure_optimizers(small_network(), config)


def test_the_split_takes_the_same_configuration_in_every_form():
    config = FanionConfig.from_dict({"matrix": {"algorithm": "neon", "lr": 0.4}})
    first, second = (
        split_parameters(small_network(), config),
        split_parameters(small_network(), config.to_dict()),
    )
    assert str(first) == str(second) and "0.4" in str(first)

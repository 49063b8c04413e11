"""From a configuration to an optimizer: Python, mappings, YAML and dotted options."""

import dataclasses
import pickle
import re
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

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

EVERY = [
    "muon", "neon", "fanion", "kyfan", "nsgd", "signum", "coordinate", "f_muon", "f_neon",
    "f_fanion", "s_muon", "s_neon", "s_fanion", "dion", "adamw", "sgd",
]  # fmt: skip


def net() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 8),
            "conv": nn.Conv2d(4, 8, 3),
            "body": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 3),
        }
    )


def groups(config: Any = None, **overrides: Any) -> dict[str, dict[str, Any]]:
    optimizer = configure_optimizers(net(), config, total_steps=10, **overrides)["optimizer"]
    assert isinstance(optimizer, Fanion)
    return {group["name"]: group for group in optimizer.param_groups}


# What is made.


def test_one_line_is_enough():
    made = configure_optimizers(net(), algorithm="f_muon", lr=0.03)
    assert made.keys() == {"optimizer", "lr_scheduler"}
    assert made["lr_scheduler"]["interval"] == "step" and made["lr_scheduler"]["name"] == "lr"
    by_name = {group["name"]: group for group in made["optimizer"].param_groups}
    assert by_name.keys() == {"matrix", "matrix.splits3", "embedding", "head", "vector"}
    for name, group in by_name.items():
        is_matrix = name.startswith("matrix")
        assert group["algorithm"] == ("f_muon" if is_matrix else "adamw")
        assert group["lr"] == (0.03 if is_matrix else 1e-3)
    assert by_name["matrix.splits3"]["splits"] == 3
    assert by_name["matrix"]["alpha"] == 0.5


def test_parameters_keep_their_names():
    module = net()
    for group in configure_optimizers(module)["optimizer"].param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert module.get_parameter(name) is p


@pytest.mark.parametrize("algorithm", EVERY)
def test_every_algorithm_steps_every_group(algorithm):
    module = net()
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


def test_the_defaults_are_those_that_the_help_tells():
    made = groups()
    assert (made["matrix"]["lr"], made["head"]["lr"]) == (0.02, 1e-3)
    assert "Default: .02 for" in GroupOptions.__doc__ and "1e-3" in GroupOptions.__doc__


# Per-group overrides.


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
    module = net()
    module["body"].weight.fanion_group = "mine"
    names = {g["name"] for g in configure_optimizers(module)["optimizer"].param_groups}
    assert "mine" in names


def test_nothing_warns_by_itself(recwarn):
    groups()
    groups(algorithm="neon", lr=0.1)
    groups({"overrides": {"embedding": {"lr": 0.1}, "mine": {"parameters": ["conv.weight"]}}})
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_an_lr_made_for_muon_is_not_given_to_adamw_silently(algorithm, recwarn):
    """0.02 for AdamW diverges: without an lr, say so or take that of the others."""
    lr = groups(algorithm=algorithm)["matrix"]["lr"]
    assert lr == 1e-3 or any("lr" in str(w.message) for w in recwarn)


# Merging keywords.


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
        configure_optimizers(net(), **overrides)


# Total steps.


def test_a_schedule_that_ends_needs_to_know_when():
    config = {"schedule": {"shape": "linear"}}
    with pytest.raises(ValueError, match="total_steps"):
        configure_optimizers(net(), config)
    scheduler = configure_optimizers(net(), config, total_steps=4)["lr_scheduler"]["scheduler"]
    assert scheduler.total_steps == 4
    configure_optimizers(net())  # constant: no question


def test_a_groups_own_schedule_is_asked_too():
    config = {"overrides": {"head": {"schedule": {"shape": "cosine"}}}}
    with pytest.raises(ValueError, match="total_steps"):
        configure_optimizers(net(), config)


# Mappings.

FULL = {
    "matrix": {"algorithm": "s_fanion", "lr": 0.02, "rank": 0.5, "splits": [3, 5]},
    "other": {"algorithm": "adamw", "lr": 0.001, "beta2": 0.95},
    "overrides": {
        "mine": {"parameters": ["a.*", "b"], "modules": ["Conv2d"], "lr": 0.5,
                 "schedule": {"freeze_after": 3}},
        "head": {"lr": 0.1},
    },
    "schedule": {"shape": "linear", "warmup": 0.1, "cooldown": 0.45, "floor": 0.0},
}  # fmt: skip


def test_there_and_back():
    config = FanionConfig.from_dict(FULL)
    assert FanionConfig.from_dict(config.to_dict()) == config
    assert config.overrides["mine"] == Override(
        parameters=["a.*", "b"], modules=["Conv2d"], lr=0.5,
        schedule=ScheduleConfig(freeze_after=3),
    )  # fmt: skip
    assert config.matrix.rank == 0.5 and config.schedule.warmup == 0.1
    assert FanionConfig.from_dict(config) is config
    assert FanionConfig.from_dict(None) == FanionConfig.from_dict({}) == FanionConfig()


def test_the_dict_is_plain_for_checkpoints_and_yaml(tmp_path):
    plain = FanionConfig.from_dict(FULL).to_dict()
    assert FanionConfig.from_dict(yaml.safe_load(yaml.safe_dump(plain))).to_dict() == plain
    torch.save(plain, tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True) == plain


def test_numbers_keep_their_type_on_the_way():
    """1 is one step or rank 1, 1.0 the whole run or full rank."""
    for value in (1, 1.0):
        config = FanionConfig.from_dict({"matrix": {"rank": value}, "schedule": {"warmup": value}})
        again = FanionConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict())))
        assert type(again.matrix.rank) is type(again.schedule.warmup) is type(value)


def test_a_configuration_is_frozen_and_can_be_pickled():
    config = FanionConfig.from_dict(FULL)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.matrix = GroupOptions()


@pytest.mark.parametrize("empty", [{"overrides": None}, {"matrix": None}, {"schedule": None}])
def test_an_empty_section_is_no_section(empty):
    """What YAML makes of a key whose lines are all commented out."""
    made = configure_optimizers(net(), FanionConfig.from_dict(empty))
    assert made["optimizer"].param_groups[0]["lr"] > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"matrx": {}}, "matrx is no option.*did you mean 'matrix'"),
        ({"matrix": {"learning_rate": 1.0}}, "matrix.learning_rate is no option"),
        ({"matrix": {"polr": "exact"}}, "matrix.polr is no option.*did you mean 'polar'"),
        ({"overrides": {"head": {"schedule": {"flor": 0.1}}}},
         "overrides.head.schedule.flor.*did you mean 'floor'"),
        ({"matrix": "muon"}, "matrix must be a mapping, got 'muon'"),
        ({"overrides": {"head": 0.1}}, "overrides.head must be a mapping, got 0.1"),
        ({"overrides": [1]}, "overrides must be a mapping"),
        ("muon", "the configuration must be a mapping"),
        ({"schedule": {"shape": "linaer"}}, "shape must be"),
    ],
)  # fmt: skip
def test_unknown_keys_and_wrong_kinds_are_refused_by_path(config, message):
    with pytest.raises(ValueError, match=message):
        FanionConfig.from_dict(config)


# The command line.


class Model:
    """Takes its optimizer as the zoo's modules do."""

    def __init__(self, optimizer: FanionConfig = FanionConfig()) -> None:
        """Make it.

        Args:
            optimizer: How to train.
        """
        self.optimizer = optimizer


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Model, "model")
    return parser


def parse(*args: str) -> FanionConfig:
    made = parser()
    return made.instantiate_classes(made.parse_args([*args])).model.optimizer


def test_yaml_is_parsed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"optimizer": FULL}}))
    assert parse("--config", str(path)) == FanionConfig.from_dict(FULL)


def test_the_configuration_alone_can_be_an_argument():
    alone = ArgumentParser(exit_on_error=False)
    alone.add_argument("--optimizer", type=FanionConfig, default=FanionConfig())
    parsed = alone.instantiate_classes(alone.parse_args(["--optimizer.matrix.algorithm", "neon"]))
    assert parsed.optimizer == FanionConfig(matrix=GroupOptions(algorithm="neon"))


def test_dotted_options_are_parsed():
    config = parse(
        "--model.optimizer.matrix.algorithm=f_fanion", "--model.optimizer.matrix.rank=3",
        "--model.optimizer.matrix.splits=[1,2]", "--model.optimizer.other.lr=0.1",
        "--model.optimizer.schedule.shape=cosine", "--model.optimizer.schedule.warmup=0.2",
    )  # fmt: skip
    assert config == FanionConfig(
        matrix=GroupOptions(algorithm="f_fanion", rank=3, splits=[1, 2]),
        other=GroupOptions(lr=0.1),
        schedule=ScheduleConfig(shape="cosine", warmup=0.2),
    )


@pytest.mark.parametrize(
    "option", ['{"head": {"lr": 0.5}}', "{head: {lr: 0.5}}"], ids=["json", "yaml"]
)
def test_overrides_are_parsed(option):
    config = parse("--model.optimizer.overrides", option)
    assert config.overrides == {"head": Override(lr=0.5)}


def test_one_override_is_parsed_by_its_dotted_name():
    config = parse("--model.optimizer.overrides.head", "{lr: 0.5}")
    assert config.overrides == {"head": Override(lr=0.5)}


def test_options_come_after_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"optimizer": FULL}}))
    config = parse("--config", str(path), "--model.optimizer.matrix.lr", "0.7")
    assert config.matrix.lr == 0.7 and config.matrix.rank == 0.5
    assert config.overrides.keys() == {"mine", "head"}


def test_a_file_of_its_own(tmp_path):
    path = tmp_path / "neon.yaml"
    path.write_text("matrix: {algorithm: neon, lr: 0.3}")
    config = parse("--model.optimizer", str(path))
    assert config.matrix == GroupOptions(algorithm="neon", lr=0.3)


@pytest.mark.parametrize(
    ("text", "want"), [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("full", "full"), ("2", 2)]
)
def test_ranks_and_lengths_keep_their_type(text, want):
    rank = parse("--model.optimizer.matrix.rank", text).matrix.rank
    assert rank == want and type(rank) is type(want)
    if text != "full" and want <= 1:
        warmup = parse("--model.optimizer.schedule.warmup", text).schedule.warmup
        assert warmup == want and type(warmup) is type(want)


def test_what_is_printed_is_what_was_parsed(tmp_path):
    made = parser()
    config = made.parse_args(
        ["--model.optimizer.matrix.rank=1.0", "--model.optimizer.schedule.warmup=1",
         "--model.optimizer.overrides={head: {lr: 1e-3}}"]
    )  # fmt: skip
    path = tmp_path / "saved.yaml"
    path.write_text(made.dump(config))
    again = parse("--config", str(path))
    assert again == made.instantiate_classes(config).model.optimizer
    assert type(again.matrix.rank) is float and type(again.schedule.warmup) is int


@pytest.mark.parametrize(
    "args",
    [
        ["--model.optimizer.matrix.lr=fast"],
        ["--model.optimizer.matrix.algorithm=mion"],
        ["--model.optimizer.matrix.rank=half"],
        ["--model.optimizer.matrix.nesterov=2"],
        ["--model.optimizer.matrix.momentum_dtype=float7"],
        ["--model.optimizer.matrx.lr=1"],
        ["--model.optimizer.schedule.shape=linaer"],
        ["--model.optimizer.schedule.warmup=1.5"],
        ["--model.optimizer.overrides={head: {lrr: 1}}"],
        ["--model.optimizer.overrides={head: 1}"],
    ],
)
def test_mistakes_are_refused_when_parsing(args):
    with pytest.raises(Exception, match=r"(?s).+") as error:
        parse(*args)
    assert type(error.value).__name__ in ("ArgumentError", "ArgumentTypeError", "ValueError")


def helped(capsys, *args: str) -> str:
    with pytest.raises(SystemExit):
        parser().parse_args([*args])
    return " ".join(capsys.readouterr().out.split())


def test_the_help_shows_every_option_with_its_text(capsys):
    text = helped(capsys, "--help")
    for field in dataclasses.fields(GroupOptions):
        for part in ("matrix", "other"):
            assert f"--model.optimizer.{part}.{field.name} " in text
    words = (
        "The norm ball",
        "Weight of the direction in a blend",
        "Decay of the second moment",
        "Length over which lr rises",
        "Exceptions by group name",
    )
    for word in words:
        assert word in text


def test_every_option_has_a_text():
    for cls in (GroupOptions, ScheduleConfig, FanionConfig):
        own = [f.name for f in dataclasses.fields(cls)]
        assert [name for name in own if not re.search(rf"\n +{name}: \S", cls.__doc__)] == []


def test_the_options_of_an_override_have_their_texts_too(capsys):
    """They are inherited; jsonargparse reads a class's own docstring and its bases'."""
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Override, "override")
    with pytest.raises(SystemExit):
        made.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Patterns of parameter names", "The norm ball", "Rank of the direction: a whole"):
        assert words in text


def test_the_split_takes_the_same_configuration_in_every_form():
    config = FanionConfig.from_dict({"matrix": {"algorithm": "neon", "lr": 0.4}})
    first, second = split_parameters(net(), config), split_parameters(net(), config.to_dict())
    assert str(first) == str(second) and "0.4" in str(first)


def test_a_saved_configuration_can_be_loaded_safely(tmp_path):
    """A module's save_hyperparameters() puts the configuration itself into its checkpoints."""
    config = FanionConfig(
        overrides={"head": Override(lr=0.1, schedule=ScheduleConfig(shape="linear"))}
    )
    torch.save({"optimizer": config}, tmp_path / "c.ckpt")
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["optimizer"] == config

"""Configurations as dictionaries, YAML, checkpoints and options of a command line."""

import dataclasses
import pickle
import re

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lit_fanions import FanionConfig, GroupOptions, Override, ScheduleConfig, configure_optimizers
from tests.optim.networks import small_network

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


def test_dictionaries_restore_the_configuration():
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


def test_yaml_keeps_the_type_of_numbers():
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
def test_empty_sections_take_the_defaults(empty):
    """YAML reads a key whose lines are all commented out as None."""
    made = configure_optimizers(small_network(), FanionConfig.from_dict(empty))
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
        ({"matrix": {"lr": float("nan")}}, "matrix.lr must be a number"),
        ({"overrides": {"head": {"rank": -3}}}, "overrides.head.rank must be"),
        ({"schedule": {"shape": "linaer"}}, "shape 'linaer' is none of.*did you mean 'linear'"),
    ],
)  # fmt: skip
def test_unknown_keys_and_wrong_kinds_are_refused_by_path(config, message):
    with pytest.raises(ValueError, match=message):
        FanionConfig.from_dict(config)


def test_a_saved_configuration_can_be_loaded_safely(tmp_path):
    """A module's save_hyperparameters() puts the configuration itself into its checkpoints."""
    config = FanionConfig(
        overrides={"head": Override(lr=0.1, schedule=ScheduleConfig(shape="linear"))}
    )
    torch.save({"optimizer": config}, tmp_path / "c.ckpt")
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["optimizer"] == config


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


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"optimizer": FULL}}))
    config = parse("--config", str(path), "--model.optimizer.matrix.lr", "0.7")
    assert config.matrix.lr == 0.7 and config.matrix.rank == 0.5
    assert config.overrides.keys() == {"mine", "head"}


def test_the_optimizer_can_have_a_file_of_its_own(tmp_path):
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


def test_dumped_options_parse_to_the_same_configuration(tmp_path):
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


def test_every_option_is_documented():
    for cls in (GroupOptions, ScheduleConfig, FanionConfig):
        own = [f.name for f in dataclasses.fields(cls)]
        assert [name for name in own if not re.search(rf"\n +{name}: \S", cls.__doc__)] == []


def test_help_describes_the_options_of_an_override(capsys):
    """They are inherited; jsonargparse reads a class's own docstring and its bases'."""
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Override, "override")
    with pytest.raises(SystemExit):
        made.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Patterns of parameter names", "The norm ball", "Rank of the direction: a whole"):
        assert words in text


@pytest.mark.parametrize("value", ["blocks.*", True, 5, [1], b"x", {"a": 1}, None, torch.ones(2)])
@pytest.mark.parametrize("name", ["parameters", "modules"])
def test_selectors_that_are_no_lists_of_names_are_refused(name, value):
    # The letters of a pattern would be patterns of their own, and * one for everything.
    with pytest.raises(ValueError, match=rf"overrides\.x\.{name} must be a list of names"):
        FanionConfig.from_dict({"overrides": {"x": {name: value}}})


@pytest.mark.parametrize(
    "options",
    [{"schedule": {"warmup": 10**400}}, {"schedule": {"steps": 10**16}},
     {"matrix": {"stack_entries": 10**30}}, {"matrix": {"p": torch.ones(2)}},
     {"matrix": {"p": [3]}}],
)  # fmt: skip
def test_numbers_beyond_every_use_and_tensors_are_refused(options):
    with pytest.raises(ValueError, match=r"warmup|steps|stack_entries|p must be"):
        FanionConfig.from_dict(options)

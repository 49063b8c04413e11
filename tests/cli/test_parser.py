"""How recipes and options are read: empty sections, overrides, callbacks by name."""

from pathlib import Path

import pytest
import yaml

from lit_fanions.cli.app import main
from lit_fanions.cli.parser import load_without_empty_sections
from tests.cli.recipes import FIT, edit_recipe

EMPTY_SECTIONS = [
    "trainer:\n  logger:\n  callbacks:\n    # none\n",
    "data:\n",
    "data:\n  class_path: toy_zoo.ToyData\n  init_args:\n    # batch_size: 8\n",
    "model:\n  class_path: toy_zoo.ToyNet\n  init_args:\n",
    "model:\n  class_path: toy_zoo.ToyNet\n  init_args:\n    optimizer:\n",
    *(
        f"model:\n  class_path: toy_zoo.ToyNet\n  init_args:\n    optimizer:\n      {section}"
        for section in (
            "matrix:\n        # lr: 0.1\n",
            "other:\n",
            "schedule:\n",
            "overrides:\n",
            "overrides:\n        head:\n          # lr: 0.1\n",
            "overrides:\n        head:\n          schedule:\n",
        )
    ),
]


def printed_recipe(args: list[str], capfd: pytest.CaptureFixture) -> dict:
    """Return the recipe that a command line ends in."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    printed = capfd.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


@pytest.mark.parametrize("section", EMPTY_SECTIONS)
def test_empty_section_is_the_default(section, project, capfd):
    expected = printed_recipe(FIT, capfd)
    Path("overlay.yaml").write_text(section)
    assert printed_recipe([*FIT, "--config", "overlay.yaml"], capfd) == expected


def test_empty_section_of_a_single_recipe_is_the_default(project, capfd):
    Path("whole.yaml").write_text(EMPTY_SECTIONS[5] + "data: {class_path: toy_zoo.ToyData}\n")
    assert main(["fit", "--config", "whole.yaml", "--trainer.fast_dev_run", "true"]) == 0


def test_explicit_null_stays_a_value():
    text = "a:\nb: null\nc: ~\nd: ''\ne: {f: , g: 1}\nh: [{i: }, 2]\n"
    expected = {"b": None, "c": None, "d": "", "e": {"g": 1}, "h": [{}, 2]}
    assert load_without_empty_sections(text) == expected


@pytest.mark.parametrize(
    "options",
    [
        ["--model.optimizer.overrides.head.lr", "0.125"],
        ["--model.optimizer.overrides.head.lr=0.125"],
        ["--model.optimizer.overrides.head", "{lr: 0.125}"],
    ],
    ids=" ".join,
)
def test_one_option_of_an_override(options, project, capfd):
    edit_recipe("model.init_args.optimizer.overrides", {"head": {"momentum": 0.75}})
    shape = "--model.optimizer.overrides.head.schedule.shape=cosine"
    with pytest.raises(SystemExit):
        main([*FIT, *options, shape, "--print_config"])
    recipe = yaml.safe_load(capfd.readouterr().out)
    head = recipe["model"]["init_args"]["optimizer"]["overrides"]["head"]
    assert (head["lr"], head["momentum"]) == (0.125, 0.75)
    assert head["schedule"]["shape"] == "cosine"


# Callbacks by the name of their class.

CALLBACKS = [  # the last one has a value that is neither a number nor text
    {"class_path": "lit_fanions.callbacks.SpectralMonitor", "init_args": {"every_n_steps": 50}},
    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
    {
        "class_path": "lightning.pytorch.callbacks.ThroughputMonitor",
        "init_args": {"batch_size_fn": "builtins.len"},
    },
]


@pytest.mark.parametrize("form", ["OPTION VALUE", "OPTION=VALUE"])
def test_option_of_a_callback_by_name(form, project, capfd):
    edit_recipe("trainer.callbacks", CALLBACKS)
    option, value = "--trainer.callbacks.SpectralMonitor.every_n_steps", "10"
    args = [f"{option}={value}"] if "=" in form else [option, value]
    monitor, checkpoint, _ = printed_recipe([*FIT, *args], capfd)["trainer"]["callbacks"]
    assert monitor["init_args"]["every_n_steps"] == 10
    assert checkpoint["init_args"]["save_last"] is True


def test_option_of_a_callback_that_an_overlay_adds(project, capfd):
    edit_recipe("trainer.callbacks", CALLBACKS[1:])
    Path("monitor.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": CALLBACKS[:1]}}))
    args = ["--trainer.callbacks.SpectralMonitor.every_n_steps", "10"]
    recipe = printed_recipe([*FIT, "--config", "monitor.yaml", *args], capfd)
    assert len(recipe["trainer"]["callbacks"]) == 3
    assert recipe["trainer"]["callbacks"][2]["init_args"]["every_n_steps"] == 10


def test_option_of_a_callback_reaches_the_run(project):
    edit_recipe("trainer.callbacks", CALLBACKS)
    assert main([*FIT, "--trainer.callbacks.ModelCheckpoint.save_last", "false"]) == 0
    assert not list(project.glob("lightning_logs/version_0/checkpoints/last.ckpt"))
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][1]["init_args"]["save_last"] is False


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (
            ["--trainer.callbacks.SpectralMonitr.every_n_steps", "10"],
            ["no SpectralMonitr", "did you mean 'SpectralMonitor'?"],
        ),
        (
            ["--trainer.callbacks.SpectralMonitor.every_n_step", "10"],
            ["every_n_step", "SpectralMonitor.every_n_steps'?"],
        ),
        (
            ["--trainer.callbacks.SpectralMonitor.every_n_steps", "often"],
            ["every_n_steps", "int", "often"],
        ),
    ],
)
def test_mistake_in_an_option_of_a_callback(args, fragments, project, capfd):
    edit_recipe("trainer.callbacks", CALLBACKS)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, *args])
    assert stop.value.code == 2
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) <= 3
    for fragment in fragments:
        assert fragment in printed, printed


def test_option_of_a_callback_that_is_not_in_the_recipe_is_refused(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--trainer.callbacks.SpectralMonitor.every_n_steps", "10"])
    assert stop.value.code == 2
    assert "no callbacks" in capfd.readouterr().err


# Recipes that are no recipes.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {}\n".encode("utf-16"), "odd.yaml is not UTF-8 text"),
        ("# café\n".encode("latin-1"), "odd.yaml is not UTF-8 text"),
        (b"", "odd.yaml is empty"),
        (b"a: \x00\n", "odd.yaml is not valid YAML"),
        (b"[1, 2]\n", "odd.yaml: Unexpected config: [1, 2]"),
        (b"hello\n", "odd.yaml: Unexpected config: hello"),
        (b"1: 2\n", "odd.yaml: Key must be a string, got: 1"),
    ],
)
def test_file_that_is_no_recipe_is_named(content, message, project, capfd):
    Path("odd.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--config", "odd.yaml"])
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"# nothing yet\n", b"\n", b"\xef\xbb\xbf# nothing\n"])
def test_overlay_of_comments_changes_nothing(content, project, capfd):
    expected = printed_recipe(FIT, capfd)
    Path("overlay.yaml").write_bytes(content)
    assert printed_recipe([*FIT, "--config", "overlay.yaml"], capfd) == expected

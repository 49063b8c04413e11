"""Mistakes in the command line and in recipes: at most three lines, with exit status 2."""

import sys
from pathlib import Path

import pytest

from lit_fanions.cli import errors
from lit_fanions.cli.app import main
from tests.cli.recipes import FIT, edit_recipe

COMMAND_LINE_MISTAKES = {
    "no subcommand": ([], ["subcommand", "fit,validate,test,predict,params"]),
    "subcommand": (["ftt"], ["'ftt'", "did you mean 'fit'?"]),
    "recipe first": (
        ["--config", "recipe.yaml", "fit"],
        ["before subcommand"],
    ),
    "no recipe": (["fit"], ["model", "--config FILE"]),
    "missing recipe": (
        ["fit", "--config", "recipee.yaml"],
        ["recipee.yaml", "'recipe.yaml'?"],
    ),
    "trainer option": (
        [*FIT, "--trainer.max_epoch", "1"],
        ["--trainer.max_epoch: ", "did you mean 'trainer.max_epochs'?"],
    ),
    "option with =": ([*FIT, "--trainer.max_epoch=1"], ["did you mean 'trainer.max_epochs'?"]),
    "section": ([*FIT, "--modle.width", "1"], ["--modle.width", "did you mean 'model'?"]),
    "model option": (
        [*FIT, "--model.widht", "1"],
        ["--model.widht", "did you mean 'model.width'?"],
    ),
    "nested option": (
        [*FIT, "--model.optimizer.matrix.momentun", ".9"],
        ["--model.optimizer.matrix.momentun", "did you mean 'model.optimizer.matrix.momentum'?"],
    ),
    "nested section": (
        [*FIT, "--model.optimizer.matrx.lr", ".9"],
        ["did you mean 'model.optimizer.matrix.lr'?"],
    ),
    "type": ([*FIT, "--model.width", "wide"], ["--model.width", "int", "wide"]),
    "union": (
        [*FIT, "--trainer.max_epochs", "x"],
        ["--trainer.max_epochs: expected int or null, got x\n"],
    ),
    "nested union": (
        [*FIT, "--model.optimizer.matrix.rank", "x"],
        ["--model.optimizer.matrix.rank: expected int, float, 'full' or null, got x"],
    ),
    "choice of a union": ([*FIT, "--model.optimizer.matrix.rank", "ful"], ["mean 'full'?"]),
    "algorithm": (
        [*FIT, "--model.optimizer.matrix.algorithm", "f_muonn"],
        ["--model.optimizer.matrix.algorithm", "neon", "did you mean 'f_muon'?"],
    ),
    "spelling": (
        [*FIT, "--model.optimizer.matrix.algorithm", "F-Muon"],
        ["did you mean 'f_muon'?"],
    ),
    "synonym": (
        [*FIT, "--model.optimizer.matrix.learning_rate", "1"],
        ["did you mean 'model.optimizer.matrix.lr'?"],
    ),
    "synonym of two options": (
        [*FIT, "--model.optimizer.matrix.betas", "1"],
        ["did you mean 'model.optimizer.matrix.momentum'?"],
    ),
    "no choice": ([*FIT, "--model.optimizer.matrix.lr", "fast"], ["float", "fast"]),
    "last of another run": (
        ["test", *FIT[1:], "--ckpt_path", "last"],
        ["only with fit", "pass the file"],
    ),
    "rank": ([*FIT, "--model.optimizer.matrix.rank", "-1"], ["rank", "-1"]),
    "no value": ([*FIT, "--trainer.max_epochs"], ["--trainer.max_epochs", "expected one"]),
    "stray word": ([*FIT, "fast"], ["fast"]),
    "class": (
        [*FIT, "--model", "toy_zoo.ToyNt"],
        ["'toy_zoo'", "'ToyNt'", "mean 'ToyNet'?"],
    ),
    "module": ([*FIT, "--model", "zoo.ToyNet"], ["--model", "'zoo'", "working directory"]),
    "no class path": ([*FIT, "--model", "ToyNett"], ["ToyNett", "import path"]),
    "other class": ([*FIT, "--model", "json.JSONDecoder"], ["LightningModule"]),
    "accelerator": ([*FIT, "--trainer.accelerator", "cppu"], ["cppu", "cpu"]),
    "checkpoint": ([*FIT, "--ckpt_path", "toy_zoo.ckpt"], ["--ckpt_path", "toy_zoo.ckpt"]),
    "override": (
        [*FIT, "--model.optimizer.overrides.head.lrr", "1"],
        ["--model.optimizer.overrides.head.lrr", "head.lr'?"],
    ),
    "abbreviation": ([*FIT, "--model.wid", "8"], ["--model.wid"]),
}

RECIPE_MISTAKES = {
    "top": (
        "triner",
        {"max_epochs": 1},
        ["triner", "recipe.yaml", "'trainer.max_epochs'?"],
    ),
    "trainer": ("trainer.max_epoch", 1, ["trainer.max_epoch in recipe.yaml", "max_epochs'?"]),
    "type": ("trainer.max_epochs", "two", ["trainer.max_epochs in recipe.yaml", "two"]),
    "model": ("model.init_args.widht", 1, ["model.init_args.widht in recipe.yaml", "'width'?"]),
    "init_args": ("model.initargs", {"width": 1}, ["model in recipe.yaml", "LightningModule"]),
    "matrix": (
        "model.init_args.optimizer.matrix.lrr",
        1,
        ["model.init_args.optimizer.matrix.lrr in recipe.yaml", "optimizer.matrix.lr'?"],
    ),
    "algorithm": (
        "model.init_args.optimizer.matrix.algorithm",
        "moun",
        ["algorithm in recipe.yaml", "did you mean 'muon'?"],
    ),
    "override": (
        "model.init_args.optimizer.overrides",
        {"head": {"lrr": 1}},
        ["overrides.head.lrr in recipe.yaml", "'lr'?"],
    ),
    "rank": ("model.init_args.optimizer.matrix.rank", -1, ["rank", "-1"]),
    "section": ("model.init_args.optimizer", 5, ["model.init_args.optimizer in recipe", "got 5"]),
    "list as section": ("model.init_args.optimizer", [1], ["section of options", "got [1]"]),
    "flag as section": ("model.init_args.optimizer.matrix", True, ["optimizer.matrix", "True"]),
    "trainer as number": ("trainer", 5, ["trainer in recipe.yaml", "section of options"]),
    "class": ("data.class_path", "toy_zoo.ToyDta", ["toy_zoo", "ToyDta", "'ToyData'?"]),
    "callback": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.ModelCheckpont"}],
        ["ModelCheckpont", "'ModelCheckpoint'?"],
    ),
    "callback option": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitr": 1}}],
        ["trainer.callbacks.init_args.monitr", "'monitor'?"],
    ),
    "option of a callback's optimizer": (
        "trainer.callbacks",
        [
            {
                "class_path": "lit_fanions.callbacks.FanionOptimizer",
                "init_args": {"optimizer": {"matrix": {"algoritm": "muon"}}},
            }
        ],
        ["init_args.optimizer.matrix.algoritm in recipe.yaml", "did you mean 'algorithm'?"],
    ),
}


CALLBACK = "lit_fanions.callbacks.FanionOptimizer"
OVERRIDE = {"mid": {"parameters": ["net.0.weight"], "schedule": {"shape": "linear"}}}
MISPLACED = {
    "key of the global schedule": ({"schedule": {"shpe": "linear"}, "overrides": OVERRIDE},
        ["optimizer.schedule.shpe in recipe.yaml", "shape'?"]),
    "value of the global schedule": ({"schedule": {"shape": "linr"}, "overrides": OVERRIDE},
        ["optimizer.schedule.shape in recipe.yaml", "got linr"]),
    "overrides": ({"overides": OVERRIDE}, ["optimizer.overides", "did you mean 'overrides'?"]),
    "rank_end": ({"schedule": {"rank_end": 0.25}, "overrides": {"vector": {"lr": 1e-3},
        "mid": {"parameters": ["net.0.weight"], "algorithm": "neon", "lr": 0.02}}},
        ["group 'mid': rank 1 and rank_end 0.25", "overrides.mid.schedule gives"]),
}  # fmt: skip


def assert_refused(args: list[str], fragments: list[str], capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    printed = capfd.readouterr().err
    lines = [line for line in printed.splitlines() if line.strip()]
    assert stop.value.code == 2, printed
    assert len(lines) <= 3, printed
    assert "error: " in printed
    for fragment in fragments:
        assert fragment in printed, printed


@pytest.mark.parametrize("name", COMMAND_LINE_MISTAKES)
def test_mistake_on_the_command_line(name, project, capfd):
    assert_refused(*COMMAND_LINE_MISTAKES[name], capfd)


@pytest.mark.parametrize("name", RECIPE_MISTAKES)
def test_mistake_in_a_recipe(name, project, capfd):
    key, value, fragments = RECIPE_MISTAKES[name]
    edit_recipe(key, value)
    assert_refused(FIT, fragments, capfd)


@pytest.mark.parametrize("name", MISPLACED)
@pytest.mark.parametrize("place", ["model.init_args.optimizer", "trainer.callbacks"])
def test_mistake_is_placed_beside_an_override_of_the_same_section(name, place, project, capfd):
    options, fragments = MISPLACED[name]
    callback = {"class_path": CALLBACK, "init_args": {"optimizer": options}}
    edit_recipe(place, [callback] if place.startswith("trainer") else options)
    with pytest.raises(SystemExit) as stop:
        main(FIT)
    assert stop.value.code == 2
    printed = capfd.readouterr().err
    assert all(fragment in printed for fragment in fragments), printed


def test_invalid_yaml_is_named(project, capfd):
    Path("broken.yaml").write_text("trainer: [1\nmodel: {")
    assert_refused(["fit", "--config", "broken.yaml"], ["broken.yaml", "YAML", "line 1"], capfd)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("seed_everything: 2\ntrainer:\n  max_epochs: 1\nseed_everything: 3\n",
         ["'seed_everything' is given twice", "line 4"]),
        ("trainer: {max_epochs: 1, max_steps: 5, max_epochs: 2}\n",
         ["'max_epochs' is given twice", "line 1"]),
        ("trainer:\n  callbacks:\n  - class_path: X\n    class_path: Y\n",
         ["'class_path' is given twice", "line 4"]),
    ],
    ids=["top", "section", "list"],
)  # fmt: skip
def test_key_that_is_given_twice_is_refused(content, fragments, project, capfd):
    Path("twice.yaml").write_text(content)
    assert_refused([*FIT, "--config", "twice.yaml"], ["twice.yaml", *fragments], capfd)


def test_anchors_and_merged_keys_are_not_given_twice():
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *a, <<: *b}\nd: [*a, *a, &e [*e]]\n"
    text += "1: x\n'1': y\n"
    assert errors.compose_yaml(text) is not None


@pytest.mark.parametrize(("option", "base"), [("--model", "Net"), ("--data", "Data")])
def test_module_of_pytorch_lightning_is_refused_with_a_way_out(option, base, project, capfd):
    pytest.importorskip("pytorch_lightning")
    Path("other_name.py").write_text(
        "from pytorch_lightning import LightningDataModule, LightningModule\n"
        "class Net(LightningModule):\n    pass\n"
        "class Data(LightningDataModule):\n    pass\n"
    )
    sys.modules.pop("other_name", None)
    fragments = ["written with pytorch_lightning", "lightning.pytorch", "configure_optimizers"]
    assert_refused([*FIT, option, f"other_name.{base}"], fragments, capfd)


def test_unknown_wording_is_passed_on():
    assert errors.explain("something\n  entirely   new") == "something entirely new"


def test_long_message_is_cut():
    assert len(errors.explain("x" * 1000)) == errors.MAX_LINE

"""The command line of sweeps: what it refuses before anything starts, and real trainings."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import lit_fanions
from lit_fanions.sweep import __main__ as sweep
from lit_fanions.sweep.plan import Range
from tests.conftest import TESTS, subprocess_environment, toy_recipe

ALPHA = "model.optimizer.matrix.alpha"
RECIPE = ("--config", "recipe.yaml")


def plan(*args):
    options, recipe = sweep._parser().parse_known_args([*RECIPE, *args])
    return sweep._plan(options, recipe)


def error(capfd, *args):
    with pytest.raises(SystemExit) as stop:
        sweep.main(args)
    assert stop.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", f"{ALPHA}=1"], "give a recipe: --config FILE"),
        ([*RECIPE, "--set", ALPHA], f"--set {ALPHA}: write it like --set NAME=1,2,3"),
        ([*RECIPE, "--seeds", "0"], "--seeds must be a whole number of at least 1, got 0"),
        ([*RECIPE, "--trials", "0"], "--trials must be a whole number of at least 1, got 0"),
        ([*RECIPE, "--jobs", "-1"], "--jobs must be a whole number of at least 1, got -1"),
        (
            [*RECIPE, "--sampler", "grid", "--tune", "a=1:2"],
            "--tune and --trials need a search: use --sampler tpe or --sampler random",
        ),
        (
            [*RECIPE, "--set", f"{ALPHA}=0,1", "--metric", "val/accumulated"],
            "--metric val/accumulated: say which values are better by --direction",
        ),
        (
            [*RECIPE, "--seed_everything", "1"],
            "--seed_everything cannot be used here: use --seeds N",
        ),
        (
            [*RECIPE, "--set", "trainer.devices=1,2"],
            "--trainer.devices cannot be used here: each training has one device; use --jobs N for "
            "several at a time",
        ),
        (
            [*RECIPE, "--set", f"{ALPHA}=1,2", "--model.init_args.optimizer.matrix.alpha=1"],
            "--model.init_args.optimizer.matrix.alpha cannot be used here: --set or --tune gives "
            "its values",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_in_one_line(args, message, project, capfd):
    line = f"error: {message} (all options: python -m lit_fanions sweep --help)"
    assert error(capfd, *args).splitlines()[-1] == line
    assert not Path("sweeps").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--set", "model.optimizer.matrix.alhpa=1"],
            "--model.optimizer.matrix.alhpa: unrecognized arguments: --optimizer.matrix.alhpa=1; "
            "did you mean 'model.optimizer.matrix.alpha'?",
        ),
        (
            ["--set", f"{ALPHA}=1,x"],
            f"--{ALPHA}: expected float or null, got x",
        ),
        (
            ["--trainer.max_epoch=1"],
            "--trainer.max_epoch: unrecognized arguments: --trainer.max_epoch=1; "
            "did you mean 'trainer.max_epochs'?",
        ),
    ],
    ids=["option", "value", "argument"],
)
def test_mistakes_in_options_of_fit_have_the_message_of_fit(args, message, project, capfd):
    first, *_, last = error(capfd, *RECIPE, *args).splitlines()
    assert first == f"error: {message}"
    assert last == "  all options: python -m lit_fanions fit --help"
    assert not Path("sweeps").exists()


def test_defaults_of_grids_and_searches(project):
    found = plan("--set", f"{ALPHA}=0,1")
    assert (found.sampler, found.metric, found.direction) == ("grid", "val/loss", "minimize")
    assert (found.out, found.study, found.jobs, found.devices) == (
        *(Path("sweeps/recipe"), "recipe"),
        *(1, ()),
    )
    found = plan("--trials", "3", "--metric", "val/acc", "--out", "a/b")
    assert (found.sampler, found.direction, found.study) == ("tpe", "maximize", "b")
    assert list(found.space.values()) == [Range(0.002, 0.2, log=True), Range(0.5, 0.99)]
    assert plan("--trials", "3", "--metric", "val/f1").direction == "maximize"


def test_missing_optuna_is_named(project, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "a sweep needs optuna: pip install optuna" in error(capfd, *RECIPE)


def test_storages_that_would_repeat_trainings_are_refused(project, capfd):
    args = [*RECIPE, "--set", f"{ALPHA}=1,2"]
    line = error(capfd, *args, "--storage", "sqlite:///a.db", "--jobs", "2").splitlines()[-1]
    assert "--storage: in SQLite, two trainings at a time may take the same trial: use --" in line
    Path("old").mkdir()
    Path("old/study.db").touch()
    line = error(capfd, *args, "--out", "old").splitlines()[-1]
    assert "old/study.db was made by an earlier version: continue it with --storage " in line


def test_sweep_is_summarized_before_it_begins(project):
    grid = plan("--set", f"{ALPHA}=0,1", "model.width=4,5,6")
    expected = "sweep recipe: 6 settings with 1 seed each; minimize val/loss"
    assert sweep._summary(grid, 1, 30) == expected
    search = plan("--trials", "8", "--metric", "val/acc")
    assert sweep._summary(search, 3, 8) == (
        "sweep recipe-tpe: 8 settings chosen by tpe, the best of them with 3 seeds; "
        "maximize val/acc"
    )


def test_each_visible_gpu_has_one_training(monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._devices("auto") == ("0", "1")
    assert sweep._devices("cpu") == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert sweep._devices("gpu") == ("3", "5")


@pytest.mark.slow
def test_grid_of_real_trainings(project, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    args = [*RECIPE, "--set", f"{ALPHA}=-.1,1", "--metric", "val/acc", "--jobs", "2"]
    assert sweep.main([*args, "--seeds", "1", "--model.width=5"]) == 0, capfd.readouterr()
    with Path("sweeps/recipe/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row[ALPHA], row["seed"], row["state"]) for row in rows] == [
        ("-0.1", "0", "complete"),
        ("1.0", "0", "complete"),
    ]
    used = yaml.safe_load(Path("sweeps/recipe/runs", rows[0]["folder"], "config.yaml").read_text())
    assert used["model"]["init_args"]["optimizer"]["matrix"]["alpha"] == -0.1
    assert used["model"]["init_args"]["width"] == 5
    assert "[2/2]" in capfd.readouterr().out
    # A metric that is not logged: said with the names of those that are.
    args[-3] = "val/f1"
    line = error(capfd, *args, "--out", "other").splitlines()[-1]
    assert "has no val/f1; " in line and "val/acc" in line


@pytest.mark.slow
def test_real_trainings_are_killed_and_resumed(project, monkeypatch, capfd):
    recipe = toy_recipe()
    recipe["model"] = {"class_path": "toy_zoo.Slow"}
    recipe["trainer"]["max_epochs"] = 10
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    args = [*RECIPE, "--set", "data.batch_size=8,64", "--metric", "val/acc", "--seeds", "1"]
    command = [sys.executable, "-m", "lit_fanions.sweep", *args]
    parent = subprocess.Popen(command, env=subprocess_environment())
    while not Path("training").exists():
        assert parent.poll() is None
        time.sleep(0.1)
    child = int(Path("training").read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_text():
        assert time.monotonic() < deadline  # it ends with its parent
        time.sleep(0.1)
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    assert sweep.main(args) == 0
    assert len(json.loads(Path("sweeps/recipe/sweep.json").read_text())["rows"]) == 2
    capfd.readouterr()
    assert sweep.main(args) == 0
    assert "0 to train; finished before: 2\n" in capfd.readouterr().out


@pytest.mark.slow
def test_sweep_works_without_the_checkout(project):
    shutil.copytree(Path(lit_fanions.__file__).parent, "site/lit_fanions")
    recipe = toy_recipe()
    del recipe["model"]["init_args"]["optimizer"]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**subprocess_environment(), "PYTHONPATH": str(project / "site")}

    def run(*args):
        return subprocess.run(
            [sys.executable, *args], env=environment, capture_output=True, text=True, timeout=100
        )

    assert "No module named 'models'" in run("-c", "import models").stderr
    args = ["--set", "model.width=4,5", "--metric", "val/acc", "--seeds", "1"]
    found = run("-m", "lit_fanions.sweep", *RECIPE, *args)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] == (
        "sweep recipe: 2 settings with 1 seed each; maximize val/acc"
    )
    assert "saved: sweeps/recipe/sweep.png, .csv, .json" in found.stdout
    assert json.loads(Path("sweeps/recipe/sweep.json").read_text())["commit"] is None


def test_training_ends_with_its_parent(tmp_path):
    code = (
        "import runpy, sys, time, types\n"
        "main = lambda: print('here', flush=True) or time.sleep(60)\n"
        "sys.modules['lit_fanions.cli.app'] = types.SimpleNamespace(main=main)\n"
        "runpy.run_module('lit_fanions.cli.child', run_name='__main__')\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=subprocess_environment(),
    )
    assert child.stdout.readline() == b"here\n"
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(10) == 1
    child.stdout.close()

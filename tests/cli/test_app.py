"""The command line: mistakes, errors, interruption, resumption, and what each command prints."""

import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from lit_fanions.cli import errors
from lit_fanions.cli.app import main
from tests.conftest import TESTS, subprocess_environment, toy_recipe

FIT = ["fit", "--config", "recipe.yaml"]
ROOT = TESTS.parent
RECIPES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").rglob("*.yaml")
    if "class_path" in (yaml.safe_load(path.read_text()) or {}).get("model", {})
)


def edited(path: str, value: object) -> None:
    """Set a dotted key of recipe.yaml; a digit is a place in a list."""
    recipe = toy_recipe()
    node = recipe
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


# Mistakes in the configuration: at most three lines, exit status 2.

COMMAND_LINE_MISTAKES = {
    "no subcommand": ([], ["no subcommand", "fit, validate, test, predict, params"]),
    "subcommand": (["ftt"], ["'ftt'", "did you mean fit?"]),
    "recipe first": (["--config", "recipe.yaml", "fit"], ["before the subcommand"]),
    "no recipe": (["fit"], ["model", "--config FILE"]),
    "missing recipe": (["fit", "--config", "recipee.yaml"], ["recipee.yaml", "mean recipe.yaml?"]),
    "trainer option": (
        [*FIT, "--trainer.max_epoch", "1"],
        ["--trainer.max_epoch\n", "did you mean --trainer.max_epochs?"],
    ),
    "option with =": ([*FIT, "--trainer.max_epoch=1"], ["did you mean --trainer.max_epochs?"]),
    "section": ([*FIT, "--modle.width", "1"], ["--modle.width", "did you mean --model.width?"]),
    "model option": (
        [*FIT, "--model.widht", "1"],
        ["unknown option --model.widht", "did you mean --model.width?"],
    ),
    "nested option": (
        [*FIT, "--model.optimizer.matrix.momentun", ".9"],
        ["--model.optimizer.matrix.momentun", "did you mean --model.optimizer.matrix.momentum?"],
    ),
    "nested section": (
        [*FIT, "--model.optimizer.matrx.lr", ".9"],
        ["did you mean --model.optimizer.matrix.lr?"],
    ),
    "type": ([*FIT, "--model.width", "wide"], ["--model.width", "expected int", "'wide'"]),
    "union": ([*FIT, "--trainer.max_epochs", "x"], ["expected int or null", "'x'"]),
    "algorithm": (
        [*FIT, "--model.optimizer.matrix.algorithm", "f_muonn"],
        ["--model.optimizer.matrix.algorithm", "neon", "did you mean f_muon?"],
    ),
    "spelling": (
        [*FIT, "--model.optimizer.matrix.algorithm", "F-Muon"],
        ["did you mean f_muon?"],
    ),
    "synonym": (
        [*FIT, "--model.optimizer.matrix.learning_rate", "1"],
        ["did you mean --model.optimizer.matrix.lr?"],
    ),
    "no choice": ([*FIT, "--model.optimizer.matrix.lr", "fast"], ["expected float", "'fast'"]),
    "last of another run": (["test", *FIT[1:], "--ckpt_path", "last"], ["give the checkpoint"]),
    "rank": ([*FIT, "--model.optimizer.matrix.rank", "-1"], ["rank", "-1"]),
    "no value": ([*FIT, "--trainer.max_epochs"], ["--trainer.max_epochs", "expected one"]),
    "stray word": ([*FIT, "fast"], ["fast"]),
    "class": ([*FIT, "--model", "toy_zoo.ToyNt"], ["toy_zoo.ToyNt", "mean toy_zoo.ToyNet?"]),
    "module": ([*FIT, "--model", "zoo.ToyNet"], ["zoo.ToyNet", "working directory"]),
    "no class path": ([*FIT, "--model", "ToyNett"], ["ToyNett", "module.Class"]),
    "other class": ([*FIT, "--model", "json.JSONDecoder"], ["LightningModule"]),
    "accelerator": ([*FIT, "--trainer.accelerator", "cppu"], ["cppu", "cpu"]),
    "checkpoint": ([*FIT, "--ckpt_path", "toy_zoo.ckpt"], ["--ckpt_path", "toy_zoo.ckpt"]),
    "override": (
        [*FIT, "--model.optimizer.overrides.head.lrr", "1"],
        ["unknown option", "lrr", "lr?"],
    ),
    "abbreviation": ([*FIT, "--model.wid", "8"], ["--model.wid"]),
}

RECIPE_MISTAKES = {
    "top": ("triner", {"max_epochs": 1}, ["triner", "recipe.yaml", "did you mean trainer"]),
    "trainer": ("trainer.max_epoch", 1, ["trainer.max_epoch in recipe.yaml", "max_epochs?"]),
    "type": ("trainer.max_epochs", "two", ["trainer.max_epochs in recipe.yaml", "'two'"]),
    "model": ("model.init_args.widht", 1, ["model.init_args.widht in recipe.yaml", "width?"]),
    "init_args": ("model.initargs", {"width": 1}, ["model in recipe.yaml", "init_args"]),
    "matrix": (
        "model.init_args.optimizer.matrix.lrr",
        1,
        ["model.init_args.optimizer.matrix.lrr in recipe.yaml", "optimizer.matrix.lr?"],
    ),
    "algorithm": (
        "model.init_args.optimizer.matrix.algorithm",
        "moun",
        ["algorithm in recipe.yaml", "did you mean muon?"],
    ),
    "override": (
        "model.init_args.optimizer.overrides",
        {"head": {"lrr": 1}},
        ["overrides.head.lrr in recipe.yaml", "overrides.head.lr?"],
    ),
    "rank": ("model.init_args.optimizer.matrix.rank", -1, ["rank", "-1"]),
    "class": ("data.class_path", "toy_zoo.ToyDta", ["toy_zoo.ToyDta", "toy_zoo.ToyData?"]),
    "callback": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.ModelCheckpont"}],
        ["ModelCheckpont", "callbacks.ModelCheckpoint?"],
    ),
    "callback option": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitr": 1}}],
        ["trainer.callbacks.init_args.monitr", "monitor?"],
    ),
}


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
    edited(key, value)
    assert_refused(FIT, fragments, capfd)


def test_invalid_yaml_is_named(project, capfd):
    Path("broken.yaml").write_text("trainer: [1\nmodel: {")
    assert_refused(["fit", "--config", "broken.yaml"], ["broken.yaml", "YAML", "line 1"], capfd)


def test_unknown_wording_is_passed_on():
    assert errors.explain("something\n  entirely   new") == ["something entirely new"]


def test_long_message_is_cut():
    (line,) = errors.explain("x" * 1000)
    assert len(line) == errors.MAX_LINE


# Errors while running: one line, exit status 1.


def test_run_time_error_is_one_line(project, capfd):
    assert main([*FIT, "--model", "toy_zoo.Failing"]) == 1
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if "error" in line]
    assert line == lines[-1]
    assert "RuntimeError: the third step went wrong" in line
    assert "LIT_FANIONS_TRACEBACK=1" in line


def test_traceback_on_request(project, capfd, monkeypatch):
    monkeypatch.setenv("LIT_FANIONS_TRACEBACK", "1")
    assert main([*FIT, "--model", "toy_zoo.Failing"]) == 1
    printed = capfd.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "toy_zoo.py" in printed
    assert "LIT_FANIONS_TRACEBACK" not in printed.splitlines()[-1]


def test_failed_run_keeps_its_log(project, capfd):
    main([*FIT, "--model", "toy_zoo.Failing"])
    (events,) = project.glob("lightning_logs/version_0/events.*")
    assert b"train/loss" in events.read_bytes()


def test_missing_data_is_a_usage_error(project, capfd):
    assert main([*FIT, "--data.data_dir", "nowhere"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: no folder nowhere: pass --data.data_dir"
    )


# fit and what it leaves behind.


def test_fit_ends_with_accuracy_logs_and_the_command_that_opens_them(project, capfd):
    assert main(FIT) == 0
    lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"test accuracy: \d+\.\d\d %", lines[0])
    assert re.fullmatch(r"test accuracy \(no tta\): \d+\.\d\d %", lines[1])
    assert re.fullmatch(r"test loss: \d.*", lines[2])
    assert lines[3] == "logs: lightning_logs/version_0"
    opener = re.fullmatch(r"open them with: (.*tensorboard.*) --logdir (.*)", lines[4])
    assert opener and opener[2] == "lightning_logs/version_0"
    assert len(lines) == 5


def test_other_loggers_tell_their_folder(project, capfd):
    edited("trainer.logger", {"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}})
    assert main(FIT) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "logs: csv/lightning_logs/version_0"


def test_without_a_logger_no_file_of_the_user_is_overwritten(project, capfd):
    Path("config.yaml").write_text("mine")
    assert main([*FIT, "--trainer.logger", "false"]) == 0
    assert Path("config.yaml").read_text() == "mine"
    assert "logs" not in capfd.readouterr().out


def test_trial_run_leaves_nothing(project, capfd):
    assert main([*FIT, "--trainer.fast_dev_run", "true"]) == 0
    assert "accuracy" not in capfd.readouterr().out
    assert not (project / "lightning_logs").exists()


def test_saved_configuration_is_a_recipe_for_every_subcommand(project, capfd):
    main([*FIT, "--model.width", "6"])
    saved = "lightning_logs/version_0/config.yaml"
    (checkpoint,) = map(str, project.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
    for subcommand in ("validate", "test", "predict"):
        assert main([subcommand, "--config", saved, "--ckpt_path", checkpoint]) == 0
    assert main(["params", "--config", saved]) == 0
    assert "Total parameters: 44" in capfd.readouterr().out


def test_predictions_are_saved(project, capfd):
    main(FIT)
    (checkpoint,) = map(str, project.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
    capfd.readouterr()
    assert main(["predict", "--config", "recipe.yaml", "--ckpt_path", checkpoint]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    predictions = torch.load(line.removeprefix("predictions: "))
    assert [len(batch) for batch in predictions] == [8] * 8


def test_evaluating_untrained_weights_warns(project, capfd):
    assert main(["test", "--config", "recipe.yaml"]) == 0
    assert "freshly initialised weights" in capfd.readouterr().err


# Ctrl-C.


def weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_interrupted_and_resumed_equals_uninterrupted(project, capfd):
    assert main(FIT) == 0
    handler = signal.getsignal(signal.SIGINT)
    assert main([*FIT, "--model", "toy_zoo.Interrupted"]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    captured = capfd.readouterr()
    line = captured.err.splitlines()[-1]
    saved = "lightning_logs/version_1/checkpoints/interrupted.ckpt"
    assert re.match(r"interrupted; resume with: \S*python\S* -m lit_fanions fit", line)
    assert line.endswith(f"--ckpt_path {saved}")
    assert torch.load(saved, weights_only=True)["global_step"] == 5

    assert main([*FIT, "--ckpt_path", saved]) == 0
    first, last = (
        next(project.glob(f"lightning_logs/version_{version}/checkpoints/epoch*.ckpt"))
        for version in (0, 2)
    )
    assert first.name == last.name
    for name, value in weights(first).items():
        assert torch.equal(value, weights(last)[name])


def test_second_interruption_stops_at_once(project, capfd):
    handler = signal.getsignal(signal.SIGINT)
    assert main([*FIT, "--model", "toy_zoo.Interrupted", "--model.times", "2"]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted; no checkpoint was saved"


def test_ctrl_c_in_a_terminal(project):
    command = [sys.executable, "-m", "lit_fanions", *FIT, "--model", "toy_zoo.Slow"]
    run = subprocess.Popen(
        [*command, "--trainer.max_epochs", "1000"],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not Path("training").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    assert "accuracy" not in out
    saved = err.splitlines()[-1].rpartition("--ckpt_path ")[2]
    assert Path(saved).exists()
    assert torch.load(saved, weights_only=True)["global_step"] > 0
    (events,) = project.glob("lightning_logs/version_0/events.*")
    assert b"train/loss" in events.read_bytes()


# Checkpoints and the configuration.


@pytest.fixture
def checkpoint(project) -> str:
    """A checkpoint from the middle of an epoch, trained with lr 0.02."""
    main([*FIT, "--model", "toy_zoo.Interrupted"])
    return "lightning_logs/version_0/checkpoints/interrupted.ckpt"


def test_resuming_says_which_options_the_checkpoint_decides(checkpoint, capfd):
    capfd.readouterr()
    args = ["--ckpt_path", checkpoint, "--model.optimizer.matrix.lr", "0.5"]
    assert main([*FIT, *args]) == 0
    warnings = [a for a in capfd.readouterr().err.splitlines() if a.startswith("warning:")]
    assert warnings
    assert all("lr 0.02 from the checkpoint is used, not the configured 0.5" in a for a in warnings)


def test_resuming_unchanged_is_silent(checkpoint, capfd):
    capfd.readouterr()
    assert main([*FIT, "--ckpt_path", checkpoint]) == 0
    assert "from the checkpoint" not in capfd.readouterr().err


def test_checkpoint_does_not_override_the_configuration(checkpoint, capfd):
    assert main([*FIT, "--ckpt_path", checkpoint, "--model.smoothing", "0.25"]) == 0
    saved = yaml.safe_load(Path("lightning_logs/version_1/config.yaml").read_text())
    assert saved["model"]["init_args"]["smoothing"] == 0.25
    assert "ckpt_path" not in saved


# params, help, version.


def test_params_shows_the_split_and_the_total(project, capfd):
    assert main(["params", "--config", "recipe.yaml"]) == 0
    lines = capfd.readouterr().out.splitlines()
    for name in ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"):
        assert any(name in line for line in lines)
    assert lines[-1] == "Total parameters: 58"
    assert not (project / "lightning_logs").exists()


def test_params_needs_no_data(project, capfd):
    assert main(["params", "--config", "recipe.yaml", "--data.data_dir", "nowhere"]) == 0


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
    edited("model.init_args.optimizer.overrides", {"head": {"momentum": 0.75}})
    shape = "--model.optimizer.overrides.head.schedule.shape=cosine"
    with pytest.raises(SystemExit):
        main([*FIT, *options, shape, "--print_config"])
    recipe = yaml.safe_load(capfd.readouterr().out)
    head = recipe["model"]["init_args"]["optimizer"]["overrides"]["head"]
    assert (head["lr"], head["momentum"]) == (0.125, 0.75)
    assert head["schedule"]["shape"] == "cosine"


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"], ["params", "--help"]])
def test_help_shows_an_example(args, project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    printed = capfd.readouterr().out
    assert "python -m lit_fanions fit --config configs/quickstart.yaml\n" in printed
    assert len(printed.partition("\n\n")[0].splitlines()) <= 3  # the usage


def test_model_help_shows_the_optimizer_options(project, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "toy_zoo.ToyNet"])
    assert "--model.optimizer.matrix.lr" in capfd.readouterr().out


def test_version(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert torch.__version__ in capfd.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_is_complete(recipe, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    with torch.device("meta"):  # for speed: nothing looks at the weights
        assert main(["params", "--config", str(recipe)]) == 0, capfd.readouterr().err
    (total,) = re.findall(r"Total parameters: ([\d,]+)\n$", capfd.readouterr().out)
    published = {"track3": "162,354,816", "speedrun": "275,742,784", "finetune": "162,354,816"}
    assert total == published.get(recipe.stem.partition("_")[0], total)


@pytest.mark.slow
def test_wheel_holds_the_library_only(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("lit_fanions", "models", "datamodules", "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "lit_fanions",
        next(name.split("/")[0] for name in names if ".dist-info/" in name),
    }
    assert "lit_fanions/optim/fanion.py" in names
    assert "experiments/bench/overhead.py" in names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "lit-fanions = lit_fanions.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()

"""The command line: what each command prints and leaves behind."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from lit_fanions.cli.app import main
from tests.cli.recipes import FIT, edit_recipe
from tests.conftest import TESTS

ROOT = TESTS.parent
RECIPES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").rglob("*.yaml")
    if "class_path" in (yaml.safe_load(path.read_text()) or {}).get("model", {})
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
    edit_recipe("trainer.logger", {"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}})
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
    line, form = capfd.readouterr().out.splitlines()
    assert form.startswith(
        "format: torch.load gives a list of 8 batches, each what ToyNet.predict_s"
    )
    predictions = torch.load(line.removeprefix("predictions: "))
    assert [len(batch) for batch in predictions] == [8] * 8


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluating_untrained_weights_is_refused(subcommand, project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--config", "recipe.yaml"])
    assert stop.value.code == 2
    (line,) = [a for a in capfd.readouterr().err.splitlines() if a.startswith("error: ")]
    assert "--ckpt_path FILE" in line
    assert "--allow_untrained" in line


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluating_untrained_weights_on_request(subcommand, project):
    assert main([subcommand, "--config", "recipe.yaml", "--allow_untrained"]) == 0
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert "allow_untrained" not in saved


# params, help, version.


def test_params_shows_the_split_and_the_total(project, capfd):
    assert main(["params", "--config", "recipe.yaml"]) == 0
    lines = capfd.readouterr().out.splitlines()
    for name in ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"):
        assert any(name in line for line in lines)
    assert lines[-1] == "Total parameters: 58"
    assert not (project / "lightning_logs").exists()


def test_params_names_frozen_parameters(project, capfd, monkeypatch):
    freeze = lambda self: self.net[0].requires_grad_(False)  # noqa: E731
    monkeypatch.setattr(LightningModule, "configure_model", freeze)
    assert main(["params", "--config", "recipe.yaml"]) == 0
    *_, frozen, total = capfd.readouterr().out.splitlines()
    assert frozen == "Frozen, in no group: 40 (net.0.weight, ...)"
    assert total == "Total parameters: 58"


def test_params_shows_what_each_device_solves(project, capfd):
    assert main(["params", "--config", "recipe.yaml", "--devices", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    # Matrices of a toy cost less than sending them.
    assert lines[-2].startswith("Each of 2 ranks that replicate the parameters solves all matrices")
    assert lines[-1] == "Total parameters: 58"


def test_params_needs_no_data(project, capfd):
    assert main(["params", "--config", "recipe.yaml", "--data.data_dir", "nowhere"]) == 0


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"], ["params", "--help"]])
def test_help_shows_an_example(args, project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    printed = capfd.readouterr().out
    assert "python -m lit_fanions fit --config configs/quickstart.yaml\n" in printed
    assert len(printed.partition("\n\n")[0].splitlines()) <= 3  # the usage


def test_help_names_the_callbacks_of_the_package_and_no_internal_ones(project, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    printed = capfd.readouterr().out
    for name in ("FanionOptimizer", "NormAdvisor", "SpectralMonitor"):
        assert f"lit_fanions.callbacks.{name}" in printed
    assert "lit_fanions.cli._" not in printed


def test_model_help_shows_the_optimizer_options(project, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "toy_zoo.ToyNet"])
    assert "--model.optimizer.matrix.lr" in capfd.readouterr().out


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
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "lit-fanions = lit_fanions.__main__:start" in zipfile.ZipFile(wheel).read(entry).decode()

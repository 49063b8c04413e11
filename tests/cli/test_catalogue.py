"""`list` and `--version`: what they print, and that they need no Lightning."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from lit_fanions.cli.app import main
from lit_fanions.optim.algorithms import Algorithm
from tests.conftest import TESTS, subprocess_environment

KINDS = ["models", "data", "recipes", "algorithms", "presets", "callbacks"]


def listed(args: list[str], capfd: pytest.CaptureFixture) -> dict[str, str]:
    """Return the names that `list` prints, with their descriptions."""
    assert main(["list", *args]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  ")]
    return {line.split()[0]: line.partition(line.split()[0])[2].strip() for line in lines}


def test_everything_is_listed_by_kind(monkeypatch, capfd):
    monkeypatch.chdir(TESTS.parent)
    assert main(["list"]) == 0
    heads = [line for line in capfd.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [head.split()[0] for head in heads] == KINDS


@pytest.mark.parametrize(
    ("kind", "module"),
    [("models", "models"), ("data", "datamodules"), ("callbacks", "lit_fanions.callbacks")],
)
def test_classes_are_listed_with_their_class_path(kind, module, monkeypatch, capfd):
    monkeypatch.chdir(TESTS.parent)
    names = listed([kind], capfd)
    assert names
    for path, text in names.items():
        package, _, name = path.rpartition(".")
        assert package == module
        assert isinstance(getattr(sys.modules.get(module) or __import__(module), name), type)
        assert text.endswith((".", "?", ":")), path


def test_recipes_are_listed_with_their_comment(monkeypatch, capfd):
    monkeypatch.chdir(TESTS.parent)
    names = listed(["recipes"], capfd)
    assert set(names) == {str(path) for path in Path("configs").rglob("*.yaml")}
    assert all(names.values())


def test_algorithms_are_listed(project, capfd):
    assert set(listed(["algorithms"], capfd)) == set(get_args(Algorithm))


def test_empty_folder_lists_no_models(project, capfd):
    assert main(["list", "models"]) == 0
    assert "none in this working directory" in capfd.readouterr().out


def test_unknown_kind_is_refused(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["list", "model"])
    assert stop.value.code == 2
    assert "did you mean 'models'?" in capfd.readouterr().err


@pytest.mark.parametrize("args", [["list"], ["--version"]])
def test_light_commands_import_no_command_line_of_lightning(args, project):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['lit_fanions', *{args!r}]\n"
        "try:\n    runpy.run_module('lit_fanions', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert 'lightning.pytorch.cli' not in sys.modules\n"
        "assert 'jsonargparse' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=subprocess_environment(), check=True)

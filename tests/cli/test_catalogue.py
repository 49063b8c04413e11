"""`list`: what it prints."""

import sys
from pathlib import Path

import pytest

from lit_fanions.__main__ import start as main
from lit_fanions.lmo.presets import METHODS
from lit_fanions.optim.algorithms import ALGORITHMS, describe_step
from tests.conftest import TESTS

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


def test_algorithms_are_listed_with_ball_and_direction(project, capfd):
    lines = listed(["algorithms"], capfd)
    assert set(lines) == set(ALGORITHMS)
    for name, entry in ALGORITHMS.items():
        if entry.ball:
            given = {"algorithm": name, **entry.options}
            assert all(text in lines[name] for text in describe_step(given))
    assert lines["neon"] == "nuclear: u₁ v₁ᵀ, rank 1"
    assert lines["s_muon"] == "spectral + largest entry: 0.5 (U Vᵀ) + 0.5 (s sign(M))"


def test_polar_methods_are_listed_with_what_they_are(project, capfd):
    lines = listed(["presets"], capfd)
    assert tuple(lines) == tuple(sorted(METHODS))
    assert all(lines.values())


def test_empty_folder_lists_no_models(project, capfd):
    assert main(["list", "models"]) == 0
    assert "none in this working directory" in capfd.readouterr().out


def test_unknown_kind_is_refused(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["list", "model"])
    assert stop.value.code == 2
    assert "did you mean 'models'?" in capfd.readouterr().err


def test_broken_files_of_a_project_are_left_out(project, capfd):
    Path("models").mkdir()
    Path("models/__init__.py").write_text("from .whole import Net\nfrom .half import Other\n")
    Path("models/whole.py").write_bytes(
        b"# -*- coding: latin-1 -*-\n# caf\xe9\nclass Net: 'A net.'\n"
    )
    for broken in (b"class Other(:\n", b"name = '\xe9'\n", b"\0"):
        Path("models/half.py").write_bytes(broken)
        assert main(["list", "models"]) == 0
        printed, complaint = capfd.readouterr()
        assert printed.splitlines()[1:] == ["  models.Net  A net."]
        assert "models/half.py is left out" in complaint
    Path("configs/folder.yaml").mkdir(parents=True)
    Path("configs/link.yaml").symlink_to("missing.yaml")
    Path("configs/latin.yaml").write_bytes(b"# Caf\xe9.\n")
    assert listed(["recipes"], capfd) == {"configs/latin.yaml": "Caf\ufffd."}

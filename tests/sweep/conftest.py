"""The fixture that replaces the trainings of a sweep."""

from pathlib import Path

import pytest

from lit_fanions.cli import curves, runner
from lit_fanions.sweep import study
from tests.sweep.fakes import SIMPLE, python_command, read


@pytest.fixture
def fake(hears_signals, monkeypatch, tmp_path):
    """Return a function that replaces trainings by Python code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(curves, "open_events", lambda logs: logs)
    monkeypatch.setattr(curves, "read_curve", read)
    monkeypatch.setattr(curves, "read_curves", lambda logs, metrics: {metrics[0]: read(logs)})
    monkeypatch.setattr(study, "LOOK", 0.05)
    Path("recipe.yaml").write_text("lr: 1")

    def replace(code=SIMPLE):
        monkeypatch.setattr(runner, "_command", python_command(code))

    replace()
    return replace

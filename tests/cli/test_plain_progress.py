"""A run without a terminal says in plain lines how far it is."""

import sys

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lit_fanions import progress
from lit_fanions.__main__ import start
from lit_fanions.cli._hooks import PlainProgress, without_bars
from tests.cli.recipes import FIT


def test_bars_are_replaced_and_other_callbacks_stay():
    class Own(TQDMProgressBar):
        """A bar that the user has written."""

    given = [TQDMProgressBar(), RichProgressBar(), Own(), object()]
    found = without_bars(given)
    assert [type(own) for own in found] == [PlainProgress, PlainProgress, Own, object]


def test_lines_have_step_share_and_time_left(project, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress, "_REPEAT", 0.0)
    args = [*FIT, "--trainer.max_steps=4", "--trainer.enable_progress_bar=true"]
    assert start(args) == 0
    lines = capfd.readouterr().err.splitlines()
    training = [line for line in lines if line.startswith("training: ")]
    assert training[0].startswith("training: 25%; step 1; about ")
    assert training[-1] == "training: 100%; step 4"
    assert any(line.startswith("validation: ") for line in lines)
    assert not any("it/s" in line for line in lines)


@pytest.mark.parametrize("shown", [True, False])
def test_terminal_keeps_the_bar(shown, project, monkeypatch):
    seen = []
    monkeypatch.setattr("lit_fanions.cli._hooks.without_bars", lambda own: seen.append(own) or own)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: shown, raising=False)
    assert start([*FIT, "--trainer.max_steps=1"]) == 0
    assert bool(seen) is not shown

"""What the tests of the training commands share."""

import pytest

from lit_fanions.cli import runner


@pytest.fixture
def unchecked(monkeypatch):
    """Let commands take recipes that `fit` would refuse: no training is started."""
    monkeypatch.setattr(runner, "check", lambda args: None)

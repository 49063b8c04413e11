"""What the tests of the commands share."""

import pytest

from experiments.paper import repetitions


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Let every row of a table stay in one line."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def unchecked(monkeypatch):
    """Let commands take recipes that `fit` would refuse: no training is started."""
    monkeypatch.setattr(repetitions, "check", lambda args: None)

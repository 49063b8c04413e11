"""What the tests of the commands share."""

import pytest

from experiments.paper import repetitions


@pytest.fixture
def unchecked(monkeypatch):
    """Let commands take recipes that `fit` would refuse: no training is started."""
    monkeypatch.setattr(repetitions, "check", lambda args: None)

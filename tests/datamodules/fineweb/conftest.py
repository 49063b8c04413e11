"""A stand-in for huggingface_hub."""

import sys
from types import SimpleNamespace

import pytest

from tests.datamodules.fineweb.hub import (
    Hub,
    HubError,
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    errors = SimpleNamespace(HfHubHTTPError=HubError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return stand_in

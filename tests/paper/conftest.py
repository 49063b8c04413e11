"""What the tests of the paper's commands share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def hears_signals() -> Iterator[None]:
    """Make Ctrl-C count also where the tests run in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)

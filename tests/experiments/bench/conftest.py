"""One quick run of each race, for all tests that look at it."""

import pytest

from tests.experiments.bench.outcomes import outcome


@pytest.fixture(scope="session")
def topk_outcome(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("topk"), "topk", "--repeats", "3")


@pytest.fixture(scope="session")
def polar_outcome(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("polar"), "polar", "--repeats", "2")


@pytest.fixture(scope="session")
def step_outcome(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("step"), "step", "--repeats", "2")

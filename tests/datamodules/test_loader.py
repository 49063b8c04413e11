"""EpochLoader by itself: epochs, abandoned iterations, saved positions."""

import copy
from collections.abc import Iterator

import pytest

from datamodules.loader import EpochLoader, fit_progress, rank_and_world, resolve_seed

LENGTH = 4


def batches(epoch: int, first: int) -> Iterator[tuple[int, int]]:
    return iter([(epoch, batch) for batch in range(first, LENGTH)])


def loader() -> EpochLoader[tuple[int, int]]:
    return EpochLoader(batches, LENGTH)


def epochs(*numbers: int) -> list[tuple[int, int]]:
    return [batch for epoch in numbers for batch in batches(epoch, 0)]


def test_each_iteration_is_an_epoch() -> None:
    ours = loader()
    assert len(ours) == LENGTH
    assert [batch for _ in range(3) for batch in ours] == epochs(0, 1, 2)


def test_unused_iterators_do_not_count() -> None:
    ours = loader()
    for _ in range(3):
        iter(ours)
    assert list(ours) == epochs(0)


def test_abandoned_iteration_leads_to_the_next_epoch() -> None:
    ours = loader()
    next(iter(ours))
    assert list(ours) == epochs(1)


@pytest.mark.parametrize("position", [1, 2, 3, 4])
def test_saved_position_counts_yielded_batches(position: int) -> None:
    ours = loader()
    list(ours)
    iterator = iter(ours)
    for _ in range(position):
        next(iterator)
    state = copy.deepcopy(ours.state_dict())
    resumed = loader()
    resumed.load_state_dict(state)
    rest = [batch for _ in range(1 if position == LENGTH else 2) for batch in resumed]
    assert rest == epochs(1, 2)[position:]


def test_progress_overrides_the_own_count() -> None:
    standing = iter([(5, 2), None, (9, 0)])
    ours = EpochLoader(batches, LENGTH, lambda: next(standing))
    assert list(ours) == [(5, 2), (5, 3)]
    assert list(ours) == epochs(6)
    assert list(ours) == epochs(9)


def test_progress_and_rank_without_a_trainer() -> None:
    assert fit_progress(None) is None
    assert rank_and_world(None) == (0, 1)


def test_default_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert resolve_seed(None) == 7 and resolve_seed(3) == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert resolve_seed(None) == 0

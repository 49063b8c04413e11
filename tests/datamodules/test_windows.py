"""Windows of a token sequence, and the pieces that processes read."""

import itertools

import numpy as np
import pytest

from datamodules import windows as win
from tests.datamodules.token_runs import (
    LENGTH,
)

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 16, 17, 100])
def test_consecutive_windows_cover_all_whole_windows(tokens: int) -> None:
    starts = win.consecutive_windows(tokens, LENGTH).tolist()
    assert starts == [s for s in range(0, tokens, LENGTH) if s + LENGTH < tokens]


@pytest.mark.parametrize("seed", range(5))
def test_aligned_windows_equal_the_greedy_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.random(400) < 0.15
    expected, at = [], 0
    while at + LENGTH < len(tokens):
        if tokens[at]:
            expected.append(at)
            at += LENGTH
        else:
            at += 1
    documents = np.flatnonzero(tokens)
    assert win.aligned_windows(documents, len(tokens), LENGTH).tolist() == expected
    assert win.aligned_windows(documents[:0], len(tokens), LENGTH).tolist() == []


def test_shuffling_depends_on_seed_and_epoch_alone() -> None:
    starts = np.arange(50) * 8
    orders = {
        (seed, epoch): win.shuffled(starts, seed, epoch).tolist()
        for seed in range(3)
        for epoch in range(3)
    }
    np.random.seed(9)
    assert all(win.shuffled(starts, *key).tolist() == order for key, order in orders.items())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert all(sorted(order) == starts.tolist() for order in orders.values())


@pytest.mark.parametrize(
    ("count", "pieces"), list(itertools.product([1, 2, 5, 6, 7, 12], [1, 2, 3, 5]))
)
def test_pieces_equal_tensor_split(count: int, pieces: int) -> None:
    parts = np.array_split(np.arange(count), pieces)
    for index, part in enumerate(parts):
        assert list(range(*win.piece(count, pieces, index))) == part.tolist()

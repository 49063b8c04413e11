"""Token shards that a small network learns in a moment."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import write_shard
from tests.models.nanogpt_runs import BOS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards in which each letter narrows the next one down, in many short documents."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, count in (("fineweb_train_000001", 30_000), ("fineweb_val_000000", 3_001)):
        letters = (97 + (np.cumsum(rng.integers(1, 4, count)) % 26)).astype(np.uint16)
        letters[rng.integers(0, count, count // 200)] = BOS
        letters[0] = BOS
        write_shard(folder / f"{name}.bin", letters)
    return folder

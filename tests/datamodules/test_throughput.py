"""How fast tokens are read: 20 times what a GPU's recipe takes, 500,000 a second."""

import time
from pathlib import Path

import numpy as np
import pytest

from datamodules import FineWebDataModule
from datamodules.shards import write_shard


@pytest.mark.slow
def test_loader_feeds_ten_million_tokens_a_second(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("fineweb_train_000001", 20_000_001), ("fineweb_val_000000", 2000)):
        write_shard(tmp_path / f"{name}.bin", rng.integers(0, 256, count).astype(np.uint16))
    data = FineWebDataModule(str(tmp_path), shards=1, tokenizer="bytes", shuffle=True)
    data.setup("fit")
    start = time.perf_counter()
    tokens = sum(inputs.numel() for inputs, _ in data.train_dataloader())
    speed = tokens / (time.perf_counter() - start)
    print(f"{speed / 1e6:.0f} million tokens a second")
    assert tokens == 20_000_000 // 524_288 * 524_288
    assert speed > 10e6

"""Small token shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.datamodules.token_runs import (
    make_text,
)


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    return tmp_path, *make_text(tmp_path)


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children cannot use the parent's thread pool
    yield
    torch.set_num_threads(threads)

"""A file of documents, encoded in small chunks."""

from pathlib import Path

import pytest

from datamodules.tokenizing import encoding
from tests.datamodules.tokenizing.texts import DOCUMENTS, write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "source.jsonl", DOCUMENTS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 500)

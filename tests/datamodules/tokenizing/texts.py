"""Small texts, and their tokens by definition."""

import gzip
import json
from pathlib import Path

from datamodules.files import LOCK
from datamodules.shards import Shard

BOS = 256


def document(index: int) -> str:
    return f"Document {index}: " + "é wörd " * (7 * index % 23)


DOCUMENTS = [document(index) for index in range(60)]


def expected_tokens(documents: list[str]) -> list[int]:
    """Return the byte tokens of documents, by definition."""
    return [token for text in documents if text for token in (BOS, *text.encode())]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


def all_tokens(paths: list[Path]) -> list[int]:
    return [token for path in paths for token in Shard(path).tokens.tolist()]

"""Encoding on several processes."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.tokenizing import (
    encoding,
    tokenize,
)
from tests.datamodules.tokenizing.texts import DOCUMENTS, contents


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_do_not_depend_on_the_number_of_processes(
    source: Path, tmp_path: Path, processes: int
) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 700}
    tokenize([source], tmp_path / "one", **options)
    tokenize([source], tmp_path / "many", processes=processes, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_few_documents_are_read_ahead(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def counted(*args: Any) -> Any:
        nonlocal read
        for text in DOCUMENTS * 50:
            read += 1
            yield text

    monkeypatch.setattr(encoding, "CHUNK", 1)  # a chunk is a document
    with encoding.encoded(counted(), "bytes", 2) as results:
        for index in range(1, 40):
            next(results)
            assert read <= index + 4


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    def run() -> None:
        with encoding.encoded(iter(DOCUMENTS * 100), "bytes", 2) as results:
            next(results)
            children = [child.pid for child in multiprocessing.active_children()]
            (tmp_path / "partial").write_text(json.dumps(children))
            (tmp_path / "partial").replace(tmp_path / "pids")
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    limit = time.monotonic() + 20
    while not (tmp_path / "pids").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    pids = json.loads((tmp_path / "pids").read_text())
    assert len(pids) == 2
    process.kill()
    process.join()
    while any(map(_alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(_alive, pids))

"""Text into shards: contents, killed and resumed runs, refused requests."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from datamodules.shards import Shard
from datamodules.tokenizing import MANIFEST, UsageError, encoding, tokenize
from tests.datamodules.processes import at_once
from tests.datamodules.tokenizing.texts import (
    DOCUMENTS,
    all_tokens,
    contents,
    expected_tokens,
    write_jsonl,
)


def test_shards_hold_the_documents_in_order(source: Path, tmp_path: Path) -> None:
    paths = tokenize([source], tmp_path / "out", "bytes", shard_tokens=1000, val_tokens=300)
    total = expected_tokens(DOCUMENTS)
    assert [path.name for path in paths[:3]] == [
        "text_val_000000.bin", "text_train_000001.bin", "text_train_000002.bin"
    ]  # fmt: skip
    assert [len(Shard(path)) for path in paths[:-1]] == [300] + [1000] * (len(paths) - 2)
    assert len(Shard(paths[-1])) == (len(total) - 300) % 1000
    assert all_tokens(paths) == total
    assert sorted(contents(tmp_path / "out")) == sorted([MANIFEST, *(p.name for p in paths)])


def test_whole_documents_are_held_out(source: Path, tmp_path: Path) -> None:
    val, *train = tokenize([source], tmp_path / "out", "bytes", val_documents=7)
    assert all_tokens([val]) == expected_tokens(DOCUMENTS[:7])
    assert all_tokens(train) == expected_tokens(DOCUMENTS[7:])


@pytest.mark.parametrize(("most", "expected"), [(10**6, "tenth"), (100, "most")])
def test_a_tenth_is_held_out_by_default(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: str
) -> None:
    monkeypatch.setattr(encoding, "VAL_TOKENS", most)
    paths = tokenize([source], tmp_path / "out", "bytes")
    total = expected_tokens(DOCUMENTS)
    assert len(Shard(paths[0])) == (len(total) // 10 if expected == "tenth" else 100)
    assert all_tokens(paths) == total and len(paths) == 2


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["abcdefg"], {"val_documents": 1}),
        (["abcdefg"], {"val_tokens": 8}),
        (["abcdefg"], {}),
        (["", ""], {}),
        ([], {"val_tokens": 2}),
    ],
)
def test_too_little_text_is_refused(
    tmp_path: Path, texts: list[str], options: dict[str, int]
) -> None:
    path = write_jsonl(tmp_path / "small.jsonl", texts)
    with pytest.raises(ValueError, match="the input is too small"):
        tokenize([path], tmp_path / "out", "bytes", **options)
    assert contents(tmp_path / "out") == {}


def killed(at: int, *args: Any, **options: Any) -> int:
    """Run ``tokenize`` in a process that kills itself at its n-th replacement of a file."""
    calls = iter(range(at))
    replace = Path.replace

    def replace_or_die(self: Path, target: Path) -> Path:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    def run() -> None:
        Path.replace = replace_or_die  # type: ignore[method-assign, assignment]
        tokenize(*args, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(30)
    return process.exitcode or 0


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_after_a_kill_anywhere(source: Path, tmp_path: Path, processes: int) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    tokenize([source], tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 10  # nine shards, each followed by the manifest, and that first and last
    for at in range(0, 20, 1 if processes == 1 else 5):
        folder = tmp_path / f"killed{at}"
        assert killed(at, [source], folder, processes=processes, **options) == -signal.SIGKILL
        assert contents(folder) != whole
        tokenize([source], folder, processes=processes, **options)
        assert contents(folder) == whole


def test_resume_keeps_finished_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    folder = tmp_path / "out"
    killed(7, [source], folder, **options)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")}
    encoded: list[str] = []
    original = encoding.encode_all

    def noted(documents: Any, tokenizer: Any) -> Any:
        encoded.extend(documents)
        return original(documents, tokenizer)

    monkeypatch.setattr(encoding, "encode_all", noted)
    paths = tokenize([source], folder, **options)
    kept = [p for p in paths if before.get(p.name) == p.stat().st_mtime_ns]
    assert kept == paths[:3]
    assert encoded == DOCUMENTS[-len(encoded) :] and 0 < len(encoded) < 50
    encoded.clear()
    assert tokenize([source], folder, **options) == paths and not encoded


@pytest.mark.parametrize("change", ["edit", "other folder"])
def test_resume_with_a_changed_input_is_refused(source: Path, tmp_path: Path, change: str) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    folder = tmp_path / "out"
    first = write_jsonl(tmp_path / "first.jsonl", ["unchanged"])
    killed(7, [first, source], folder, **options)
    before, size = contents(folder), source.stat().st_size
    if change == "other folder":
        (tmp_path / "new").mkdir()
        source = tmp_path / "new" / source.name
    write_jsonl(source, [text.replace("Document", "document") for text in DOCUMENTS])
    assert source.stat().st_size == size
    with pytest.raises(UsageError, match=r"were changed since \(source\.jsonl\): choose another"):
        tokenize([first, source], folder, **options)
    assert contents(folder) == before


def test_resume_with_moved_inputs(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    tokenize([source], tmp_path / "whole", **options)
    killed(7, [source], tmp_path / "out", **options)
    (tmp_path / "new").mkdir()
    tokenize([source.rename(tmp_path / "new" / source.name)], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_make_the_shards_once(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 300, "val_tokens": 200}
    tokenize([source], tmp_path / "whole", **options)
    at_once(lambda: tokenize([source], tmp_path / "out", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_damaged_shard_is_made_again(source: Path, tmp_path: Path, damage: str) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900}
    paths = tokenize([source], tmp_path / "out", **options)
    whole = contents(tmp_path / "out")
    if damage == "remove":
        paths[2].unlink()
    elif damage == "flip":
        content = bytearray(paths[2].read_bytes())
        content[-1] ^= 1
        paths[2].write_bytes(content)
    else:
        os.truncate(paths[2], 1100)
    tokenize([source], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == whole


def test_other_settings_need_another_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    tokenize([source], folder, "bytes")
    before = contents(folder)
    with pytest.raises(UsageError, match="made with shard_tokens=100000000, not 500: choose"):
        tokenize([source], folder, "bytes", shard_tokens=500)
    with pytest.raises(UsageError, match=r"other inputs.* \(source\.jsonl\): choose another"):
        tokenize([source, source], folder, "bytes")
    with pytest.raises(UsageError, match="was not made with GPT-2's tokenizer"):
        tokenize([folder / "text_train_000001.bin"], tmp_path / "new", "bytes")
    assert contents(folder) == before
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=f"{MANIFEST} is damaged: delete"):
        tokenize([source], folder, "bytes")
    (folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match=r"has other shards, text_train_000001\.bin"):
        tokenize([source], folder, "bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes must be a whole number of at least 1, got 0"),
        ({"shard_tokens": 1}, "shard_tokens must be a whole number of at least 2, got 1"),
        ({"val_tokens": 1}, "val_tokens must be a whole number of at least 2, got 1"),
        ({"val_documents": 0}, "val_documents must be a whole number of at least 1, got 0"),
        ({"val_documents": 1, "val_tokens": 5}, "give one of them"),
        ({"inputs": []}, "there are no inputs"),
        ({"inputs": [Path("nowhere.txt")]}, r"nowhere\.txt is no file"),
        ({"inputs": [Path(__file__)]}, r"only \.txt, \.jsonl, .* can be read"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"inputs": [source], "output": tmp_path / "out", **options}
    with pytest.raises(UsageError, match=message):
        tokenize(**arguments, tokenizer="bytes")
    assert not (tmp_path / "out").exists()


def test_manifest_that_an_editor_saved_with_a_byte_order_mark_is_read(
    source: Path, tmp_path: Path
) -> None:
    paths = tokenize([source], tmp_path / "out", "bytes")
    path = tmp_path / "out" / MANIFEST
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert tokenize([source], tmp_path / "out", "bytes") == paths


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"settings": [], "shards": [], "complete": true}']
)
def test_damaged_manifest_is_named(source: Path, tmp_path: Path, content: str) -> None:
    tokenize([source], tmp_path / "out", "bytes")
    (tmp_path / "out" / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=f"{MANIFEST} is damaged: delete"):
        tokenize([source], tmp_path / "out", "bytes")

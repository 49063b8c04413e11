"""Documents of every kind of file, and damaged files."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.shards import write_shard
from datamodules.tokenizers import GPT2Tokenizer
from datamodules.tokenizing import encoding, read_documents, tokenize
from tests.datamodules.tokenizing.texts import all_tokens, expected_tokens, write_jsonl


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("one file\nis one document", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "b.jsonl", ["first", "", "second"])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n")
    write_jsonl(tmp_path / "c.jsonl.gz", ["zipped"])
    table = pa.table({"text": ["row", None, "next row"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "d.parquet")
    names = ["d.parquet", "a.txt", "empty.txt", "c.jsonl.gz", "b.jsonl"]
    texts = ["row", "next row", "one file\nis one document", "zipped", "first", "second"]
    assert list(read_documents([tmp_path / name for name in names], "text")) == texts
    paths = tokenize([tmp_path / name for name in names], tmp_path / "out", "bytes")
    assert all_tokens(paths) == expected_tokens(texts)


class Letters(GPT2Tokenizer):
    """Decodes the tokens 0 to 25 as letters."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def test_gpt2_shards_are_decoded_across_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bos, texts = 50256, [*"abcdefghijkl", "mnop" * 5]
    tokens = [t for text in texts for t in (bos, *(ord(c) - ord("a") for c in text))]
    stream = np.array([24, 25, *tokens], np.uint16)  # goes on with a document of a shard before
    names = [tmp_path / f"gpt_{i}.bin" for i in range(3)]
    for path, part in zip(names, np.split(stream, [13, 30]), strict=True):
        write_shard(path, part)
    monkeypatch.setattr(encoding, "_cached_tokenizer", encoding.load_tokenizer)
    monkeypatch.setattr("datamodules.tokenizing.documents.GPT2Tokenizer", Letters)
    monkeypatch.setattr("datamodules.tokenizers.GPT2Tokenizer", Letters)
    paths = tokenize(names, tmp_path / "out", "bytes")
    assert all_tokens(paths) == expected_tokens(["yz", *texts])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2, is no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"tex\n', r"a\.jsonl, line 2, is no JSON \(.*\): mend it"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1"),
        ("a.txt", b"good \xff bad", r"a\.txt is no UTF-8 text, at byte 5"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet is damaged or no parquet file"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1, is no JSON"),
        ("a.jsonl.gz", b"not zipped", r"a\.jsonl\.gz is damaged or no gzip file, after line 0"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz is empty, which no gzip file is: replace"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is UTF-16 and no UTF-8 text: convert"),
        ("a.txt", "text".encode("utf-32"), r"a\.txt is UTF-32 and no UTF-8 text: convert"),
        ("a.txt", "text".encode("utf-16-le"), r"a\.txt has a NUL character, at byte 1: .* UTF-16"),
        (
            "a.jsonl",
            b'{"text": "\xe9"}\n',
            r"a\.jsonl, line 1, is no UTF-8 text, at byte 10: convert",
        ),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"line 1, is UTF-16 and no UTF-8 text"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), r"line 1, has a NUL .* UTF-16"),
        ("a.bin", b"not tokens", r"a\.bin is no token shard"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        tokenize([tmp_path / name], tmp_path / "out", "bytes")


def test_column_chooses_the_field(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["text of it"], "n": [1]}), tmp_path / "a.parquet")
    path = write_jsonl(tmp_path / "a.jsonl", ["and more"], field="body")
    both = [tmp_path / "a.parquet", path]
    tokens = all_tokens(tokenize(both, tmp_path / "out", "bytes", column="body", val_tokens=3))
    assert tokens == expected_tokens(["text of it", "and more"])
    with pytest.raises(ValueError, match="no column 'text' but body, n: give one"):
        tokenize(both, tmp_path / "other", "bytes")
    with pytest.raises(ValueError, match="column 'n' is no text"):
        tokenize(both[:1], tmp_path / "third", "bytes", column="n")


LINES = [f"the quick brown fox {number} {number * 977 % 7919}" for number in range(3000)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blot(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, blot])
def test_one_damaged_gzip_file_of_many_is_named(tmp_path: Path, damage: Any) -> None:
    paths = [write_jsonl(tmp_path / f"part{i}.jsonl.gz", LINES) for i in range(3)]
    damage(paths[1])
    with pytest.raises(ValueError, match=r"part1\.jsonl\.gz.*(after line|line) \d+.*leave it out"):
        tokenize(paths, tmp_path / "out", "bytes")


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("damage", [cut, blot])
def test_one_damaged_parquet_file_of_many_is_named(
    tmp_path: Path, damage: Any, compression: str
) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = [tmp_path / f"part{i}.parquet" for i in range(3)]
    for path in paths:
        parquet.write_table(pa.table({"text": LINES}), path, compression=compression)
    damage(paths[1])
    try:
        tokenize(paths, tmp_path / "out", "bytes")
    except ValueError as error:
        assert re.search(r"part1\.parquet is damaged .*after row \d+ .*leave it out", str(error))
    else:  # zeros are text too, where nothing is compressed and no checksum is written
        assert damage is blot and compression == "none"


def test_one_damaged_shard_of_many_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"part{i}.bin" for i in range(3)]
    for path in paths:
        write_shard(path, np.zeros(100, np.uint16))
    cut(paths[1])
    with pytest.raises(ValueError, match=r"part1\.bin is no token shard or a damaged one: delete"):
        tokenize(paths, tmp_path / "out", "bytes")


# --- byte order marks and line ends ---

MARK = "\ufeff"


def test_byte_order_marks_of_text_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{MARK}It was a dark night. ", encoding="utf-8")
    (tmp_path / "b.txt").write_text(f"{MARK}first\n{MARK}second", encoding="utf-8")
    (tmp_path / "c.txt").write_text(MARK, encoding="utf-8")
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    assert list(read_documents(paths, "text")) == ["It was a dark night. ", "first\nsecond"]


def test_byte_order_marks_of_json_lines_are_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", f"{MARK}two", "three")]
    content = f"{MARK}{lines[0]}\r\n{lines[1]}\n{MARK}{lines[2]}\n"
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert list(read_documents([tmp_path / "a.jsonl"], "text")) == ["one", "two", "three"]


def test_byte_order_marks_of_parquet_rows_are_left_out(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [f"{MARK}one", "two", MARK]}), tmp_path / "a.parquet")
    assert list(read_documents([tmp_path / "a.parquet"], "text")) == ["one", "two"]


def test_line_ends_of_text_files_become_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one\\r\\ntwo"}\n')
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert list(read_documents(paths, "text")) == ["one\ntwo\n", "one\r\ntwo"]

"""Token shards: the format, damaged files, reading across files."""

import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import Shard, Shards, write_shard

HEADER_BYTES = 1024


def raw(magic: int, version: int, count: int, tokens: list[int]) -> bytes:
    """Return the bytes of a shard, written by the definition of the format."""
    content = b"".join(t.to_bytes(2, "little") for t in tokens)
    entries = magic, version, count, zlib.crc32(content)
    return b"".join(n.to_bytes(4, "little") for n in entries).ljust(HEADER_BYTES, b"\0") + content


GOOD = raw(20240520, 1, 3, [7, 50256, 65535])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some_train_000001.bin"


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Write tokens 0 to 11 to files of 5, 1 and 6 tokens."""
    paths = [tmp_path / f"{i}.bin" for i in range(3)]
    for file, (first, last) in zip(paths, [(0, 5), (5, 6), (6, 12)], strict=True):
        write_shard(file, np.arange(first, last, dtype=np.uint16))
    return paths


def test_format_is_read_and_written(path: Path) -> None:
    path.write_bytes(GOOD)
    shard = Shard(str(path))
    assert len(shard) == 3 and shard.tokens.dtype == np.uint16
    assert shard.tokens.tolist() == [7, 50256, 65535]
    copy = path.with_name("copy.bin")
    write_shard(copy, shard.tokens)
    assert copy.read_bytes() == GOOD
    write_shard(copy, np.arange(10, dtype=np.uint16)[::3])  # not contiguous
    assert Shard(copy).tokens.tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no token shard or a damaged one"),
        (GOOD[:500], "no token shard or a damaged one"),
        (GOOD[:-1], "header says 3 tokens, and its size is that of 2.5"),
        (GOOD[:-4], "header says 3 tokens, and its size is that of 1:"),
        (GOOD + b"\0\0", "header says 3 tokens, and its size is that of 4:"),
        (GOOD[:HEADER_BYTES], "header says 3 tokens, and its size is that of 0:"),
        (raw(20240520, 1, 0, []), "holds no tokens"),
        (raw(20240521, 1, 1, [1]), "no token shard or a damaged one"),
        (raw(20240520, 2, 1, [1]), "version 2, and only version 1"),
        (b"P6 a picture" * 1000, "no token shard or a damaged one"),
    ],
)
def test_damaged_file_is_named(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Shard(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=path.name):
        Shard(path)


def test_failed_write_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(GOOD)

    def refuse(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, np.arange(5, dtype=np.uint16))
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == GOOD


def test_shard_without_a_checksum_is_read(path: Path) -> None:
    path.write_bytes(GOOD[:12] + bytes(4) + GOOD[16:])
    assert Shards([path], 65536).read(0, 3).tolist() == [7, 50256, 65535]


def damage(content: bytes, random: np.random.Generator) -> bytes:
    """Return a file as a bad disk, copy or editor leaves it."""
    changed = bytearray(content)
    place, size = random.integers(len(content)), random.integers(1, 600)
    kind = random.integers(6)
    if kind == 0:
        changed[place] ^= 1 << random.integers(8)
    elif kind == 1:
        changed[place : place + size] = bytes(len(changed[place : place + size]))
    elif kind == 2:
        del changed[place:]
    elif kind == 3:
        del changed[place : place + size]
    elif kind == 4:
        changed[place:place] = random.bytes(size)
    else:
        other = random.integers(len(content))
        changed[place : place + size] = content[other : other + size]
    return bytes(changed)


def assert_damage_is_found(path: Path, count: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, 700).astype(np.uint16)
    write_shard(path, tokens)
    content, random = path.read_bytes(), np.random.default_rng(2)
    for _ in range(count):
        path.write_bytes(damage(content, random))
        try:
            read = Shards([path], 256).read(0, 700)
        except (ValueError, IndexError) as error:
            assert str(path) in str(error)
        else:  # zeros behind the header's entries, or nothing changed
            assert np.array_equal(read, tokens)


def test_damaged_shards_are_named(path: Path) -> None:
    assert_damage_is_found(path, 100)


@pytest.mark.slow
def test_two_thousand_damaged_shards_are_named(path: Path) -> None:
    assert_damage_is_found(path, 2000)


def test_every_range_is_read_across_files(three: list[Path]) -> None:
    shards = Shards(three, vocab_size=12)
    assert len(shards) == 12
    for start in range(12):
        for length in range(1, 13 - start):
            read = shards.read(start, length)
            assert read.dtype == np.uint16
            assert read.tolist() == list(range(start, start + length))
    for start, length in ((-1, 2), (0, 13), (12, 1), (3, 0)):
        with pytest.raises(IndexError):
            shards.read(start, length)


def test_find_returns_every_position(tmp_path: Path) -> None:
    tokens = np.array([9, 1, 9, 9, 2, 9], np.uint16)
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    write_shard(paths[0], tokens[:3])
    write_shard(paths[1], tokens[3:])
    assert Shards(paths, 10).find(9).tolist() == [0, 2, 3, 5]
    assert Shards(paths, 10).find(8).tolist() == []


def test_find_returns_positions_in_every_chunk(tmp_path: Path) -> None:
    tokens = np.zeros((1 << 23) + 10, np.uint16)
    places = [0, (1 << 22) - 1, 1 << 22, (1 << 23) + 9]
    tokens[places] = 5
    write_shard(tmp_path / "a.bin", tokens)
    assert Shards([tmp_path / "a.bin"], 6).find(5).tolist() == places


def test_token_outside_of_the_vocabulary_is_named(three: list[Path]) -> None:
    shards = Shards(three, vocab_size=11)
    assert shards.read(0, 11).max() == 10
    with pytest.raises(ValueError, match="holds token 11, and the vocabulary has 11") as caught:
        shards.read(2, 10)
    assert str(three[2]) in str(caught.value)


@pytest.mark.parametrize("change", ["truncate", "empty", "touch", "replace", "remove"])
def test_change_while_in_use_is_found_before_reading(three: list[Path], change: str) -> None:
    shards = Shards(three, 100)
    assert shards.read(6, 6).tolist() == [6, 7, 8, 9, 10, 11]
    path = three[2]
    if change == "truncate":  # reading the map would now kill the process
        os.truncate(path, 1030)
    elif change == "empty":
        os.truncate(path, 0)
    elif change == "touch":
        os.utime(path, ns=(0, 0))
    elif change == "replace":
        status = path.stat()
        write_shard(path, np.zeros(6, np.uint16))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path.unlink()
    assert shards.read(0, 6).tolist() == [0, 1, 2, 3, 4, 5]  # the other files still are right
    with pytest.raises(RuntimeError, match="changed or removed while it was in use") as caught:
        shards.read(5, 2)
    assert str(path) in str(caught.value)


def test_copy_for_another_process_holds_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    write_shard(path, np.arange(50_000, dtype=np.uint16))
    shards = Shards([path], 65536)
    pickled = pickle.dumps(shards)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert isinstance(copy.shards[0].tokens, np.memmap)
    assert np.array_equal(copy.read(0, 50_000), shards.read(0, 50_000))
    write_shard(path, np.zeros(50_000, np.uint16))
    with pytest.raises(RuntimeError, match="changed or removed"):
        pickle.loads(pickled)

"""Token shards: files of tokens in the format of FineWeb's GPT-2 versions and modded-nanogpt.

A shard is a header of 256 little-endian int32 (magic number, version, number of tokens, CRC-32 of
the tokens, zeros) and then that many tokens, little-endian uint16. Shards made elsewhere have 0 for
the checksum; downloaded ones get it in a file of its own. ``Shards`` makes several one sequence.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.files import whole_file

Tokens = NDArray[np.uint16]
Split = Literal["train", "val"]

MAGIC, VERSION = 20240520, 1
HEADER = np.dtype("<i4"), 256
HEADER_BYTES = 4 * 256
TOKEN = np.dtype("<u2")
REMEDY = "delete it, then make or download it again"


class Shard:
    """One shard, memory-mapped; its header is checked when it is opened.

    Attributes:
        path: The file.
        tokens: The file's tokens, uint16 (n,), not checked; ``read`` checks them.
        checksum: CRC-32 of the tokens by the header or by the file beside the shard; 0: none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no shard, is empty or has another length than its header says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._identity = _identity(self.path)
        size = self._identity[0]
        header = np.fromfile(self.path, *HEADER) if size >= HEADER_BYTES else None
        if header is None or header[0] != MAGIC:
            raise ValueError(f"{self.path} is no token shard or a damaged one: {REMEDY}")
        if header[1] != VERSION:
            raise ValueError(
                f"{self.path} is a token shard of version {header[1]}, and only version {VERSION} "
                "can be read: make it again"
            )
        count = (size - HEADER_BYTES) / TOKEN.itemsize
        if header[2] != count:
            raise ValueError(
                f"{self.path} is damaged: its header says {header[2]} tokens, and its size is that "
                f"of {count:g}: {REMEDY}"
            )
        if not count:
            raise ValueError(f"{self.path} holds no tokens: {REMEDY}")
        self.checksum = int(header[3]) & 0xFFFFFFFF or _recorded_checksum(self.path)
        self._verified = False
        self.tokens = self._map()

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Tokens:
        """Return the tokens of a range; the first call reads and verifies all.

        Raises:
            RuntimeError: If the file was changed since it was opened.
            ValueError: If the tokens are not those of the checksum.
        """
        self.check_unchanged()
        self.verify()
        return self.tokens[start:stop]

    def verify(self) -> None:
        """Raise a ValueError if the tokens are not those of the checksum; computed once."""
        if not self._verified and self.checksum and zlib.crc32(self.tokens.data) != self.checksum:
            raise ValueError(f"{self.path} is damaged: its checksum differs: {REMEDY}")
        self._verified = True

    def check_unchanged(self) -> None:
        """Raise a RuntimeError if the file is not the one that was opened.

        Reading a memory map beyond the end of a truncated file would kill the process.
        """
        try:
            same = _identity(self.path) == self._identity
        except FileNotFoundError:
            same = False
        if not same:
            raise RuntimeError(
                f"{self.path} was changed or removed while it was in use: start again, and if its "
                "tokens differ now, from a checkpoint made before the change"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process maps the file itself.
        return {name: value for name, value in vars(self).items() if name != "tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.check_unchanged()
        self.tokens = self._map()

    def _map(self) -> Tokens:
        return np.memmap(self.path, TOKEN, mode="r", offset=HEADER_BYTES)


class Shards:
    """Several shards as one sequence of tokens, each below ``vocab_size``; see ``Shard``."""

    def __init__(self, paths: Sequence[str | Path], vocab_size: int) -> None:
        self.shards = [Shard(path) for path in paths]
        self.vocab_size = vocab_size
        # Start of each shard, and end of the last one.
        self.edges = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.edges[-1])

    def read(self, start: int, length: int) -> Tokens:
        """Read consecutive tokens, at least one, across the edges of shards: uint16 (length,).

        Raises:
            IndexError: If the positions are outside of the shards.
            RuntimeError: If a file was changed meanwhile.
            ValueError: If a shard is damaged or has a token outside of the vocabulary.
        """
        if not 0 <= start < start + length <= len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        index = int(np.searchsorted(self.edges, start, side="right")) - 1
        end = start + length
        parts = []
        while start < end:
            shard, edge = self.shards[index], int(self.edges[index])
            part = shard.read(start - edge, end - edge)
            if part.max() >= self.vocab_size:
                raise ValueError(
                    f"{shard.path} holds token {part.max()}, and the vocabulary has "
                    f"{self.vocab_size}: was it made with another tokenizer?"
                )
            parts.append(part)
            start, index = start + len(part), index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def find(self, token: int) -> NDArray[np.int64]:
        """Return all positions of one token; reads everything, about 1 GB a second from memory."""
        chunk = 1 << 22  # tokens, few enough to stay in the processor's cache
        positions = [
            start + np.flatnonzero(self.read(start, min(chunk, len(self) - start)) == token)
            for start in range(0, len(self), chunk)
        ]
        return np.concatenate(positions)


def write_shard(path: Path, tokens: Tokens) -> int:
    """Write a shard into an existing folder, whole or not at all; return its checksum."""
    content = np.ascontiguousarray(tokens, TOKEN)
    checksum = zlib.crc32(content.data)
    header = np.zeros(HEADER[1], HEADER[0])
    header[:3] = MAGIC, VERSION, len(tokens)
    header[3:4].view("<u4")[:] = checksum
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(header.tobytes())
        file.write(content.data)
    return checksum


def record_checksum(path: Path) -> None:
    """Write the checksum of a shard that has none in its header into a file beside it."""
    with whole_file(_checksum_file(path)) as partial:
        partial.write_text(f"{zlib.crc32(Shard(path).tokens.data):08x}\n")


def _recorded_checksum(path: Path) -> int:
    file = _checksum_file(path)
    try:
        return int(file.read_text(), 16) if file.is_file() else 0
    except ValueError:
        raise ValueError(f"{file} is damaged: delete it") from None


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.crc32")


def _identity(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino

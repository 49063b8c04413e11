"""The documents of text files, JSON lines, parquet files and GPT-2 shards, in order.

An error names the file, the line or row where there is one, and what to do.
"""

import codecs
import gzip
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from datamodules.shards import Shards, Tokens
from datamodules.tokenizers import GPT2Tokenizer

Document = str | Tokens  # tokens are GPT-2's
Note = Callable[[float], object]  # is told the share of a file that was read
Read = Callable[[Path, str, Note], Iterator[Document]]

BYTE_ORDER_MARK = "\ufeff"
OTHER_ENCODINGS = {  # UTF-32 first: its little-endian mark starts with UTF-16's
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
REMEDY = "replace the file or leave it out"
CONVERT = "convert it to UTF-8 or leave it out"


def decode(data: bytes, place: str) -> str:
    """Decode UTF-8; otherwise raise a ValueError that names the place and the likely encoding."""
    for encoding, marks in OTHER_ENCODINGS.items():
        if data.startswith(marks):
            raise ValueError(f"{place} is {encoding} and no UTF-8 text: {CONVERT}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is no UTF-8 text, at byte {error.start}: {CONVERT}") from None
    if "\0" in text:  # valid UTF-8, and what UTF-16 without a mark looks like
        raise ValueError(
            f"{place} has a NUL character, at byte {data.index(0)}: it is binary, damaged or "
            f"UTF-16; {CONVERT}"
        )
    return text


def read_text(path: Path, column: str, note: Note) -> Iterator[str]:
    """Yield a whole file as one document, with line feeds as line ends.

    Byte order marks are left out, also those in the middle of concatenated files.
    """
    text = decode(path.read_bytes(), str(path))
    yield text.replace(BYTE_ORDER_MARK, "").replace("\r\n", "\n")


def read_json_lines(path: Path, column: str, note: Note) -> Iterator[str]:
    """Yield the field ``column`` of each line's JSON object."""
    for number, line in _numbered_lines(path, note):
        if line.isspace():
            continue
        content = decode(line, f"{path}, line {number},").removeprefix(BYTE_ORDER_MARK)
        try:
            entry = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}, is no JSON ({_one_line(error)}): mend it, or {REMEDY}"
            ) from None
        text = entry.get(column) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, line {number}, is no JSON object with a text {column!r}: give the "
                "field's name by --column"
            )
        yield text


def _numbered_lines(path: Path, note: Note) -> Iterator[tuple[int, bytes]]:
    zipped, size = path.suffix == ".gz", path.stat().st_size
    if zipped and not size:
        raise ValueError(f"{path} is empty, which no gzip file is: {REMEDY}")
    number = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if zipped else raw as file:
            for number, line in enumerate(file, 1):
                yield number, line
                note(raw.tell() / size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is damaged or no gzip file, after line {number} ({_one_line(error)}): {REMEDY}"
        ) from None


def read_parquet(path: Path, column: str, note: Note) -> Iterator[str]:
    """Yield each row's ``column``; rows without a text are left out."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "parquet files are read with pyarrow, which is not installed: pip install pyarrow, or "
            "install lit_fanions with its extra 'zoo'"
        ) from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(
                    f"{path} has no column {column!r} but {', '.join(file.schema_arrow.names)}: "
                    "give one of them by --column"
                )
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                texts = batch.column(0).to_pylist()
                if not all(text is None or isinstance(text, str) for text in texts):
                    raise ValueError(f"{path}: column {column!r} is no text: give one by --column")
                yield from (text for text in texts if text is not None)
                row += len(texts)
                note(row / max(1, file.metadata.num_rows))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or no parquet file, after row {row} ({_one_line(error)}): {REMEDY}"
        ) from None


def read_shards(paths: Sequence[Path], note: Note) -> Iterator[Tokens]:
    """Yield the documents of GPT-2 shards, which may continue from one shard to the next."""
    tokenizer = GPT2Tokenizer()
    shards = Shards(paths, tokenizer.vocab_size)
    step, unfinished = 1 << 22, [np.empty(0, np.uint16)]
    for start in range(0, len(shards), step):
        tokens = shards.read(start, min(step, len(shards) - start))
        first, *others = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos))
        unfinished.append(first)
        for part in others:
            yield np.concatenate(unfinished)
            unfinished = [part[1:]]
        note(min(1.0, (start + step) / len(shards)))
    yield np.concatenate(unfinished)


READERS: dict[str, Read] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".parquet": read_parquet,
}
SUFFIXES = (*READERS, ".bin")


def read_documents(
    paths: Sequence[Path], column: str, note: Note = lambda size: None
) -> Iterator[Document]:
    """Yield the documents of all files in order, without empty ones and leading byte order marks.

    Args:
        paths: Files with one of ``SUFFIXES``.
        column: Field of JSON lines, or column of parquet files, that holds the text.
        note: Called with the bytes of the files that were read.
    """
    remaining, before = deque(paths), 0
    while remaining:
        path = remaining.popleft()
        run = [path]
        while path.suffix == ".bin" and remaining and remaining[0].suffix == ".bin":
            run.append(remaining.popleft())
        size = sum(each.stat().st_size for each in run)

        def note_share(share: float, before: int = before, size: int = size) -> None:
            note(before + share * size)

        documents: Iterator[Document]
        if path.suffix == ".bin":
            documents = read_shards(run, note_share)
        else:
            documents = READERS[suffix(path)](path, column, note_share)
        before += size
        for document in documents:
            if isinstance(document, str):  # the text of a file may have been copied with its mark
                document = document.removeprefix(BYTE_ORDER_MARK)
            if len(document):
                yield document


def suffix(path: Path) -> str:
    """Return which of ``SUFFIXES`` a file has, or an empty string."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Text files into token shards, by several processes, the same ones on any number of them.

Documents are read in order, encoded in chunks that come back in order, and cut into shards: first
one for validation, then those to train on. A manifest beside the shards says after each of them
where in the input the next one starts, so that a run that was killed goes on there.
"""

import gzip
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datamodules.shards import Shard, Shards, Tokens, write_shard
from datamodules.tokenizers import GPT2Tokenizer, Tokenizer, TokenizerName, load_tokenizer

Document = str | Tokens  # tokens are GPT-2's
Read = Callable[[Path, str], Iterator[Document]]

MANIFEST = "tokenize.json"
VAL_TOKENS = 20 * 524288 + 1  # as many targets as the recipes evaluate on, by default
CHUNK = 1 << 20  # characters or so that a process encodes at once


class UsageError(ValueError):
    """What was asked for is not possible; nothing was done."""


# --- documents ---


def read_text(path: Path, column: str) -> Iterator[str]:
    """A whole file is one document."""
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text, at byte {error.start}: convert it") from None


def read_json_lines(path: Path, column: str) -> Iterator[str]:
    """Each line is a JSON object; its field ``column`` is a document."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, KeyError, TypeError, IndexError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}, is no JSON object with a text {column!r}: give the "
                    "field's name by --column"
                )
            yield text


def read_parquet(path: Path, column: str) -> Iterator[str]:
    """Each row's ``column`` is a document; rows without one are left out."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "parquet files are read with pyarrow, which is not installed: pip install pyarrow, or "
            "install lit_fanions with its extra 'zoo'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or no parquet file: {error}") from None
    with file:
        if column not in file.schema_arrow.names:
            raise ValueError(
                f"{path} has no column {column!r} but {', '.join(file.schema_arrow.names)}: give "
                "one of them by --column"
            )
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            texts = batch.column(0).to_pylist()
            if not all(text is None or isinstance(text, str) for text in texts):
                raise ValueError(f"{path}: column {column!r} is no text: give one by --column")
            yield from (text for text in texts if text is not None)


def read_shards(paths: Sequence[Path]) -> Iterator[Tokens]:
    """The documents of GPT-2 shards, which may go on from one shard to the next."""
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
    yield np.concatenate(unfinished)


READERS: dict[str, Read] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".parquet": read_parquet,
}
SUFFIXES = (*READERS, ".bin")


def read_documents(paths: Sequence[Path], column: str) -> Iterator[Document]:
    """All documents of all files in order, but empty ones."""
    remaining = deque(paths)
    while remaining:
        path = remaining.popleft()
        documents: Iterator[Document]
        if path.suffix == ".bin":
            run = [path]
            while remaining and remaining[0].suffix == ".bin":
                run.append(remaining.popleft())
            documents = read_shards(run)
        else:
            documents = READERS[_suffix(path)](path, column)
        yield from (document for document in documents if len(document))


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


# --- encoding ---


def encode_all(documents: Sequence[Document], tokenizer: TokenizerName) -> list[Tokens]:
    """Encode documents; each result starts with the token that starts documents."""
    target = _tokenizer(tokenizer)
    source = _tokenizer("gpt2")
    texts = (d if isinstance(d, str) else source.decode(d) for d in documents)
    start = np.array([target.bos], np.uint16)
    return [np.concatenate([start, target.encode(text)]) for text in texts]


@lru_cache
def _tokenizer(name: TokenizerName) -> Tokenizer:
    return load_tokenizer(name)  # once per process


def chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents until they are worth a trip to another process."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def encoded(
    documents: Iterable[Document], tokenizer: TokenizerName, processes: int
) -> Iterator[Iterator[Tokens]]:
    """Encode documents on several processes; gives the results in order, few of them at a time."""
    encode = partial(encode_all, tokenizer=tokenizer)
    if processes == 1:
        yield (tokens for chunk in chunked(documents) for tokens in encode(chunk))
        return
    pool = ProcessPoolExecutor(processes, initializer=_obey_parent, initargs=(os.getpid(),))

    def results() -> Iterator[Tokens]:
        chunks = chunked(documents)
        pending: deque[Future[list[Tokens]]] = deque()
        while True:
            for chunk in islice(chunks, 2 * processes - len(pending)):
                pending.append(pool.submit(encode, chunk))
            if not pending:
                return
            yield from pending.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _obey_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- shards ---


class TokenStream:
    """Documents as one sequence that is taken away from the front.

    Args:
        documents: Encoded documents.
        document: Number of the first of them.
        offset: How many of its tokens were taken before.
    """

    def __init__(self, documents: Iterator[Tokens], document: int = 0, offset: int = 0) -> None:
        self._documents = documents
        self._ahead: deque[Tokens] = deque()
        self._length = 0
        self.document, self.offset = document, 0
        if offset:
            self.take(offset)

    def look_ahead(self, count: int) -> int:
        """The number of tokens there are, or ``count`` if there are as many."""
        while self._length < count:
            document = next(self._documents, None)
            if document is None:
                break
            self._ahead.append(document)
            self._length += len(document)
        return min(self._length, count)

    def take(self, count: int) -> Tokens:
        """Take ``count`` tokens, or as many as there are: uint16 (n,)."""
        taken = np.empty(count, np.uint16)
        filled = 0
        while filled < count and self.look_ahead(1):
            first = self._ahead[0]
            part = first[: count - filled]
            taken[filled : filled + len(part)] = part
            filled += len(part)
            self._length -= len(part)
            if len(part) < len(first):
                self._ahead[0] = first[len(part) :]
                self.offset += len(part)
            else:
                self._ahead.popleft()
                self.document, self.offset = self.document + 1, 0
        return taken[:filled]

    def take_documents(self, count: int) -> Tokens:
        """Take the rest of the first document and further ones, ``count`` together."""
        taken = []
        for _ in range(count):
            if not self.look_ahead(1):
                break
            taken.append(self.take(len(self._ahead[0])))
        return np.concatenate(taken) if taken else np.empty(0, np.uint16)


def take_validation(
    stream: TokenStream, val_tokens: int | None, val_documents: int | None
) -> Tokens:
    """Take what is held out: that many tokens or documents, by default a tenth, at most VAL_TOKENS.

    Raises:
        ValueError: If too little is left to train on.
    """
    if val_documents is not None:
        held_out = stream.take_documents(val_documents)
    else:
        tenth = stream.look_ahead(10 * VAL_TOKENS) // 10
        held_out = stream.take(min(tenth, VAL_TOKENS) if val_tokens is None else val_tokens)
    if len(held_out) < 2 or stream.look_ahead(2) < 2:
        raise ValueError(
            f"the input is too small: {len(held_out)} tokens were to be held out for validation, "
            f"and {stream.look_ahead(2)} would be left to train on"
        )
    return held_out


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: TokenizerName = "gpt2",
    processes: int = 1,
    shard_tokens: int = 100_000_000,
    val_tokens: int | None = None,
    val_documents: int | None = None,
    column: str = "text",
    progress: bool = False,
) -> list[Path]:
    """Make token shards of text, a validation shard first; goes on where a killed run stopped.

    It goes on only with the same settings and inputs, which are known by name, size and time of the
    last change: they may be moved, but not edited, nor copied without keeping that time.

    Args:
        inputs: Files in the order of the tokens: .txt, .jsonl, .jsonl.gz, .parquet, or .bin with
            GPT-2's tokens.
        output: Folder of the shards.
        tokenizer: What to encode with.
        processes: How many encode; the shards do not depend on it.
        shard_tokens: Of a training shard; the last one is shorter.
        val_tokens: Of the validation shard; None: a tenth of all, at most VAL_TOKENS.
        val_documents: Of the validation shard, instead of val_tokens.
        column: Field of JSON lines, or column of parquet files, that holds the text.
        progress: Show a bar on a terminal.

    Returns:
        The shards' paths.

    Raises:
        UsageError: If the arguments or the folder do not allow it.
        ValueError: If an input is damaged or has too little text.
    """
    _check(inputs, output, tokenizer, processes, shard_tokens, val_tokens, val_documents)
    settings = {
        "inputs": [_identity(path) for path in inputs],
        "tokenizer": tokenizer,
        "shard_tokens": shard_tokens,
        "val_tokens": val_tokens,
        "val_documents": val_documents,
        "column": column,
    }
    output.mkdir(parents=True, exist_ok=True)
    shards, complete = _load_manifest(output, settings)
    for stale in output.glob("*.partial"):  # of a run that was killed while it wrote
        stale.unlink()
    position = {"document": 0, "offset": 0, **(shards[-1] if shards else {})}
    documents = islice(read_documents(inputs, column), position["document"], None)
    if not complete:
        with (
            tqdm(unit=" tokens", unit_scale=True, disable=None if progress else True) as bar,
            encoded(documents, tokenizer, processes) as tokens,
        ):
            bar.update(sum(shard["tokens"] for shard in shards))
            counted = (document for document in tokens if bar.update(len(document)) or True)
            stream = TokenStream(counted, position["document"], position["offset"])
            while True:
                if shards:
                    content = stream.take(shard_tokens)
                else:
                    content = take_validation(stream, val_tokens, val_documents)
                if not len(content):
                    break
                if not shards:  # from now on the folder is ours
                    _save_manifest(output, settings, shards, complete=False)
                name = f"text_{'train' if shards else 'val'}_{len(shards):06d}.bin"
                write_shard(output / name, content)
                position = {"document": stream.document, "offset": stream.offset}
                shards.append({"name": name, "tokens": len(content), **position})
                _save_manifest(output, settings, shards, complete=False)
        _save_manifest(output, settings, shards, complete=True)
    return [output / shard["name"] for shard in shards]


def _check(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: TokenizerName,
    processes: int,
    shard_tokens: int,
    val_tokens: int | None,
    val_documents: int | None,
) -> None:
    for path in inputs:
        if not path.is_file():
            raise UsageError(f"{path} is no file: name the files, such as {path}/*.parquet")
        if not _suffix(path):
            raise UsageError(f"{path}: only {', '.join(SUFFIXES)} can be read")
        if path.suffix == ".bin" and made_with(path.parent) not in (None, "gpt2"):
            raise UsageError(f"{path} was not made with GPT-2's tokenizer: give the text itself")
    if not inputs:
        raise UsageError("there are no inputs: name files")
    if val_tokens is not None and val_documents is not None:
        raise UsageError("val_tokens and val_documents: give one of them")
    load_tokenizer(tokenizer)
    numbers = {
        "processes": (processes, 1),
        "shard_tokens": (shard_tokens, 2),
        "val_tokens": (val_tokens, 2),
        "val_documents": (val_documents, 1),
    }
    for name, (number, least) in numbers.items():
        if number is not None and number < least:
            raise UsageError(f"{name}={number}: it must be at least {least}")


# --- the manifest ---


def _identity(path: Path) -> list[str | int]:
    # Neither a digest, which takes as long as reading everything, nor the folder: that of a disk
    # may change from machine to machine.
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        assert manifest["settings"].keys() and isinstance(manifest["shards"], list)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UsageError(f"{path} is damaged: delete {folder} and start again") from None
    return manifest


def made_with(folder: Path) -> str | None:
    """The tokenizer whose tokens ``tokenize`` wrote into a folder; None: it did not."""
    manifest = _read_manifest(folder)
    return manifest["settings"].get("tokenizer") if manifest else None


def _load_manifest(folder: Path, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """What was done before with the same settings: the intact shards, and whether that is all."""
    manifest = _read_manifest(folder)
    if manifest is None:
        strangers = sorted(folder.glob("*_train_*.bin")) + sorted(folder.glob("*_val_*.bin"))
        if strangers:
            raise UsageError(f"{folder} has other shards, {strangers[0].name}: choose another one")
        return [], False
    saved = manifest["settings"]
    other = [name for name in settings if saved.get(name) != settings[name]]
    if "inputs" in other:
        raise UsageError(
            f"{folder} was made with other inputs, or ones that were changed since "
            f"({_first_difference(saved.get('inputs'), settings['inputs'])}): choose another "
            "folder, or delete it"
        )
    if other:
        raise UsageError(
            f"{folder} was made with {other[0]}={saved.get(other[0])}, not {settings[other[0]]}: "
            "choose another folder, or delete it"
        )
    intact = []
    for shard in manifest["shards"]:
        try:
            if len(Shard(folder / shard["name"])) != shard["tokens"]:
                break
        except (OSError, ValueError):
            break
        intact.append(shard)
    return intact, manifest["complete"] and len(intact) == len(manifest["shards"])


def _first_difference(saved: list[list[Any]] | None, inputs: list[list[Any]]) -> str:
    """The name of the first input that is another one, or none any more."""
    pairs = zip_longest(saved or [], inputs)
    return next(str((now or before)[0]) for before, now in pairs if before != now)


def _save_manifest(
    folder: Path, settings: dict[str, Any], shards: list[dict[str, Any]], complete: bool
) -> None:
    path = folder / MANIFEST
    temporary = path.with_suffix(".partial")
    manifest = {"settings": settings, "shards": shards, "complete": complete}
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.replace(path)

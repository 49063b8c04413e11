"""Encoding documents on several processes, with the results in order."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice

import numpy as np

from datamodules.shards import Tokens
from datamodules.tokenizers import Tokenizer, TokenizerName, load_tokenizer
from datamodules.tokenizing.documents import Document

CHUNK = 1 << 20  # characters, roughly, that a process encodes at once


def encode_all(documents: Sequence[Document], tokenizer: TokenizerName) -> list[Tokens]:
    """Encode documents; each result starts with the token that starts documents."""
    target = _cached_tokenizer(tokenizer)
    source = _cached_tokenizer("gpt2")
    texts = (d if isinstance(d, str) else source.decode(d) for d in documents)
    start = np.array([target.bos], np.uint16)
    return [np.concatenate([start, target.encode(text)]) for text in texts]


@lru_cache
def _cached_tokenizer(name: TokenizerName) -> Tokenizer:
    return load_tokenizer(name)  # loaded once per process


def chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into chunks that are worth sending to another process."""
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
    """Give an iterator of encoded documents in order, with few of them in memory at a time."""
    encode = partial(encode_all, tokenizer=tokenizer)
    if processes == 1:
        yield (tokens for chunk in chunked(documents) for tokens in encode(chunk))
        return
    pool = ProcessPoolExecutor(processes, initializer=_follow_parent, initargs=(os.getpid(),))

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


def _follow_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

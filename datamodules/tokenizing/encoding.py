"""Documents as one sequence of tokens: encoded on several processes, cut from the front."""

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
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing.documents import Document

CHUNK = 1 << 20  # characters, roughly, that a process encodes at once
VAL_TOKENS = 20 * 524288 + 1  # by default, as many targets as the recipes evaluate on


def encode_all(documents: Sequence[Document], tokenizer: TokenizerName) -> list[Tokens]:
    """Encode documents; each result starts with the token that starts documents."""
    target = _cached_tokenizer(tokenizer)
    source = _cached_tokenizer("gpt2")
    texts = (d if isinstance(d, str) else source.decode(d) for d in documents)
    start = np.array([target.bos], np.uint16)
    return [np.concatenate([start, target.encode(text)]) for text in texts]


_cached_tokenizer = lru_cache(load_tokenizer)  # once per process


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


class TokenStream:
    """Documents as one sequence of tokens, taken from the front.

    Args:
        documents: Encoded documents.
        document: Number of the first of them.
        offset: Number of its tokens that were taken before.
    """

    def __init__(self, documents: Iterator[Tokens], document: int = 0, offset: int = 0) -> None:
        self._documents = documents
        self._ahead: deque[Tokens] = deque()
        self._length = 0
        self.document, self.offset = document, 0
        if offset:
            self.take(offset)

    def look_ahead(self, count: int) -> int:
        """Return how many tokens are left, or ``count`` if there are at least as many."""
        while self._length < count:
            document = next(self._documents, None)
            if document is None:
                break
            self._ahead.append(document)
            self._length += len(document)
        return min(self._length, count)

    def take(self, count: int) -> Tokens:
        """Take ``count`` tokens, or as many as are left: uint16 (n,)."""
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
        """Take ``count`` documents, the rest of an already started one included: uint16 (n,)."""
        taken = []
        for _ in range(count):
            if not self.look_ahead(1):
                break
            taken.append(self.take(len(self._ahead[0])))
        return np.concatenate(taken) if taken else np.empty(0, np.uint16)


def take_validation(
    stream: TokenStream, val_tokens: int | None, val_documents: int | None
) -> Tokens:
    """Take the tokens that are held out for validation, see ``tokenize``.

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

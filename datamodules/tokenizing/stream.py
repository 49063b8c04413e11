"""Encoded documents as one sequence of tokens, cut from the front."""

from collections import deque
from collections.abc import Iterator

import numpy as np

from datamodules.shards import Tokens

VAL_TOKENS = 20 * 524288 + 1  # by default, as many targets as the recipes evaluate on


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
    """Take the tokens that are held out for validation.

    Args:
        stream: All tokens.
        val_tokens: Number of tokens; None: a tenth of all, at most VAL_TOKENS.
        val_documents: Number of documents, instead of val_tokens.

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

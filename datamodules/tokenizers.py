"""The two tokenizers: bytes, and GPT-2's byte pairs."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.shards import Tokens
from lit_fanions.checks import check_choice

TokenizerName = Literal["gpt2", "bytes"]
IDs = Sequence[int] | NDArray[Any] | Tensor

DOCUMENT_START = "<|endoftext|>"  # OpenAI's name of the token between documents


class Tokenizer(Protocol):
    """Turns text into tokens and back; every document starts with the token ``bos``."""

    name: TokenizerName
    vocab_size: int
    bos: int

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a text, uint16 (n,), never with ``bos``."""

    def decode(self, ids: IDs) -> str:
        """Return the text of tokens, (n,); invalid UTF-8 is U+FFFD, ``bos`` is <|endoftext|>."""

    def token_bytes(self) -> Tensor:
        """Return how many bytes of text each token is, 0 for ``bos``: int64 (vocab_size,)."""


class ByteTokenizer:
    """UTF-8: tokens 0 to 255 are the bytes, 256 starts a document."""

    name: TokenizerName = "bytes"
    vocab_size = 257
    bos = 256

    def encode(self, text: str) -> Tokens:
        """See ``Tokenizer``; halves of surrogate pairs become question marks."""
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint16)

    def decode(self, ids: IDs) -> str:
        """See ``Tokenizer``."""
        tokens = _checked(ids, self.vocab_size)
        parts = np.split(tokens, np.flatnonzero(tokens == self.bos))
        texts = [part[part != self.bos].astype(np.uint8).tobytes() for part in parts]
        return DOCUMENT_START.join(text.decode(errors="replace") for text in texts)

    def token_bytes(self) -> Tensor:
        """See ``Tokenizer``."""
        return (torch.arange(self.vocab_size) != self.bos).long()


class GPT2Tokenizer:
    """GPT-2's byte pair encoding by tiktoken, which is loaded when it is needed.

    Training needs it only to count bytes. tiktoken downloads the vocabulary once (1.5 MB) and
    caches it in the folder that the environment variable TIKTOKEN_CACHE_DIR names.
    """

    name: TokenizerName = "gpt2"
    vocab_size = 50257
    bos = 50256

    @cached_property
    def encoding(self) -> Any:
        """The tiktoken.Encoding.

        Raises:
            ModuleNotFoundError: If tiktoken is not installed.
            FileNotFoundError: If it cannot get the vocabulary.
        """
        try:
            import tiktoken
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "GPT-2's tokenizer comes from tiktoken, which is not installed: pip install "
                "tiktoken, or install lit_fanions with its extra 'zoo'"
            ) from None
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # its HTTP library, the file system, a damaged download
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = reason if len(reason) <= 100 else f"{reason[:100]} ..."
            raise FileNotFoundError(
                f"tiktoken could not get GPT-2's vocabulary ({reason}): run it once with a "
                "network, set TIKTOKEN_CACHE_DIR to the folder of an intact cached copy, or use "
                "the tokenizer bytes"
            ) from None

    def encode(self, text: str) -> Tokens:
        """See ``Tokenizer``."""
        return np.array(self.encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids: IDs) -> str:
        """See ``Tokenizer``."""
        return self.encoding.decode(_checked(ids, self.vocab_size).tolist())

    def token_bytes(self) -> Tensor:
        """See ``Tokenizer``."""
        single = self.encoding.decode_single_token_bytes
        lengths = [len(single(token)) for token in range(self.vocab_size)]
        lengths[self.bos] = 0
        return torch.tensor(lengths)


def load_tokenizer(name: TokenizerName) -> Tokenizer:
    """Return the tokenizer of a name.

    Raises:
        ValueError: If there is no tokenizer of this name.
    """
    check_choice("tokenizer", name, get_args(TokenizerName))
    return GPT2Tokenizer() if name == "gpt2" else ByteTokenizer()


def _checked(ids: IDs, vocab_size: int) -> NDArray[np.int64]:
    tokens = np.asarray(ids, np.int64).reshape(-1)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"token {outside[0]} cannot be decoded: the vocabulary has {vocab_size} tokens"
        )
    return tokens

"""What models ask of their data: the only place where models and data modules know each other.

A data module satisfies a protocol by having its attributes; neither imports the other. Each
``Has...`` is one question: what a data module does not answer is not checked or not computed.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor

from models.modules import attached_trainer


class LeastSquaresBatch(Protocol):
    """Problems F(X) = 1/2 <X - S, M (X - S) N> (equation 19 of the paper)."""

    @property
    def left(self) -> Tensor:
        """M, symmetric positive semidefinite, (problems, rows, rows)."""

    @property
    def right(self) -> Tensor:
        """N, symmetric positive semidefinite, (problems, cols, cols)."""

    @property
    def target(self) -> Tensor:
        """S, (problems, rows, cols)."""


class ClassificationBatch(Protocol):
    """Examples of a linear classification."""

    @property
    def features(self) -> Tensor:
        """Features, float64 (n, features)."""

    @property
    def labels(self) -> Tensor:
        """Class indices, int64 (n,)."""


@runtime_checkable
class HasTrainingImages(Protocol):
    """Gives training images before the training starts."""

    def training_images(self, n: int) -> Tensor:
        """Return the first n training images, normalised: float (n, channels, height, width)."""


@runtime_checkable
class HasVocabulary(Protocol):
    """Has tokens from 0 to vocab_size - 1."""

    vocab_size: int


@runtime_checkable
class HasDocuments(Protocol):
    """Has documents that each start with the token ``bos``."""

    bos: int


@runtime_checkable
class HasSequences(Protocol):
    """Has training sequences of ``sequence_length`` tokens."""

    sequence_length: int


class Tokenizer(Protocol):
    """Turns text into tokens and back; every document starts with the token ``bos``."""

    bos: int

    def encode(self, text: str) -> NDArray[np.uint16]:
        """Return the tokens of a text, (n,), without ``bos``."""

    def decode(self, ids: Any) -> str:
        """Return the text of tokens, (n,)."""

    def token_bytes(self) -> Tensor:
        """Return the number of bytes that each token stands for, int64 (vocab_size,)."""


@runtime_checkable
class HasTokenizer(Protocol):
    """Has the tokenizer that its tokens were made with."""

    tokenizer: Tokenizer


@runtime_checkable
class HasPrompts(Protocol):
    """Has texts for ``predict`` to continue."""

    def encoded_prompts(self) -> list[tuple[str, list[int]]]:
        """Return each prompt with its tokens, ``bos`` first."""


@runtime_checkable
class HasProblems(Protocol):
    """Has matrix problems of one shape: number of problems, rows, cols."""

    shape: tuple[int, int, int]


@runtime_checkable
class HasFeatures(Protocol):
    """Has examples with ``features`` features."""

    features: int


def attached_data(module: LightningModule) -> object:
    """Return the data module of a module's trainer; None without a trainer or a data module."""
    return getattr(attached_trainer(module), "datamodule", None)

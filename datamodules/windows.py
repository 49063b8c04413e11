"""Which windows of a token sequence an optimizer step trains on, and which part a process reads.

The batch of an optimizer step is a set of windows that depends on the recipe alone. It is cut into
as many pieces as there are forward passes on all processes together, all of one shape: sequences
without targets fill up where windows are missing. So sums over a step are exact for any number of
processes, and a run may be resumed with another number of them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.shards import Shards

Batch = tuple[Tensor, Tensor]
Starts = NDArray[np.int64]

IGNORED = -100  # target without a loss: the ignore_index of torch's cross_entropy


# --- which windows ---


def consecutive_windows(tokens: int, length: int) -> Starts:
    """Return where windows of ``tokens`` tokens start: 0, length, 2 length and so on.

    A window has ``length`` inputs; the token after them is its last target.
    """
    return np.arange(max(tokens - 1, 0) // length, dtype=np.int64) * length


def aligned_windows(documents: Starts, tokens: int, length: int) -> Starts:
    """Return where windows start that each start with a document.

    Greedy: the next window starts with the first document that starts at or after the end of the
    window before, as in modded-nanogpt's loader. ``documents`` are their starts, ascending.
    """
    following = np.searchsorted(documents, documents + length).tolist()
    chosen, document = [], 0
    while document < len(following):
        chosen.append(document)
        document = following[document]
    starts = documents[chosen]
    return starts[starts + length < tokens]


def shuffled(starts: Starts, seed: int, epoch: int) -> Starts:
    """Permute windows as a function of the arguments alone; ``epoch`` counts from 0."""
    return np.random.default_rng((seed, 1 + epoch)).permutation(starts)


# --- which process reads them ---


@dataclass(frozen=True)
class Share:
    """How a batch is divided among processes and forward passes."""

    sequences: int  # windows of a batch
    micro_batch_size: int  # most windows of a forward pass
    rank: int
    world_size: int

    @property
    def passes(self) -> int:
        """Number of forward passes of each process per batch."""
        return math.ceil(self.sequences / (self.micro_batch_size * self.world_size))

    @property
    def pieces(self) -> int:
        """Number of forward passes of all processes together."""
        return self.passes * self.world_size

    @property
    def rows(self) -> int:
        """Number of sequences of the longest piece."""
        return math.ceil(self.sequences / self.pieces)


def piece(sequences: int, pieces: int, index: int) -> tuple[int, int]:
    """Return the first sequence of a piece and the one after its last.

    Like tensor_split: the first ``sequences % pieces`` pieces have one sequence more.
    """
    size, longer = divmod(sequences, pieces)
    first = index * size + min(index, longer)
    return first, first + size + (index < longer)


@dataclass(frozen=True)
class Pieces(Dataset[Batch]):
    """The pieces that one process reads, batch after batch; an incomplete last batch is dropped.

    Targets at or after position ``targets`` are masked with -100, and tokens after the last valid
    target are not read.
    """

    shards: Shards
    starts: Starts  # of the windows, in the order of the batches
    length: int  # inputs of a window
    targets: int  # valid target positions, from the start
    share: Share
    fill: int  # token of positions without a target

    def __len__(self) -> int:
        return len(self.starts) // self.share.sequences * self.share.passes

    def __getitem__(self, index: int) -> Batch:
        """Read inputs and targets, int64 (sequences of the longest piece, length)."""
        share = self.share
        batch, turn = divmod(index, share.passes)
        # In each forward pass the pieces of all processes are neighbours.
        turn = turn * share.world_size + share.rank
        first, last = piece(share.sequences, share.pieces, turn)
        shape = share.rows, self.length
        inputs = np.full(shape, self.fill, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        offset = batch * share.sequences
        for row, start in enumerate(self.starts[offset + first : offset + last].tolist()):
            valid = min(self.length, self.targets - start)
            tokens = self.shards.read(start, valid + 1)
            inputs[row, :valid] = tokens[:-1]
            targets[row, :valid] = tokens[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

"""Messages of several tensors between ranks, one collective for all of them.

Beside ``sharing``, which says who sends what: here tensors of any shapes and dtypes become bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 has renamed ``all_gather_into_tensor`` and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ALIGNMENT = 16  # bytes; every tensor in a message starts at a multiple of it


@dataclass(frozen=True, eq=False)
class Team:
    """Ranks, by their global numbers, that share the matrices of some parameters.

    ``place`` is where this rank is in the order of the process group.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    place: int

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)


@functools.lru_cache(maxsize=64)
def team_of_group(group: dist.ProcessGroup) -> Team:
    """Return the ranks of a process group."""
    return Team(group, tuple(dist.get_process_group_ranks(group)), dist.get_rank(group))


class Field(NamedTuple):
    """The shape and dtype of a tensor in a message."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes that it takes in a message."""
        size = self.shape.numel() * self.dtype.itemsize
        return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


Message = Sequence[Field]


def message_size(message: Message) -> int:
    """Return the bytes of a message."""
    return sum(field.size for field in message)


def _tensors(buffer: Tensor, message: Message) -> list[Tensor]:
    """Return the tensors of a message as views of its bytes."""
    found, start = [], 0
    for shape, dtype in message:
        stop = start + shape.numel() * dtype.itemsize
        found.append(buffer[start:stop].view(dtype).view(shape))
        start += Field(shape, dtype).size
    return found


def _messages(buffer: Tensor, sizes: list[int], messages: Sequence[Message]) -> list[list[Tensor]]:
    parts = buffer.split(sizes)
    return [_tensors(part, message) for part, message in zip(parts, messages, strict=True)]


def sum_over(team: Team, x: Tensor) -> Tensor:
    """Return the sum of the contiguous tensors of all ranks, in the memory of each."""
    dist.all_reduce(x, group=team.group)
    return x


class AllToAll:
    """Sends each rank a message of its own: fill ``outgoing``, post, wait, read ``incoming``.

    Attributes:
        outgoing: The tensors to send to each rank of the team.
        incoming: The tensors that each of them sends.
    """

    def __init__(
        self,
        team: Team,
        outgoing: Sequence[Message],
        incoming: Sequence[Message],
        device: torch.device,
    ) -> None:
        self._team = team
        self._in, self._out = ([*map(message_size, ms)] for ms in (incoming, outgoing))
        self._received = torch.empty(sum(self._in), dtype=torch.uint8, device=device)
        self._sent = torch.empty(sum(self._out), dtype=torch.uint8, device=device)
        self.incoming = _messages(self._received, self._in, incoming)
        self.outgoing = _messages(self._sent, self._out, outgoing)

    def post(self) -> None:
        """Start sending, without a wait."""
        self._work: Any = dist.all_to_all_single(
            self._received, self._sent, self._in, self._out, self._team.group, async_op=True
        )

    def wait(self) -> None:
        """Wait until ``incoming`` is there; on an accelerator its stream waits, not the host."""
        self._work.wait()


class AllGather:
    """Sends the message of each rank to all ranks; used as ``AllToAll``.

    Messages are padded to the longest of them.

    Attributes:
        outgoing: The tensors to send, in a list of one message.
        incoming: The tensors that each rank of the team sends.
    """

    def __init__(self, team: Team, messages: Sequence[Message], device: torch.device) -> None:
        self._team = team
        longest = max(map(message_size, messages))
        self._own = torch.empty(longest, dtype=torch.uint8, device=device)
        self._all = torch.empty(team.size * longest, dtype=torch.uint8, device=device)
        self.outgoing = [_tensors(self._own, messages[team.place])]
        self.incoming = _messages(self._all, [longest] * team.size, messages)

    def post(self) -> None:
        """Start sending, without a wait."""
        self._work: Any = _all_gather(self._all, self._own, self._team.group, async_op=True)

    def wait(self) -> None:
        """Wait until ``incoming`` is there; on an accelerator its stream waits, not the host."""
        self._work.wait()

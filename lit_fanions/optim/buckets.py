"""Small parameters of adamw and sgd with their states as views of a few tensors, for accelerators.

There the host takes longer to ask for a hundred small operations than the device to run them. The
states of a bucket's parameters are views of one tensor of each kind, as momenta in ``together``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten

from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.bases import State
from lit_fanions.optim.matrices import is_distributed

# Keys of an algorithm's states: of tensors of the parameter's shape, and of numbers.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}
NUMBERS = {"adamw": ("step", "skipped"), "sgd": ("skipped",)}
# Parameters of up to this many entries are stepped many at once on an accelerator.
_SMALL = 2**16


class Bucket:
    """States of small parameters as views of a few tensors, and room for a copy of the weights.

    Attributes:
        places: Place of the parameter that each entry belongs to, (entries,), int32.
        rows: Room for the weights, then the moments, (1 + kinds, entries).
        weights: Views of the first row.
        numbers: By key, the numbers of all states, (parameters,).
        views: By key, the tensors in the states: views of the other rows and of ``numbers``.
    """

    def __init__(
        self, parameters: Sequence[Tensor], states: Sequence[State], algorithm: str
    ) -> None:
        """Copy the states of parameters into a few tensors and make them views of these."""
        kinds = MOMENTS[algorithm]
        numbers = [key for key in NUMBERS[algorithm] if key in states[0]]
        self.parameters = list(parameters)
        moments = [flatten([state[kind] for state in states]) for kind in kinds]
        self.rows = torch.stack([torch.zeros_like(moments[0]), *moments])
        self.numbers = {key: torch.stack([state[key] for state in states]) for key in numbers}
        self._shapes = [state[kinds[0]].shape for state in states]
        sizes = [shape.numel() for shape in self._shapes]
        self.weights, *moment_views = [
            [part.view(shape) for part, shape in zip(row.split(sizes), self._shapes, strict=True)]
            for row in self.rows.unbind()
        ]
        self.views = dict(zip(kinds, moment_views, strict=True))
        self.views |= {key: list(whole.unbind()) for key, whole in self.numbers.items()}
        for key, views in self.views.items():
            for state, view in zip(states, views, strict=True):
                state[key] = view
        self.places = torch.zeros_like(moments[0], dtype=torch.int32)
        # Numbers that travel with the launch: a copy from the host would wait for the device.
        torch._foreach_add_(list(self.places.split(sizes)), list(range(len(sizes))))

    def is_current(self, states: Mapping[Tensor, State]) -> bool:
        """Return whether the states still are views of this bucket, and the parameters fit them."""
        dtype, own = self.rows.dtype, [states[p] for p in self.parameters]
        if self._shapes != [p.shape for p in self.parameters]:
            return False
        if not all([p.dtype == dtype for p in self.parameters]):
            return False
        for key, views in self.views.items():
            tensors = [state.get(key) for state in own]
            storage = self.numbers.get(key, self.rows).untyped_storage()
            # Assigning to ``x.data`` gives the same tensor another storage.
            storages = map(Tensor.untyped_storage, views)
            if not all(map(is_, tensors, views)) or not all(map(is_, storages, repeat(storage))):
                return False
        return True


class Partition(NamedTuple):
    """The parameters of an entrywise group: buckets of small ones, and all others."""

    buckets: list[Bucket]
    others: list[Tensor]


def current_partition(
    group: Group, states: Mapping[Tensor, State], before: Partition | None
) -> Partition:
    """Return the partition of a group's last step without the buckets that no longer fit."""
    parameters = group["params"]
    kept = [bucket for bucket in before.buckets if bucket.is_current(states)] if before else []
    if not kept or group["nonfinite"] != "skip":
        return Partition([], parameters)
    inside = [p for bucket in kept for p in bucket.parameters]
    others = without(parameters, inside)
    # A parameter may have left the group.
    whole = len(others) + len(inside) == len(parameters)
    return Partition(kept, others) if whole else Partition([], parameters)


def with_buckets(group: Group, states: Mapping[Tensor, State], partition: Partition) -> Partition:
    """Return a partition in which all small parameters are in buckets.

    Shards stay outside: their states cannot be views.
    """
    buckets, others = partition
    off_cpu = any(device.type != "cpu" for device in {p.device for p in others})
    if group["nonfinite"] != "skip" or not off_cpu:
        return partition
    new = []
    for small in small_parameters([p for p in others if not is_distributed(p)]):
        new.append(Bucket(small, [states[p] for p in small], group["algorithm"]))
        others = without(others, small)
    return Partition([*buckets, *new], others)


def small_parameters(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return lists of small parameters of one device and dtype that one call steps, off the CPU."""
    alike: dict[Any, list[Tensor]] = {}
    for p in parameters:
        if p.device.type != "cpu" and 0 < p.numel() <= _SMALL:
            alike.setdefault((p.device, p.dtype), []).append(p)
    return [same for same in alike.values() if len(same) > 1]


def without(parameters: Sequence[Tensor], left_out: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that are not left out."""
    ids = set(map(id, left_out))
    return [p for p in parameters if id(p) not in ids]

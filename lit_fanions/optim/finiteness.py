"""Which gradients can be stepped: flags on the device, equal on all ranks, without a wait.

A finite gradient that would make the state infinite for ever counts as non-finite. A CPU looks at
the gradient of a matrix just before the step, which then finds the gradient in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fanions.lmo.scaling import has_fast_maximum_norm
from lit_fanions.optim.algorithms import Group, is_entrywise
from lit_fanions.optim.bases import State
from lit_fanions.optim.buckets import Bucket, Partition
from lit_fanions.optim.groups import named_parameters
from lit_fanions.optim.matrices import is_distributed, local_grad
from lit_fanions.optim.stacking import stacked


class Flags(NamedTuple):
    """Which parameters are stepped, as tensors on their devices."""

    # Whether each parameter with a gradient is stepped, a 0-dimensional bool; not of those in
    # buckets.
    finite: dict[Tensor, Tensor]
    # Whether each of them is skipped, as torch's fused kernels take it: 1.0 or 0.0. Only for
    # parameters that can be skipped, and not on CPUs, where ``finite`` can be read.
    found_inf: dict[Tensor, Tensor]
    # Whether each parameter of a bucket with a gradient is stepped, (parameters,). Their skips are
    # counted by the step of the bucket.
    buckets: dict[Bucket, Tensor]


def finite_flags(
    groups: Sequence[Group], states: Mapping[Tensor, State], partitions: Mapping[str, Partition]
) -> Flags:
    """Return which parameters with a gradient are stepped, and count in ``skipped`` which are not.

    Partitions of entrywise groups are given by the groups' names. In a group of
    ``nonfinite="error"`` parameters that are not stepped raise FloatingPointError.
    """
    policies: dict[str, list[Tensor]] = {"error": [], "propagate": [], "skip": []}
    limits: dict[Tensor, float] = {}
    together: list[Tensor] = []
    small: dict[Bucket, Tensor] = {}
    for group in groups:
        entrywise, skip = is_entrywise(group["algorithm"]), group["nonfinite"] == "skip"
        buckets, others = partitions.get(group["name"], ((), group["params"]))
        for bucket in buckets:
            gradients = [x for p in bucket.parameters if (x := p.grad) is not None]
            if gradients:
                first = bucket.parameters[0]
                limit = _largest_gradient(first, states[first], group)
                small[bucket] = _are_within(gradients, [limit] * len(gradients))
        present = [p for p in others if p.grad is not None]
        policies[group["nonfinite"]] += present
        limits |= {p: _largest_gradient(p, states[p], group) for p in present}
        together += [
            p
            for p in present
            if skip and (entrywise or p.device.type != "cpu" or is_distributed(p))
        ]
    flags = _FlagsOnDemand(limits, states)
    flags |= _flags_true([*policies["propagate"], *policies["error"]])
    _raise_nonfinite(policies["error"], limits, groups)
    flags |= (own := are_within(together, limits))
    return Flags(flags, _count_skips(list(own), own, states), small)


class _FlagsOnDemand(dict[Tensor, Tensor]):
    """Flags that are made, and skips that are counted, when they are first asked for."""

    def __init__(self, limits: Mapping[Tensor, float], states: Mapping[Tensor, Any]) -> None:
        super().__init__()
        self._limits = limits
        self._states = states

    def __missing__(self, p: Tensor) -> Tensor:
        self[p] = _is_within(local_grad(p), self._limits[p])
        _count_skips([p], self, self._states)
        return self[p]


def _flags_true(parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    devices = {p.device for p in parameters}
    flags = {device: torch.ones((), dtype=torch.bool, device=device) for device in devices}
    return {p: flags[p.device] for p in parameters}


def _raise_nonfinite(
    parameters: Sequence[Tensor], limits: Mapping[Tensor, float], groups: Sequence[Group]
) -> None:
    flags = are_within(parameters, limits)
    if flags and not torch.stack(list(flags.values())).all():
        named = [pair for group in groups for pair in named_parameters(group)]
        broken = ", ".join(name for name, p in named if p in flags and not flags[p])
        raise FloatingPointError(
            f"non-finite gradient of {broken}; nothing was stepped. Lower lr, clip gradients, "
            'or leave such steps out with nonfinite="skip"'
        )


def _count_skips(
    parameters: Sequence[Tensor], flags: Mapping[Tensor, Tensor], states: Mapping[Tensor, State]
) -> dict[Tensor, Tensor]:
    """Count skipped steps in the states and return ``found_inf``."""
    found_inf: dict[Tensor, Tensor] = {}
    devices: dict[torch.device, list[Tensor]] = {}
    for p in parameters:
        if p.device.type != "cpu":
            devices.setdefault(p.device, []).append(p)
        elif not flags[p]:
            states[p]["skipped"] += 1
    for same in devices.values():
        counters = [states[p]["skipped"] for p in same]
        stepped = stacked([flags[p] for p in same])
        skips = torch.logical_not(stepped, out=counters[0].new_empty(stepped.shape))
        torch._foreach_add_(counters, list(skips.unbind()))
        found_inf.update(zip(same, skips.float().unbind(), strict=True))
    return found_inf


def _largest_gradient(p: Tensor, state: Mapping[str, Tensor], group: Group) -> float:
    """Return the largest entry that keeps a state finite, whatever gradients of that size follow.

    Adamw squares it. A sum decayed by mu grows to 1 / (1 - mu) of it; error feedback subtracts
    singular vectors times singular values, which are up to the root of the number of entries
    larger. An average of old and new is formed from their difference.
    """
    if "exp_avg_sq" in state:
        return 0.99 * math.sqrt(torch.finfo(state["exp_avg_sq"].dtype).max)
    largest = torch.finfo(state["momentum"].dtype).max
    if group["algorithm"] == "sgd" or group["error_feedback"]:
        # A CUDA graph does not see a momentum that changes.
        momentum = 0.999 if group["capturable"] else group["momentum"]
        longest = math.sqrt(max(p.numel(), 1)) if group.get("error_feedback") else 1.0
        return 0.99 * (1 - momentum) * largest / longest
    return largest / 2


def are_within(
    parameters: Sequence[Tensor], limits: Mapping[Tensor, float]
) -> dict[Tensor, Tensor]:
    """Return whether all entries of gradients are numbers of at most a limit.

    The flags, 0-dimensional bools, are equal on all ranks. Shards of one device mesh share one
    collective, however many parameters there are.
    """
    on_cpu = all(p.device.type == "cpu" and not is_distributed(p) for p in parameters)
    if on_cpu and _all_within(parameters, limits):
        return _flags_true(parameters)
    flags: dict[Tensor, Tensor] = {}
    meshes: dict[Any, list[Tensor]] = {}
    alike: dict[Any, list[Tensor]] = {}
    for p in sorted(parameters, key=limits.__getitem__):
        if p.numel():
            alike.setdefault((p.device, p.dtype), []).append(p)
        else:
            flags[p] = _is_within(local_grad(p), limits[p])
        if is_distributed(p):
            meshes.setdefault(p.device_mesh, []).append(p)
    for same in alike.values():
        within = _are_within([local_grad(p) for p in same], [limits[p] for p in same])
        flags.update(zip(same, within.unbind(), strict=True))
    for mesh, sharded in meshes.items():
        stacked = torch.stack([flags[p] for p in sharded]).to(torch.uint8)
        for dim in range(mesh.ndim):
            dist.all_reduce(stacked, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        flags.update(zip(sharded, stacked.bool().unbind(), strict=True))
    return flags


def _all_within(parameters: Sequence[Tensor], limits: Mapping[Tensor, float]) -> bool:
    """Return True only if no gradient has an entry beyond its limit; one cheap look, for CPUs.

    No entry is larger than the norm, so that a norm within the limit suffices. A larger norm may be
    due to many entries, or to an overflow of squares: then each tensor has to be looked at.
    """
    held = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.numel()]
    if not held:
        return True
    norms = torch._foreach_norm([gradient for _, gradient in held])
    own = torch.tensor([limits[p] for p, _ in held], dtype=torch.float64, device="cpu")
    return bool((torch.stack([norm.double() for norm in norms]) <= own).all())


def _are_within(gradients: Sequence[Tensor], limits: Sequence[float]) -> Tensor:
    """Return whether all entries of each gradient are numbers of at most its limit, (gradients,).

    One launch for each run of gradients with the same limit.
    """
    if not has_fast_maximum_norm(gradients[0].device):
        return torch.stack(list(map(_is_within, gradients, limits)))
    if not all(map(Tensor.numel, gradients)):  # an empty shard has no norm
        gradients = [x if x.numel() else x.new_zeros(()) for x in gradients]
    peaks = torch.stack(list(torch._foreach_norm(list(gradients), torch.inf)))
    within, start = torch.empty_like(peaks, dtype=torch.bool), 0
    for limit, run in groupby(limits):
        part = slice(start, start := start + len(list(run)))
        # NaN is not less.
        torch.le(peaks[part], min(limit, torch.finfo(peaks.dtype).max), out=within[part])
    return within


def _is_within(gradient: Tensor, limit: float) -> Tensor:
    if not gradient.numel():
        return torch.ones((), dtype=torch.bool, device=gradient.device)
    limit = min(limit, torch.finfo(gradient.dtype).max)
    low, high = torch.aminmax(gradient)
    return (low >= -limit) & (high <= limit)

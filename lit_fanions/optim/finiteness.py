"""Which gradients can be stepped: flags on the device, equal on all ranks, without a wait.

A finite gradient that would overflow the state, for good, counts as non-finite. A CPU looks at the
gradient of a matrix just before it steps it, which leaves the gradient in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fanions.lmo.scaling import has_fast_maximum_norm
from lit_fanions.optim.algorithms import is_entrywise
from lit_fanions.optim.groups import named_parameters
from lit_fanions.optim.matrices import is_distributed, local_grad


class Flags(NamedTuple):
    """Which parameters are stepped, as 0-dimensional tensors on their devices.

    Attributes:
        finite: Whether each parameter with a gradient is stepped, a bool.
        found_inf: Whether it is skipped, as torch's fused kernels take it: 1.0 or 0.0. Only of
            parameters that can be skipped, and not on CPUs, where ``finite`` can be looked at.
    """

    finite: dict[Tensor, Tensor]
    found_inf: dict[Tensor, Tensor]


def finite_flags(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Tensor]]
) -> Flags:
    """Return which parameters with a gradient are stepped, and count those that are skipped.

    Args:
        groups: All groups of the optimizer.
        states: States of their parameters, whose ``skipped`` is counted up.

    Raises:
        FloatingPointError: In a group of ``nonfinite="error"``, with the parameters' names.
    """
    policies: dict[str, dict[Tensor, str]] = {"error": {}, "propagate": {}, "skip": {}}
    limits: dict[Tensor, float] = {}
    together: list[Tensor] = []
    for group in groups:
        named = {p: name for name, p in named_parameters(group) if p.grad is not None}
        policies[group["nonfinite"]].update(named)
        limits |= {p: _largest_gradient(p, states[p], group) for p in named}
        if group["nonfinite"] == "skip":
            by_one_call = is_entrywise(group["algorithm"])
            together += [
                p for p in named if by_one_call or p.device.type != "cpu" or is_distributed(p)
            ]
    flags = _FlagsOnDemand(limits, states)
    flags |= _flags_true([*policies["propagate"], *policies["error"]])
    _raise_nonfinite(policies["error"], limits)
    flags |= are_within(together, limits)
    return Flags(flags, _count_skips(together, flags, states))


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


def _raise_nonfinite(names: Mapping[Tensor, str], limits: Mapping[Tensor, float]) -> None:
    flags = are_within(list(names), limits)
    if flags and not torch.stack(list(flags.values())).all():
        broken = ", ".join(name for p, name in names.items() if not flags[p])
        raise FloatingPointError(
            f"non-finite gradient of {broken}; nothing was stepped. Lower lr, clip gradients, "
            'or leave such steps out with nonfinite="skip"'
        )


def _count_skips(
    parameters: Sequence[Tensor],
    flags: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, dict[str, Tensor]],
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
        skips = torch.stack([flags[p] for p in same]).logical_not()
        torch._foreach_add_(counters, list(skips.to(counters[0].dtype).unbind()))
        found_inf.update(zip(same, skips.float().unbind(), strict=True))
    return found_inf


def _largest_gradient(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> float:
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

    Shards of one device mesh share one collective, however many parameters there are.

    Args:
        parameters: Parameters with a gradient.
        limits: Largest absolute value of each, finite.

    Returns:
        0-dimensional bools, equal on all ranks.
    """
    on_cpu = all(p.device.type == "cpu" and not is_distributed(p) for p in parameters)
    if on_cpu and _all_within(parameters, limits):
        return _flags_true(parameters)
    flags: dict[Tensor, Tensor] = {}
    meshes: dict[Any, list[Tensor]] = {}
    alike: dict[Any, dict[Tensor, Tensor]] = {}
    for p in parameters:
        gradient = local_grad(p)
        if has_fast_maximum_norm(gradient.device) and gradient.numel():
            alike.setdefault((gradient.device, gradient.dtype, limits[p]), {})[p] = gradient
        else:
            flags[p] = _is_within(gradient, limits[p])
        if is_distributed(p):
            meshes.setdefault(p.device_mesh, []).append(p)
    for (*_, limit), gradients in alike.items():
        peaks = torch.stack(list(torch._foreach_norm([*gradients.values()], torch.inf)))
        within = peaks <= min(limit, torch.finfo(peaks.dtype).max)  # NaN is not less
        flags.update(zip(gradients, within.unbind(), strict=True))
    for mesh, sharded in meshes.items():
        stacked = torch.stack([flags[p] for p in sharded]).to(torch.uint8)
        for dim in range(mesh.ndim):
            dist.all_reduce(stacked, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        flags.update(zip(sharded, stacked.bool().unbind(), strict=True))
    return flags


def _all_within(parameters: Sequence[Tensor], limits: Mapping[Tensor, float]) -> bool:
    """Return True only if no gradient has an entry beyond its limit; one cheap look, for CPUs.

    A norm is at least as large as any entry, so one within the limit tells. One that is not may be
    due to many entries, or to an overflow of squares: a look at each tensor then decides.
    """
    held = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.numel()]
    if not held:
        return True
    norms = torch._foreach_norm([gradient for _, gradient in held])
    own = torch.tensor([limits[p] for p, _ in held], dtype=torch.float64, device="cpu")
    return bool((torch.stack([norm.double() for norm in norms]) <= own).all())


def _is_within(gradient: Tensor, limit: float) -> Tensor:
    if not gradient.numel():
        return torch.ones((), dtype=torch.bool, device=gradient.device)
    limit = min(limit, torch.finfo(gradient.dtype).max)
    low, high = torch.aminmax(gradient)
    return (low >= -limit) & (high <= limit)

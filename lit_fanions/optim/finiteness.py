"""Which gradients are finite: flags on the device, equal on all ranks, without a wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fanions.lmo.scaling import has_fast_maximum_norm
from lit_fanions.optim.groups import named_parameters
from lit_fanions.optim.matrices import is_distributed, local_grad


def finite_flags(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Tensor]]
) -> dict[Tensor, Tensor]:
    """Return whether each parameter with a gradient is stepped, and count those that are skipped.

    Args:
        groups: All groups of the optimizer.
        states: States of their parameters, whose ``skipped`` is counted up.

    Returns:
        0-dimensional bools on the parameters' devices.

    Raises:
        FloatingPointError: In a group of ``nonfinite="error"``, with the parameters' names.
    """
    policies: dict[str, dict[Tensor, str]] = {"skip": {}, "error": {}, "propagate": {}}
    for group in groups:
        named = {p: name for name, p in named_parameters(group) if p.grad is not None}
        policies[group["nonfinite"]].update(named)
    flags = _flags_true([*policies["propagate"], *policies["error"]])
    _raise_nonfinite(policies["error"])
    skippable = list(policies["skip"])
    # The momentum may have less range than the gradient.
    flags |= are_finite(skippable, {p: _momentum_dtype(states[p]) for p in skippable})
    _count_skips(skippable, flags, states)
    return flags


def _flags_true(parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    devices = {p.device for p in parameters}
    flags = {device: torch.ones((), dtype=torch.bool, device=device) for device in devices}
    return {p: flags[p.device] for p in parameters}


def _raise_nonfinite(names: Mapping[Tensor, str]) -> None:
    flags = are_finite(list(names))
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
) -> None:
    devices: dict[torch.device, list[Tensor]] = {}
    for p in parameters:
        if p.device.type != "cpu":
            devices.setdefault(p.device, []).append(p)
        elif not flags[p]:
            states[p]["skipped"] += 1
    for same in devices.values():
        counters = [states[p]["skipped"] for p in same]
        skips = torch.stack([flags[p] for p in same]).logical_not().to(counters[0].dtype)
        torch._foreach_add_(counters, list(skips.unbind()))


def _momentum_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    return next(state[key] for key in ("momentum", "exp_avg") if key in state).dtype


def are_finite(
    parameters: Sequence[Tensor], dtypes: Mapping[Tensor, torch.dtype] | None = None
) -> dict[Tensor, Tensor]:
    """Return whether the gradients of parameters have neither NaN nor infinity.

    Shards of one device mesh share one collective, however many parameters there are.

    Args:
        parameters: Parameters with a gradient.
        dtypes: Dtypes in which to ask, as one of smaller range overflows; None: the gradients'.

    Returns:
        0-dimensional bools, equal on all ranks.
    """
    on_cpu = all(p.device.type == "cpu" and not is_distributed(p) for p in parameters)
    if on_cpu and _all_finite(parameters, dtypes):
        return _flags_true(parameters)
    flags: dict[Tensor, Tensor] = {}
    meshes: dict[Any, list[Tensor]] = {}
    alike: dict[Any, dict[Tensor, Tensor]] = {}
    for p in parameters:
        gradient = local_grad(p)
        dtype = gradient.dtype if dtypes is None else dtypes[p]
        if has_fast_maximum_norm(gradient.device) and gradient.numel():
            alike.setdefault((gradient.device, gradient.dtype, dtype), {})[p] = gradient
        else:
            flags[p] = _is_finite(gradient, dtype)
        if is_distributed(p):
            meshes.setdefault(p.device_mesh, []).append(p)
    for (*_, dtype), gradients in alike.items():
        peaks = torch._foreach_norm([*gradients.values()], torch.inf)
        finite = torch.stack(list(peaks)).to(dtype) < torch.inf  # NaN is not less
        flags.update(zip(gradients, finite.unbind(), strict=True))
    for mesh, sharded in meshes.items():
        stacked = torch.stack([flags[p] for p in sharded]).to(torch.uint8)
        for dim in range(mesh.ndim):
            dist.all_reduce(stacked, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        flags.update(zip(sharded, stacked.bool().unbind(), strict=True))
    return flags


def _all_finite(parameters: Sequence[Tensor], dtypes: Mapping[Tensor, torch.dtype] | None) -> bool:
    """Return True only if no gradient has a non-finite entry; one cheap look, for CPUs.

    A norm is at least as large as any entry, so a finite one tells. One that is not finite may be
    an overflow of squares, which a look at each tensor then decides.
    """
    held = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.numel()]
    if not held:
        return True
    norms = list(torch._foreach_norm([gradient for _, gradient in held]))
    if dtypes is not None:
        norms = [norm.to(dtypes[p]) for norm, (p, _) in zip(norms, held, strict=True)]
    return bool(torch.stack([norm.double() for norm in norms]).isfinite().all())


def _is_finite(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    if not gradient.numel():
        return torch.ones((), dtype=torch.bool, device=gradient.device)
    low, high = (extreme.to(dtype) for extreme in torch.aminmax(gradient))
    return low.isfinite() & high.isfinite()

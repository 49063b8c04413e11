"""Which gradients are finite: flags on the device, equal on all ranks, without a wait.

A room of its own because matrices, entrywise groups and ``nonfinite="error"`` all ask it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fanions.lmo.scaling import has_fast_maximum_norm
from lit_fanions.optim.matrices import is_distributed, local_grad


def finite_flags(
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, dict[str, Tensor]],
    group: Mapping[str, Any],
) -> dict[Tensor, Tensor]:
    """Return whether each parameter is to be stepped, and count those that are skipped.

    Args:
        parameters: Parameters of the group with a gradient.
        states: Their states, whose ``skipped`` is counted up.
        group: Options of the group. Only with nonfinite="skip" a parameter can be skipped.

    Returns:
        0-dimensional bools.
    """
    if group["nonfinite"] != "skip":
        ones = {p.device: torch.ones((), dtype=torch.bool, device=p.device) for p in parameters}
        return {p: ones[p.device] for p in parameters}
    dtypes = {p: _momentum_dtype(states[p]) for p in parameters}
    flags = are_finite(parameters, dtypes)
    on_cpu = [p for p in parameters if p.device.type == "cpu"]
    for p in on_cpu:
        if not flags[p]:
            states[p]["skipped"] += 1
    devices: dict[torch.device, list[Tensor]] = {}
    for p in parameters:
        if p.device.type != "cpu":
            devices.setdefault(p.device, []).append(p)
    for same in devices.values():
        counters = [states[p]["skipped"] for p in same]
        skips = torch.stack([flags[p] for p in same]).logical_not().to(counters[0].dtype)
        torch._foreach_add_(counters, list(skips.unbind()))
    return flags


def _momentum_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that a gradient must be finite in: the momentum's may have less range."""
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
        return dict.fromkeys(parameters, torch.ones((), dtype=torch.bool, device="cpu"))
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
        flags.update(zip(gradients, finite_together([*gradients.values()], dtype), strict=True))
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


def finite_together(gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return whether each of the gradients is finite, in launches that do not grow with them.

    Args:
        gradients: Tensors of one dtype and device with at least one entry each.
        dtype: Dtype in which to ask.
    """
    peaks = torch._foreach_norm(gradients, torch.inf)
    return list((torch.stack(list(peaks)).to(dtype) < torch.inf).unbind())  # NaN is not less


def _is_finite(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    if not gradient.numel():
        return torch.ones((), dtype=torch.bool, device=gradient.device)
    low, high = (extreme.to(dtype) for extreme in torch.aminmax(gradient))
    return low.isfinite() & high.isfinite()

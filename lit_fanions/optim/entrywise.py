"""Steps of adamw and sgd groups by torch's own functions, one call for many tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lit_fanions.optim.bases import State
from lit_fanions.optim.finiteness import Flags
from lit_fanions.optim.matrices import local, local_grad

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}
# Entries of parameters of which an accelerator steps many at once.
_SMALL = 2**16


def first_state(p: Tensor, algorithm: str) -> State:
    """Return the state of a parameter of an adamw or sgd group before its first step."""
    state = {name: torch.zeros_like(p) for name in _MOMENTS[algorithm]}
    if algorithm == "adamw":
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    return state


def step_entrywise(group: Mapping[str, Any], states: Mapping[Tensor, State], flags: Flags) -> None:
    """Step a group of adamw or sgd.

    A CPU looks at the flags of non-finite gradients and leaves skipped parameters out of the one
    call. Elsewhere looking would wait for the device. Small parameters are stepped there by one
    call, and those to be skipped get their old entries back. torch's fused kernels leave a step out
    when ``found_inf`` is 1, and a call has one such flag: each large parameter gets a call of its
    own, which needs no memory for old entries.

    Args:
        group: The group.
        states: State of each of its parameters.
        flags: Which of them are stepped.
    """
    devices: dict[torch.device, list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is not None and (p.device.type != "cpu" or flags.finite[p]):
            devices.setdefault(p.device, []).append(p)
    for same in devices.values():
        if same[0] not in flags.found_inf:
            _step(same, group, states, None)
            continue
        small = [p for p in same if p.numel() <= _SMALL]
        if len(small) > 1:
            _step_or_restore(small, group, states, flags.finite)
        for p in same:
            if p.numel() > _SMALL or len(small) == 1:
                _step([p], group, states, flags.found_inf[p])


def _step_or_restore(
    parameters: Sequence[Tensor],
    group: Mapping[str, Any],
    states: Mapping[Tensor, State],
    finite: Mapping[Tensor, Tensor],
) -> None:
    """Step parameters by one call; where a flag is False, weight and state stay as they are."""
    names = (*_MOMENTS[group["algorithm"]], "step")
    changed: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for p in parameters:
        for x in (p, *(states[p][name] for name in names if name in states[p])):
            changed.setdefault(x.dtype, []).append((local(x.detach()), finite[p]))
    before = {dtype: _flat([x for x, _ in pairs]) for dtype, pairs in changed.items()}
    _step(parameters, group, states, None)
    for dtype, pairs in changed.items():
        tensors = [x for x, _ in pairs]
        steps = torch.cat([flag.expand(x.numel()) for x, flag in pairs])
        after = torch.where(steps, _flat(tensors), before[dtype])
        parts = after.split([x.numel() for x in tensors])
        torch._foreach_copy_(
            tensors, [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
        )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _step(
    parameters: Sequence[Tensor],
    group: Mapping[str, Any],
    states: Mapping[Tensor, State],
    found_inf: Tensor | None,
) -> None:
    """Step parameters by one call of torch's function."""
    if not parameters:
        return
    moments = _MOMENTS[group["algorithm"]]
    own = [[local(p), *(local(states[p][name]) for name in moments)] for p in parameters]
    used = [
        _one_layout([weight, local_grad(p).to(weight.dtype), *rest])
        for p, (weight, *rest) in zip(parameters, own, strict=True)
    ]
    weights, gradients, *rest = (list(tensors) for tensors in zip(*used, strict=True))
    if group["algorithm"] == "adamw":
        adamw(
            weights, gradients, rest[0], rest[1], [], [states[p]["step"] for p in parameters],
            fused=True, found_inf=found_inf, amsgrad=False, maximize=False,
            beta1=group["momentum"], beta2=group["beta2"], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
    else:
        buffers: list[Tensor | None] = [*rest[0]]
        sgd(
            weights, gradients, buffers, fused=_has_fused_sgd(weights), found_inf=found_inf,
            lr=group["lr"],
            weight_decay=group["weight_decay"], momentum=group["momentum"], dampening=0.0,
            nesterov=group["nesterov"], maximize=False,
        )  # fmt: skip
    for targets, (weight, _, *others) in zip(own, used, strict=True):
        for target, stepped in zip(targets, (weight, *others), strict=True):
            if target is not stepped:
                target.copy_(stepped)


def _has_fused_sgd(weights: Sequence[Tensor]) -> bool:
    # torch 2.11 leaves most entries of 16-bit parameters unstepped on CPUs, without an error.
    wide = (torch.float32, torch.float64)
    return all(w.device.type != "cpu" or w.dtype in wide for w in weights)


def _one_layout(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, or contiguous copies: fused kernels walk memory, not indices."""
    strides = tensors[0].stride()
    same = all(t.stride() == strides for t in tensors)
    if same and (tensors[0].is_contiguous() or _is_dense(tensors[0])):
        return tensors
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]


def _is_dense(x: Tensor) -> bool:
    """Return whether the entries lie next to each other in memory, in any order."""
    return torch.empty_like(x, device="meta").stride() == x.stride()

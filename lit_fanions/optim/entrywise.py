"""Steps of adamw and sgd groups by torch's own functions, one call for many tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lit_fanions.optim.algorithms import Group
from lit_fanions.optim.bases import State
from lit_fanions.optim.buckets import MOMENTS, Bucket, Partition, small_parameters, without
from lit_fanions.optim.finiteness import Flags
from lit_fanions.optim.matrices import is_distributed, local, local_grad


def first_state(p: Tensor, algorithm: str) -> State:
    """Return the state of a parameter of an adamw or sgd group before its first step."""
    state = {name: torch.zeros_like(p) for name in MOMENTS[algorithm]}
    if algorithm == "adamw":
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    return state


def step_entrywise(
    group: Group, states: Mapping[Tensor, State], flags: Flags, partition: Partition
) -> None:
    """Step a group of adamw or sgd.

    On a CPU the host reads the flags of non-finite gradients and leaves skipped parameters out of
    the one call. On other devices reading would wait. There, one call steps all small parameters,
    and those to be skipped get their old entries back. torch's fused kernels leave a step out
    when ``found_inf`` is 1, and a call has one such flag: each large parameter gets a call of its
    own, which needs no memory for old entries.
    """
    for bucket in partition.buckets:
        if bucket in flags.buckets:
            gradients = [p.grad for p in bucket.parameters]
            _step_bucket(bucket, bucket.parameters, gradients, flags.buckets[bucket], group)
    others = [p for p in partition.others if p.grad is not None]
    shards = [p for p in others if p in flags.found_inf and is_distributed(p)]
    for small in small_parameters(shards):
        _step_shards(small, torch.stack([flags.finite[p] for p in small]), group, states)
        others = without(others, small)
    devices: dict[torch.device, list[Tensor]] = {}
    for p in others:
        if p in flags.found_inf:
            _step([p], group, states, flags.found_inf[p])
        elif p.device.type != "cpu" or flags.finite[p]:
            devices.setdefault(p.device, []).append(p)
    for same in devices.values():
        _step(same, group, states, None)


def _step_shards(
    parameters: Sequence[Tensor], stepped: Tensor, group: Group, states: Mapping[Tensor, State]
) -> None:
    """Step small shards, whose skips have been counted, in a bucket that lasts for this step."""
    shards = [{k: local(x) for k, x in states[p].items() if k != "skipped"} for p in parameters]
    bucket = Bucket(parameters, [{**shard} for shard in shards], group["algorithm"])
    weights, gradients = map(local, parameters), map(local_grad, parameters)
    _step_bucket(bucket, list(weights), list(gradients), stepped, group)
    for key, views in bucket.views.items():
        torch._foreach_copy_([shard[key] for shard in shards], views)


def _step_bucket(
    bucket: Bucket,
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    stepped: Tensor,
    group: Group,
) -> None:
    """Step parameters of a bucket by one call, and give those to be skipped their old entries.

    The weights of all its parameters are no views of the bucket, so that a copy of them is stepped.
    ``stepped`` has a flag for each parameter that has a gradient.
    """
    changes = {"step": stepped, "skipped": stepped.logical_not()}
    lists = [weights, bucket.weights, *bucket.views.values()]
    present = [i for i, x in enumerate(gradients) if x is not None]
    if len(present) < len(weights):
        lists = [[xs[i] for i in present] for xs in lists]
        changes = {key: _spread(x, present, len(weights)) for key, x in changes.items()}
    for key, numbers in bucket.numbers.items():
        numbers.add_(changes[key])
    own, copies, *moments = lists
    torch._foreach_copy_(copies, own)
    before = bucket.rows.clone()
    dense = [x.to(before.dtype).contiguous() for x in gradients if x is not None]
    _step_at_once(copies, dense, dict(zip(bucket.views, moments, strict=True)), group)
    entries = changes["step"].index_select(0, bucket.places)
    torch.where(entries, bucket.rows, before, out=bucket.rows)
    torch._foreach_copy_(own, copies)


def _spread(x: Tensor, places: Sequence[int], size: int) -> Tensor:
    """Return a vector with the numbers of x at some places and 0 elsewhere, without a wait."""
    values = [x.new_zeros(())] * size
    for place, value in zip(places, x.unbind(), strict=True):
        values[place] = value
    return torch.stack(values)


def _step_at_once(
    weights: list[Tensor], gradients: list[Tensor], own: Mapping[str, list[Tensor]], group: Group
) -> None:
    """Step contiguous tensors by one kernel, with states whose ``step`` has been counted up."""
    if group["algorithm"] == "adamw":
        torch._fused_adamw_(
            weights, gradients, own["exp_avg"], own["exp_avg_sq"], [], own["step"],
            amsgrad=False, maximize=False, beta1=group["momentum"], beta2=group["beta2"],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
    else:
        _sgd(weights, gradients, own["momentum"], group, None)


def _step(
    parameters: Sequence[Tensor],
    group: Group,
    states: Mapping[Tensor, State],
    found_inf: Tensor | None,
) -> None:
    if not parameters:
        return
    moments = MOMENTS[group["algorithm"]]
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
        _sgd(weights, gradients, rest[0], group, found_inf)
    for targets, (weight, _, *others) in zip(own, used, strict=True):
        for target, stepped in zip(targets, (weight, *others), strict=True):
            if target is not stepped:
                target.copy_(stepped)


def _sgd(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: Sequence[Tensor],
    group: Group,
    found_inf: Tensor | None,
) -> None:
    # torch 2.11 leaves most entries of 16-bit parameters unstepped on CPUs, without an error.
    wide = (torch.float32, torch.float64)
    fused = all(w.device.type != "cpu" or w.dtype in wide for w in weights)
    sgd(
        weights, gradients, [*momenta], fused=fused, found_inf=found_inf,
        lr=group["lr"], weight_decay=group["weight_decay"], momentum=group["momentum"],
        dampening=0.0, nesterov=group["nesterov"], maximize=False,
    )  # fmt: skip


def _one_layout(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, or contiguous copies: fused kernels walk memory, not indices."""
    first = tensors[0]
    strides = first.stride()
    # Entries lie next to each other in memory, in any order.
    dense = first.is_contiguous() or torch.empty_like(first, device="meta").stride() == strides
    if dense and all(t.stride() == strides for t in tensors):
        return tensors
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]

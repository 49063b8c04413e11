"""The steps of ``Fanion`` as functions of a group's options, parameters and their state.

Beside ``fanion.py`` as torch's functional forms are beside its optimizers: the class keeps the
groups and the state in order, what a step computes is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lit_fanions import lmo
from lit_fanions.optim.matrices import (
    from_matrices,
    gather,
    local,
    local_grad,
    matrix_shapes,
    scatter,
    to_matrices,
)

Rank = int | float | Literal["full"]
Scale = Literal["none", "original", "match_rms_adamw", "spectral_unclamped"]

# Same-shape parameters are stacked on accelerators, where a launch costs more than the copy; on
# CPUs a loop measures as fast and needs less memory. The entries of a stack are bounded by this.
_STACK_ENTRIES = 2**26

Options = Mapping[str, Any]
State = dict[str, Tensor]


def resolve_rank(rank: Rank, rows: int, cols: int) -> int:
    """The rank that an option asks for in a rows x cols matrix.

    Args:
        rank: A whole number, clamped to the matrix; a fraction of min(rows, cols); or "full".
        rows: Of the matrix.
        cols: Of the matrix.

    Returns:
        Between 1 and min(rows, cols).
    """
    limit = min(rows, cols)
    if isinstance(rank, str):
        return limit
    return max(1, round(rank * limit)) if isinstance(rank, float) else min(rank, limit)


def direction_norm(group: Options, rows: int, cols: int) -> float | None:
    """The Frobenius norm of a group's directions; None where it depends on the momentum."""
    if group["alpha"] == 0:
        return group["sign_scale"] * math.sqrt(rows * cols) if group["blend"] == "sign" else 1.0
    if group["alpha"] != 1 or group["algorithm"] in ("kyfan", "dion"):
        return None
    if group["algorithm"] == "coordinate":
        return 1.0
    return math.sqrt(resolve_rank(group["rank"], rows, cols))


# RMS of an update of AdamW, which match_rms_adamw aims at (arXiv 2502.16982).
MATCHED_RMS = 0.2


def step_size_factor(scale: Scale, rows: int, cols: int, norm: float | None) -> float:
    """What multiplies lr in a step of a rows x cols matrix (out x in).

    ``none`` 1; ``original`` sqrt(max(1, rows / cols)); ``spectral_unclamped`` sqrt(rows / cols);
    ``match_rms_adamw`` .2 sqrt(rows * cols) / norm, which gives the step an RMS of .2 lr, whatever
    the direction's norm, and is torch's .2 sqrt(max(rows, cols)) for Muon.

    Args:
        scale: The rule, by torch's names.
        rows: Outputs of the matrix.
        cols: Inputs of the matrix.
        norm: ``direction_norm``.

    Returns:
        The factor; NaN where it depends on a norm that is not known beforehand.
    """
    if scale == "none":
        return 1.0
    if scale == "original":
        return math.sqrt(max(1.0, rows / cols))
    if scale == "spectral_unclamped":
        return math.sqrt(rows / cols)
    return math.nan if norm is None else MATCHED_RMS * math.sqrt(rows * cols) / norm


def is_finite(shard: Tensor, like: Tensor) -> Tensor:
    """Whether a gradient has neither NaN nor infinity: a 0-dimensional bool, equal on all ranks.

    Args:
        shard: This rank's part of the gradient.
        like: The parameter.
    """
    finite = torch.ones((), dtype=torch.bool, device=shard.device)
    if shard.numel():
        low, high = torch.aminmax(shard)
        finite = low.isfinite() & high.isfinite()
    if isinstance(like, DTensor):
        flag = finite.to(torch.uint8)
        for dim in range(like.device_mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=like.device_mesh.get_group(dim))
        finite = flag.bool()
    return finite


def start_bases(p: Tensor, group: Options, generator: torch.Generator) -> State:
    """Right bases for the rank-k solvers of a parameter, one for each batch of matrices.

    Random, and warmed with the first gradient where there is one: a step has only two iterations.

    Args:
        p: The parameter.
        group: Its group.
        generator: A CPU generator.

    Returns:
        Tensors (count, cols, width) by the names they have in the state; empty where the
        direction needs none.
    """
    if group["alpha"] == 0 or group["algorithm"] == "coordinate":
        return {}
    if group["algorithm"] != "dion" and group["solver"] not in ("auto", "subspace", "lanczos"):
        return {}
    bases, gradients = {}, []
    if p.grad is not None:
        whole = gather(local_grad(p), p)
        gradients = to_matrices(whole, group["layout"], group["splits"])
    for part, shape in enumerate(matrix_shapes(p.shape, group["layout"], group["splits"])):
        rank = _solved_rank(group, shape)
        if rank is not None:
            block = lmo.start_block(shape, rank, device=p.device, generator=generator)
            if group["algorithm"] == "dion":
                block = block[..., :rank]
            elif gradients:
                block = lmo.warmed(gradients[part], block)
            bases[f"basis{part}"] = block
    return bases


def _solved_rank(group: Options, shape: torch.Size) -> int | None:
    """The rank that a solver is asked for; None for the full-rank ones."""
    if group["algorithm"] == "kyfan":
        return 1
    rank = resolve_rank(group["rank"], *shape[-2:])
    return rank if rank < min(shape[-2:]) or group["algorithm"] == "dion" else None


def step_entrywise(group: Options, states: Mapping[Tensor, State]) -> None:
    """Steps a group of adamw or sgd by torch's fused functions.

    These leave a step out when ``found_inf`` is 1, on the device, which is what
    ``nonfinite="skip"`` needs.
    """
    for p in group["params"]:
        if p.grad is None:
            continue
        state, shard = states[p], local(p)
        grad = local_grad(p).to(shard.dtype)
        broken = None
        if group["nonfinite"] == "skip":
            finite = is_finite(grad, p)
            state["skipped"] += ~finite
            broken = 1.0 - finite.float()
        keys = ("exp_avg", "exp_avg_sq") if group["algorithm"] == "adamw" else ("momentum",)
        moments = [local(state[key]) for key in keys]
        tensors = _same_layout([shard, grad, *moments])
        lists = [[t] for t in tensors]
        if group["algorithm"] == "adamw":
            adamw(
                lists[0], lists[1], lists[2], lists[3], [], [state["step"]], fused=True,
                found_inf=broken, amsgrad=False, maximize=False, beta1=group["momentum"],
                beta2=group["beta2"], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"],
            )  # fmt: skip
        else:
            sgd(
                lists[0], lists[1], [*lists[2]], fused=True, found_inf=broken, lr=group["lr"],
                weight_decay=group["weight_decay"], momentum=group["momentum"], dampening=0.0,
                nesterov=group["nesterov"], maximize=False,
            )  # fmt: skip
        for kept, stepped in zip([shard, *moments], [tensors[0], *tensors[2:]], strict=True):
            if kept is not stepped:
                kept.copy_(stepped)


def _same_layout(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, or copies of one memory layout: fused kernels walk memory, not indices."""
    strides = tensors[0].stride()
    dense = torch.empty_like(tensors[0], device="meta").stride() == strides
    if dense and all(t.stride() == strides for t in tensors):
        return tensors
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]


def step_matrices(group: Options, states: Mapping[Tensor, State]) -> None:
    """Steps a group of matrices, same-shape parameters together where that is faster."""
    parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
    for stack in _stacks(parameters):
        updates = [_update_momentum(p, states[p], group) for p in stack]
        batches = [
            to_matrices(gather(update, p), group["layout"], group["splits"])
            for p, (update, _) in zip(stack, updates, strict=True)
        ]
        solved = [
            _directions(
                [batch[part] for batch in batches],
                [states[p] for p in stack],
                [finite for _, finite in updates],
                part,
                group,
            )
            for part in range(len(batches[0]))
        ]
        for i, (p, (_, finite)) in enumerate(zip(stack, updates, strict=True)):
            parts = [directions[i] for directions, _ in solved]
            captured = [taken[i] for _, taken in solved if taken is not None]
            _apply(p, parts, captured, finite, states[p], group)


def _stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    same: dict[Any, list[list[Tensor]]] = {}
    for p in parameters:
        limit = 0 if p.device.type == "cpu" else _STACK_ENTRIES
        stacks = same.setdefault((p.shape, p.dtype, p.device), [[]])
        if stacks[-1] and (len(stacks[-1]) + 1) * p.numel() > limit:
            stacks.append([])
        stacks[-1].append(p)
    for stacks in same.values():
        yield from stacks


def _update_momentum(p: Tensor, state: State, group: Options) -> tuple[Tensor, Tensor]:
    """Updates the momentum; returns what the direction is taken of, and whether to step at all.

    With ``nonfinite="skip"`` a broken gradient is replaced by what leaves the momentum as it is.
    """
    momentum = local(state["momentum"])
    grad = local_grad(p).to(momentum.dtype)
    mu, feedback = group["momentum"], group["error_feedback"]
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    if group["nonfinite"] == "skip":
        finite = is_finite(grad, p)  # in the dtype of the momentum, where it may overflow
        state["skipped"] += ~finite
        grad = torch.where(finite, grad, 0.0 if feedback else momentum)
    if feedback:
        momentum.add_(grad)
        return momentum, finite
    momentum.lerp_(grad, 1 - mu)
    # Never in place on either: both are still needed as they are.
    return (grad.lerp(momentum, mu) if group["nesterov"] else momentum), finite


def _directions(
    batches: list[Tensor],
    states: list[State],
    finites: list[Tensor],
    part: int,
    group: Options,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Scaled directions of the matrices of several parameters, (count, rows, cols) for each.

    With error feedback also what the directions capture of the matrices.
    """
    m = batches[0] if len(batches) == 1 else torch.cat(batches)
    key, count = f"basis{part}", len(batches[0])
    basis = torch.cat([state[key] for state in states]) if key in states[0] else None
    rank = _solved_rank(group, m.shape)
    if basis is not None and rank is not None and basis.shape[-1] < rank:
        # The group's rank was raised.
        basis = lmo.start_block(m.shape, rank, device=m.device).to(basis.dtype)
    d, captured, basis_after = _direction(m, basis, group)
    d = _scaled(d, group)
    if basis is not None and basis_after is not None:
        # A zero matrix has no singular vectors worth keeping, and a skipped step leaves no trace.
        stepped = torch.stack(finites).repeat_interleave(count)[:, None, None]
        kept = stepped & (lmo.largest_entry(m) > 0)
        after = torch.where(kept, basis_after, basis).split(count)
        for state, new in zip(states, after, strict=True):
            state[key] = new.contiguous()
    return d.split(count), None if captured is None else captured.split(count)


def _scaled(d: Tensor, group: Options) -> Tensor:
    """Directions times the step-size factor of their shape."""
    rows, cols = d.shape[-2:]
    scale, known = group["scale"], direction_norm(group, rows, cols)
    if scale == "match_rms_adamw" and known is None:
        norm = lmo.frobenius_norm(d)
        root_mean_square = torch.where(norm == 0, 1.0, norm) / math.sqrt(rows * cols)
        return (d * (MATCHED_RMS / root_mean_square)).to(d.dtype)
    factor = step_size_factor(scale, rows, cols, known)
    return d if factor == 1 else d * factor


def _direction(
    m: Tensor, basis: Tensor | None, group: Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Directions of a batch, what they capture (error feedback), and the basis they leave."""
    rank = _solved_rank(group, m.shape)
    alpha, blend, sign_scale = group["alpha"], group["blend"], group["sign_scale"]
    if group["algorithm"] == "dion":
        assert basis is not None
        x, norm = lmo.unit_frobenius(m)
        p, r, q = lmo.dion(x, basis[..., :rank].to(x.dtype))
        d = lmo.blend_with((p @ q.mT).to(m.dtype), m, alpha, blend, sign_scale)
        return d, (p @ r.mT) * norm, torch.cat([q, basis[..., rank:]], -1)
    ball = group["algorithm"] if group["algorithm"] in ("kyfan", "coordinate") else "fanion"
    pure, triplets = lmo.oracle(
        m, rank=resolve_rank(group["rank"], *m.shape[-2:]), alpha=alpha, ball=ball,
        polar_method=group["polar"], polar_steps=group["polar_steps"], solver=group["solver"],
        warm_start=basis,
    )  # fmt: skip
    d = lmo.blend_with(pure, m, alpha, blend, sign_scale)
    captured = basis_after = None
    if group["error_feedback"]:
        captured = m  # all of it where the rank was clamped to full
    if triplets is not None:
        u, s, vh = triplets
        if group["error_feedback"]:
            captured = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        if basis is not None:
            width = min(vh.shape[-2], basis.shape[-1])
            basis_after = torch.cat([vh[..., :width, :].mT, basis[..., width:]], -1)
    return d, captured, basis_after


def _apply(
    p: Tensor,
    directions: list[Tensor],
    captured: list[Tensor],
    finite: Tensor,
    state: State,
    group: Options,
) -> None:
    """Moves one parameter, and takes what was captured from its momentum."""
    layout, splits, lr, mu = group["layout"], group["splits"], group["lr"], group["momentum"]
    gate = finite.float()
    if captured:
        taken = scatter(from_matrices(captured, p.shape, layout, splits), p)
        momentum = local(state["momentum"])
        momentum.addcmul_(taken.to(momentum.dtype), gate.to(momentum.dtype), value=mu - 1)
    if lr == 0:
        return
    if group["renormalize"]:
        _renormalize(p, gate, layout, splits)
    shard = local(p)
    if group["weight_decay"]:
        decay = lr * group["weight_decay"]
        shard.addcmul_(shard, gate.to(shard.dtype), value=-decay)
    step = scatter(from_matrices(directions, p.shape, layout, splits), p)
    shard.addcmul_(step.to(shard.dtype), gate.to(shard.dtype), value=-lr)


def _renormalize(p: Tensor, gate: Tensor, layout: str, splits: Any) -> None:
    """Scales each matrix of a parameter to Frobenius norm sqrt(rows), where the gate is 1."""
    parts = []
    for m in to_matrices(gather(local(p), p), layout, splits):
        norm = lmo.frobenius_norm(m)
        factor = torch.where((norm > 0) & (gate > 0), math.sqrt(m.shape[-2]) / norm, 1.0)
        parts.append((m * factor).to(m.dtype))  # in fp32: bf16 would round the factor to 1
    local(p).copy_(scatter(from_matrices(parts, p.shape, layout, splits), p))

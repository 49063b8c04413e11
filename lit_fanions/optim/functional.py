"""The steps of ``Fanion`` as functions of a group's options, parameters and their state.

Beside ``fanion.py`` as torch's functional forms are beside its optimizers: the class keeps the
groups and the state in order, what a step computes is here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
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
from lit_fanions.optim.observing import Observation, Observer, Options

Rank = int | float | Literal["full"]
Scale = Literal["none", "original", "match_rms_adamw", "spectral_unclamped"]

# Matrices of the same shape are solved together, as many as have this many entries. Accelerators
# are kept busy with fewer launches; the CPU's matrix products share out batches between threads.
_STACK_ENTRIES = 2**26
_CPU_STACK_ENTRIES = 5 * 2**20
# The largest block, in bytes, by which glibc learns to keep freed memory.
_LEARNED = 31 * 2**20

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


def is_finite(shard: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Whether a gradient has neither NaN nor infinity: a 0-dimensional bool, equal on all ranks.

    Args:
        shard: This rank's part of the gradient.
        like: The parameter.
        dtype: In which to ask, as one of a smaller range overflows; None: the gradient's own.
    """
    finite = torch.ones((), dtype=torch.bool, device=shard.device)
    if shard.numel():
        low, high = (extreme.to(dtype or shard.dtype) for extreme in torch.aminmax(shard))
        finite = low.isfinite() & high.isfinite()
    if isinstance(like, DTensor):
        flag = finite.to(torch.uint8)
        for dim in range(like.device_mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=like.device_mesh.get_group(dim))
        finite = flag.bool()
    return finite


def start_bases(p: Tensor, group: Options, generator: torch.Generator) -> State:
    """Right bases for the rank-k solvers of a parameter, one for each batch of matrices.

    Random, and warmed with the first gradient where there is one: a step has only one iteration.

    Args:
        p: The parameter.
        group: Its group.
        generator: A CPU generator.

    Returns:
        Tensors (count, cols, width) by the names they have in the state; empty where the
        direction needs none.
    """
    widths = [
        _basis_width(group, shape)
        for shape in matrix_shapes(p.shape, group["layout"], group["splits"])
    ]
    if all(width is None for width in widths):
        return {}
    bases, gradients = {}, []
    if p.grad is not None:
        whole = gather(local_grad(p), p)
        gradients = to_matrices(whole, group["layout"], group["splits"])
    for part, shape in enumerate(matrix_shapes(p.shape, group["layout"], group["splits"])):
        width = widths[part]
        if width is not None:
            block = lmo.start_block(
                shape, width, device=p.device, generator=generator, oversampling=0
            )
            if gradients and group["algorithm"] != "dion":
                block = lmo.warmed(gradients[part], block)
            bases[f"basis{part}"] = block
    return bases


def _basis_width(group: Options, shape: torch.Size) -> int | None:
    """Columns of the basis that matrices of that shape need; None where they need none."""
    if group["alpha"] == 0 or group["algorithm"] == "coordinate":
        return None
    rank = _solved_rank(group, shape)
    if rank is None or group["algorithm"] == "dion":
        return rank
    if group["solver"] not in ("auto", "subspace", "lanczos"):
        return None
    return min(rank + group["oversampling"], *shape[-2:])


def _current_basis(basis: Tensor | None, m: Tensor, width: int, group: Options) -> Tensor:
    """The basis that a step starts from: a new one where the state's is none or too narrow.

    Args:
        basis: That of the state, (count, cols, columns), of options that may have changed since.
        m: Matrices, (count, rows, cols).
        width: Columns that it should have.
        group: Their group.
    """
    if basis is not None and basis.shape[-1] >= width:
        return basis[..., :width]
    # A function of the state and of the options: a resumed run makes the same.
    generator = torch.Generator().manual_seed(group["seed"])
    block = lmo.start_block(m.shape, width, device=m.device, generator=generator, oversampling=0)
    return lmo.warmed(m, block).to(block.dtype if basis is None else basis.dtype)


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


def step_matrices(
    group: Options, states: Mapping[Tensor, State], observers: Sequence[Observer] = ()
) -> None:
    """Steps a group of matrices, those of the same shape together where that is faster.

    Args:
        group: The group.
        states: State of each of its parameters.
        observers: Are shown what the step does; the step is the same with and without them.
    """
    parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
    if any(p.device.type == "cpu" for p in parameters):
        _keep_freed_memory()
    for stack in _stacks(parameters, group):
        finites = [_steps(p, states[p], group) for p in stack]
        pieces = _pieces(stack[0], states[stack[0]], group) if len(stack) == 1 else []
        if not pieces:
            _step_stack(stack, [states[p] for p in stack], finites, group, observers)
            continue
        # Each is stepped before the next one is looked at, so that memory is needed for one only.
        alone = {**group, "layout": "batch", "splits": None}
        first = 0
        for piece, state, _ in pieces:
            shown = [_of_whole(observe, stack[0], group, first) for observe in observers]
            _step_stack([piece], [state], finites, alone, shown)
            first += len(piece)
        for part in dict.fromkeys(part for *_, part in pieces):
            own = [state for _, state, place in pieces if place == part]
            bases = [state["basis0"] for state in own if "basis0" in state]
            states[stack[0]].pop(f"basis{part}", None)
            if bases:
                states[stack[0]][f"basis{part}"] = torch.cat(bases)


@functools.cache
def _keep_freed_memory() -> None:
    """Let one stack after the other use the same memory.

    To have memory from the system costs as much as a product of the same size. glibc gives back
    what is freed beyond twice the largest block that was freed before, up to 32 MiB; in a training
    it has often seen such a block. This one is never touched, and so takes no memory.
    """
    torch.empty(_LEARNED, dtype=torch.uint8, device="cpu")


def _steps(p: Tensor, state: State, group: Options) -> Tensor:
    """Whether to step a parameter at all, a 0-dimensional bool; counts where not."""
    if group["nonfinite"] != "skip":
        return torch.ones((), dtype=torch.bool, device=p.device)
    finite = is_finite(local_grad(p), p, state["momentum"].dtype)
    state["skipped"] += ~finite
    return finite


def _pieces(p: Tensor, state: State, group: Options) -> list[tuple[Tensor, State, int]]:
    """A parameter of more matrices than may be solved together, cut into views of so many.

    Returns:
        Views of the parameter, with views of its gradient as theirs, beside their part of the
        state and the number of their part of ``to_matrices``. None where one piece is all, or
        where matrices are not views of the parameter.
    """
    assert p.grad is not None
    if isinstance(p, DTensor) or p.grad.dtype != p.dtype:
        return []
    whole = (p.detach(), state["momentum"])
    weights, momenta, grads = (
        to_matrices(x, group["layout"], group["splits"]) for x in (*whole, p.grad)
    )
    for x, parts in zip(whole, (weights, momenta), strict=True):
        storage = x.untyped_storage().data_ptr()
        if any(part.untyped_storage().data_ptr() != storage for part in parts):
            return []
    limit, pieces = stack_entries(group, p.device), []
    for part, (weight, momentum, grad) in enumerate(zip(weights, momenta, grads, strict=True)):
        size = max(1, limit // weight[0].numel())
        basis = state.get(f"basis{part}")
        for i in range(0, len(weight), size):
            piece = weight[i : i + size]
            piece.grad = grad[i : i + size]
            own = {"momentum": momentum[i : i + size], "skipped": state["skipped"]}
            if basis is not None:
                own["basis0"] = basis[i : i + size]
            pieces.append((piece, own, part))
    return pieces if len(pieces) > 1 else []


def _of_whole(observe: Observer, p: Tensor, group: Options, first: int) -> Observer:
    """An observer of a piece, which tells of the parameter that the piece is of."""
    return lambda seen: observe(seen._replace(parameter=p, group=group, first=first + seen.first))


def _step_stack(
    stack: list[Tensor],
    states: list[State],
    finites: list[Tensor],
    group: Options,
    observers: Sequence[Observer],
) -> None:
    batches = _momenta(stack, states, finites, group)
    # The momenta themselves are not to be overwritten.
    overwrite = len(stack) > 1 or group["nesterov"]
    solved = []
    for part in range(len(batches)):
        m = batches[part]
        batches[part] = m.new_empty(0)  # its memory is needed
        own = _orthogonalises(group, m.shape)  # then it has been normalised to memory of its own
        solved.append(_directions(m, states, finites, part, group, overwrite or own))
        del m
    for i, p in enumerate(stack):
        parts = [directions[i] for directions, *_ in solved]
        captured = [taken[i] for _, taken, _ in solved if taken is not None]
        if observers:
            factors = [_of_parameter(factor, i, len(stack)) for *_, factor in solved]
            _apply_shown(p, parts, captured, finites[i], states[i], group, factors, observers)
        else:
            _apply(p, parts, captured, finites[i], states[i], group)


def _of_parameter(factor: Tensor | float, i: int, count: int) -> Tensor | float:
    """The part that the i-th of some parameters of one shape has of a factor per matrix."""
    return factor.chunk(count)[i] if isinstance(factor, Tensor) else factor


def _apply_shown(
    p: Tensor,
    directions: list[Tensor],
    captured: list[Tensor],
    finite: Tensor,
    state: State,
    group: Options,
    factors: list[Tensor | float],
    observers: Sequence[Observer],
) -> None:
    """``_apply``, shown to the observers."""
    taken = [part.clone() for part in captured]  # they may be the momentum, which is to change
    tensors = (local_grad(p), _looked_at(p, state, finite, group), local(p).clone())
    gradients, momenta, before = (_whole_matrices(x, p, group) for x in tensors)
    _apply(p, directions, captured, finite, state, group)
    first = 0
    for part, after in enumerate(_whole_matrices(local(p), p, group)):
        seen = Observation(
            parameter=p,
            group=group,
            first=first,
            gradient=gradients[part],
            momentum=momenta[part],
            direction=directions[part],
            factor=factors[part],
            captured=taken[part] if taken else None,
            before=before[part],
            after=after,
            finite=finite,
            skipped=state["skipped"],
        )
        for observe in observers:
            observe(seen)
        first += len(after)


def _whole_matrices(shard: Tensor, p: Tensor, group: Options) -> list[Tensor]:
    return to_matrices(gather(shard, p), group["layout"], group["splits"])


def stack_entries(group: Options, device: torch.device) -> int:
    """The most entries of matrices that are solved together; a larger one is solved alone."""
    if group["stack_entries"] is not None:
        return int(group["stack_entries"])
    return _CPU_STACK_ENTRIES if device.type == "cpu" else _STACK_ENTRIES


def _stacks(parameters: list[Tensor], group: Options) -> Iterator[list[Tensor]]:
    """Parameters of one shape each, as many as may be solved together."""
    same: dict[Any, list[list[Tensor]]] = {}
    for p in parameters:
        stacks = same.setdefault((p.shape, p.dtype, p.device), [[]])
        # A CPU shares out a batch of large products between its threads, and gains nothing else.
        shapes = matrix_shapes(p.shape, group["layout"], group["splits"])
        gains = p.device.type != "cpu" or any(_orthogonalises(group, shape) for shape in shapes)
        limit = stack_entries(group, p.device) if gains else 0
        if stacks[-1] and (len(stacks[-1]) + 1) * p.numel() > limit:
            stacks.append([])
        stacks[-1].append(p)
    for stacks in same.values():
        yield from stacks


def _orthogonalises(group: Options, shape: torch.Size) -> bool:
    """Whether directions of matrices of that shape are polar factors, of any scale of them."""
    if group["alpha"] == 0 or group["error_feedback"] or group["algorithm"] == "coordinate":
        return False
    return _solved_rank(group, shape) is None


def _momenta(
    stack: list[Tensor], states: list[State], finites: list[Tensor], group: Options
) -> list[Tensor]:
    """Updates the momenta of parameters of one shape.

    Returns:
        The batches of matrices to take directions of, of all parameters together:
        (parameters * count, rows, cols) for each part. Those to be orthogonalised are of
        Frobenius norm 1, and in the dtype for it: done here, one parameter after the other,
        while it is in the cache.
    """
    batches: list[Tensor] = []
    for i, (p, state, finite) in enumerate(zip(stack, states, finites, strict=True)):
        update = _update_momentum(p, state, finite, group)
        parts = to_matrices(gather(update, p), group["layout"], group["splits"])
        parts = [_prepared(part, group) for part in parts]
        if len(stack) == 1:
            return parts
        batches = batches or [part.new_empty(len(stack), *part.shape) for part in parts]
        for batch, part in zip(batches, parts, strict=True):
            batch[i] = part
    return [batch.flatten(0, 1) for batch in batches]


def _prepared(m: Tensor, group: Options) -> Tensor:
    if not _orthogonalises(group, m.shape):
        return m
    dtype = lmo.polar_dtype(m, group["polar"])
    return lmo.unit_frobenius(m, dtype=dtype, overwrite=group["nesterov"])[0]


def _update_momentum(p: Tensor, state: State, finite: Tensor, group: Options) -> Tensor:
    """Updates the momentum; returns what the direction is taken of.

    With ``nonfinite="skip"`` a broken gradient is replaced by what leaves the momentum as it is.
    """
    momentum = local(state["momentum"])
    grad = _usable_grad(p, momentum, finite, group)
    if group["error_feedback"]:
        momentum.add_(grad)
    else:
        momentum.lerp_(grad, 1 - group["momentum"])
    return _combined(grad, momentum, group)


def _looked_at(p: Tensor, state: State, finite: Tensor, group: Options) -> Tensor:
    """What ``_update_momentum`` returned, once more: meanwhile it may have been overwritten."""
    momentum = local(state["momentum"])
    seen = _combined(_usable_grad(p, momentum, finite, group), momentum, group)
    return seen.clone() if seen is momentum else seen


def _usable_grad(p: Tensor, momentum: Tensor, finite: Tensor, group: Options) -> Tensor:
    """The gradient, or in place of a broken one what leaves the momentum as it is."""
    grad = local_grad(p).to(momentum.dtype)
    # A CPU need not wait to know.
    if group["nonfinite"] == "skip" and (grad.device.type != "cpu" or not finite):
        grad = torch.where(finite, grad, 0.0 if group["error_feedback"] else momentum)
    return grad


def _combined(grad: Tensor, momentum: Tensor, group: Options) -> Tensor:
    if group["error_feedback"] or not group["nesterov"]:
        return momentum
    # Never in place on either: both are still needed as they are.
    return grad.lerp(momentum, group["momentum"])


def _directions(
    m: Tensor,
    states: list[State],
    finites: list[Tensor],
    part: int,
    group: Options,
    overwrite: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Tensor | float]:
    """Scaled directions of the matrices of several parameters, (count, rows, cols) for each.

    With error feedback also what the directions capture of the matrices. Last what they were
    scaled by: a number, or (matrices, 1, 1).
    """
    key, count = f"basis{part}", len(m) // len(states)
    basis, width = None, _basis_width(group, m.shape)
    if width is None:  # an old one would be no good start later
        for state in states:
            state.pop(key, None)
    else:
        each = zip(states, m.split(count), strict=True)
        basis = torch.cat([_current_basis(state.get(key), x, width, group) for state, x in each])
    size = max(1, stack_entries(group, m.device) // m[0].numel())
    ms = m.split(size)
    bases = [None] * len(ms) if basis is None else basis.split(size)
    solved = [_direction(x, b, group, overwrite) for x, b in zip(ms, bases, strict=True)]
    d, captured, basis_after = map(_joined, zip(*solved, strict=True))
    assert d is not None
    if basis is not None and basis_after is not None:
        # A skipped step leaves no trace.
        stepped = torch.stack(finites).repeat_interleave(count)[:, None, None]
        after = torch.where(stepped, basis_after, basis).split(count)
        for state, new in zip(states, after, strict=True):
            state[key] = new.contiguous()
    factor = _factor(d, group)
    d = d if isinstance(factor, float) and factor == 1 else d.mul_(factor)
    return d.split(count), None if captured is None else captured.split(count), factor


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Parts of a batch in one, or None for parts of None."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) > 1 else known[0] if known else None


def _factor(d: Tensor, group: Options) -> Tensor | float:
    """The step-size factor of directions (matrices, rows, cols): a number, or (matrices, 1, 1)."""
    rows, cols = d.shape[-2:]
    scale, known = group["scale"], direction_norm(group, rows, cols)
    if scale == "match_rms_adamw" and known is None:
        norm = lmo.frobenius_norm(d)
        root_mean_square = torch.where(norm == 0, 1.0, norm) / math.sqrt(rows * cols)
        return MATCHED_RMS / root_mean_square
    return step_size_factor(scale, rows, cols, known)


def _direction(
    m: Tensor, basis: Tensor | None, group: Options, overwrite: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Directions of a batch, what they capture (error feedback), and the basis they leave."""
    rank = _solved_rank(group, m.shape)
    alpha, blend, sign_scale = group["alpha"], group["blend"], group["sign_scale"]
    if group["algorithm"] == "dion":
        assert basis is not None
        x, norm = lmo.unit_frobenius(m)
        p, r, q = lmo.dion(x, basis[..., :rank].to(x.dtype))
        d = p @ q.mT
        if alpha != 1:
            d = lmo.blend_part(x, blend, sign_scale).lerp_(d, alpha)
        return d, (p @ r.mT).mul_(norm), _kept(q, basis, norm)
    ball = group["algorithm"] if group["algorithm"] in ("kyfan", "coordinate") else "fanion"
    feedback = group["error_feedback"]
    d, triplets = lmo.solve(
        m, rank=resolve_rank(group["rank"], *m.shape[-2:]), alpha=alpha, blend=blend,
        sign_scale=sign_scale, ball=ball, polar_method=group["polar"],
        polar_steps=group["polar_steps"], solver=group["solver"],
        solver_steps=group["solver_steps"], oversampling=group["oversampling"], warm_start=basis,
        unit=_orthogonalises(group, m.shape), overwrite=overwrite and not feedback,
    )  # fmt: skip
    if triplets is None:
        return d, m if feedback else None, None  # all of it where the rank was clamped to full
    u, s, vh = triplets
    captured = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :] if feedback else None
    return d, captured, None if basis is None else _kept(vh.mT, basis, s[..., :1, None])


def _kept(new: Tensor, basis: Tensor, size: Tensor) -> Tensor:
    """The next basis: new columns for as many of the old, all of the old for a zero matrix."""
    width = min(new.shape[-1], basis.shape[-1])
    new = torch.cat([new[..., :width].to(basis.dtype), basis[..., width:]], -1)
    return torch.where(size > 0, new, basis)


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

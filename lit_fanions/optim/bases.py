"""Right bases of the rank-k solvers: the state by which a step starts where the last one ended.

A basis is (count, cols, width) for each batch of a parameter's matrices, under the key ``basisN``
of the parameter's state, where N is the number of the batch. ``warm``, a bool on the CPU, says
whether a usable gradient has turned the bases yet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_fanions.lmo import Oracle, Triplets, start_block, warmed, widened
from lit_fanions.lmo.block_power import warmed_by_products
from lit_fanions.optim.algorithms import Group, oracle
from lit_fanions.optim.matrices import (
    gather,
    is_distributed,
    local_grad,
    matrix_shapes,
    to_matrices,
)
from lit_fanions.optim.sharded_products import Strips, products_with, strips_to_multiply

State = dict[str, Tensor]
WARM = "warm"


def basis_key(part: int) -> str:
    """Return the key of the basis of a parameter's batch of matrices in its state."""
    return f"basis{part}"


def default_seed() -> int:
    """Return the seed of Lightning's seed_everything, 0 without one.

    Not torch's own seed: where ranks seed torch differently, their bases would differ too.
    """
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else 0


def start_bases(p: Tensor, group: Group, generator: torch.Generator) -> State:
    """Return first bases for the solvers of a parameter, drawn from a CPU generator.

    They are turned towards the gradient where there is one, because a step makes one iteration.
    Returned as entries of the state, ``warm`` among them; empty where no solver needs a basis.
    """
    bases = {}
    for part, shape in enumerate(matrix_shapes(p.shape, group["layout"], group["splits"])):
        columns = oracle(group, *shape[-2:]).basis_columns if shape.numel() else None
        if columns is not None:
            bases[basis_key(part)] = start_block(
                shape, columns, device=p.device, generator=generator, oversampling=0
            )
    if not bases:
        return {}
    return {**warm_bases(p, bases, group), WARM: _flag(_has_usable_gradient(p))}


def warm_bases(p: Tensor, bases: State, group: Group) -> State:
    """Return the bases of a parameter turned towards its gradient, if there is one."""
    if p.grad is None or not bases:
        return bases
    strips = strips_to_multiply(p, group)
    if strips is not None:
        return _warm_by_products(p, bases, group, strips)
    gradients = to_matrices(gather(local_grad(p), p), group["layout"], group["splits"])
    keyed = {basis_key(part): m for part, m in enumerate(gradients)}
    for key, basis in bases.items():
        m = keyed.get(key)
        # The splits may have changed: the step draws other bases then.
        if m is not None and _fits(basis, m) and oracle(group, *m.shape[-2:]).warms_up:
            bases[key] = warmed(m, basis)
    return bases


def _warm_by_products(p: Tensor, bases: State, group: Group, strips: Strips) -> State:
    basis = bases[basis_key(0)]
    if not oracle(group, *p.shape).warms_up or basis.shape[:-1] != (1, p.shape[-1]):
        return bases
    products = products_with(local_grad(p).float().unsqueeze(0).clone(), strips)
    return {basis_key(0): warmed_by_products(products, products.length, basis)}


def is_basis(key: str) -> bool:
    """Return whether a key of a state belongs to a basis."""
    return key.startswith("basis")


def warm_up(p: Tensor, state: State, group: Group) -> None:
    """Turn the bases of a parameter towards its gradient, unless a usable one has done so before.

    Where the state was saved without ``warm``, a momentum of zero tells that it is cold: the
    parameter had no gradient when its state was made, or none that was usable, or the state was
    saved before the first step. Reading the momentum waits for the device, once.
    """
    if WARM not in state:
        if not any(map(is_basis, state)) and not keeps_bases(p, group):
            return
        # Bases that the step is still to make are warmed when they are made.
        cold = any(map(is_basis, state)) and not bool(state["momentum"].any())
        state[WARM] = _flag(not cold)
    elif state[WARM].device.type != "cpu":  # moved there with the rest of the state
        state[WARM] = state[WARM].cpu()
    if not state[WARM]:
        bases = {key: x for key, x in state.items() if is_basis(key)}
        state.update(warm_bases(p, bases, group))
        state[WARM] = _flag(_has_usable_gradient(p))


def keeps_bases(p: Tensor, group: Group) -> bool:
    """Return whether the solvers of a parameter's matrices keep bases."""
    shapes = matrix_shapes(p.shape, group["layout"], group["splits"]) if p.numel() else []
    return any(oracle(group, *shape[-2:]).basis_columns is not None for shape in shapes)


def _flag(value: bool) -> Tensor:
    # On the CPU, so that the host reads it without a wait.
    return torch.tensor(value, device="cpu")


def _has_usable_gradient(p: Tensor) -> bool:
    """Return whether the gradient of a parameter turns a basis: if it is finite and not zero.

    Looking would wait for the device: a gradient on an accelerator counts as usable.
    """
    gradient = p.grad
    if gradient is None:
        return False
    if gradient.device.type != "cpu" or not gradient.numel():
        return True
    # A sum, which shards without entries have too.
    total = gradient.abs().sum(dtype=torch.float64)
    return 0 < float(total.full_tensor() if is_distributed(total) else total) < math.inf


def _take_basis(basis: Tensor | None, m: Tensor, columns: int, seed: int) -> Tensor:
    """Return the basis that a step on matrices m starts from, (count, cols, columns).

    Options may have changed since the stored basis was made. A basis that is missing or belongs to
    other matrices is drawn anew; one that is too narrow gets further columns. Both are drawn from
    the seed and warmed with the matrices, so that a resumed run draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    if basis is None or not _fits(basis, m):
        block = start_block(m.shape, columns, device=m.device, generator=generator, oversampling=0)
        return warmed(m, block).to(block.dtype if basis is None else basis.dtype)
    if basis.shape[-1] < columns:
        return widened(m, basis, columns, generator)
    return basis[..., :columns]


def _fits(basis: Tensor, m: Tensor) -> bool:
    """Return whether a basis belongs to as many matrices, with as many columns, as m has."""
    return (len(basis), basis.shape[-2]) == (len(m), m.shape[-1])


def next_basis(triplets: Triplets, basis: Tensor) -> Tensor:
    """Return the basis for the next step: right singular vectors in place of the old columns.

    Columns that the triplets do not reach stay, and the whole basis of a zero matrix.
    """
    new = triplets.Vh.mT
    width = min(new.shape[-1], basis.shape[-1])
    new = torch.cat([new[..., :width].to(basis.dtype), basis[..., width:]], -1)
    return torch.where(triplets.S.amax(-1)[..., None, None] > 0, new, basis)


def gather_bases(
    states: Sequence[State], m: Tensor, part: int, oracle: Oracle, seed: int
) -> Tensor | None:
    """Return the bases of a batch of matrices of several parameters, (matrices, cols, columns).

    None if the oracle needs no bases: stored bases, which would be stale later, are dropped. Each
    parameter has equally many of the matrices m, which are its batch ``part`` in ``to_matrices``.
    """
    key = basis_key(part)
    columns = oracle.basis_columns
    if columns is None:
        for state in states:
            state.pop(key, None)
        return None
    each = zip(states, m.split(len(m) // len(states)), strict=True)
    return torch.cat([_take_basis(state.get(key), x, columns, seed) for state, x in each])

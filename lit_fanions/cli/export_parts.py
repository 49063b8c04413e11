"""What `python -m lit_fanions export` copies into one file, beside the functions of ``lmo``.

``direction`` and ``partner`` stand for one of the functions above them, whose source the file has
under that name. Code of this module is copied with everything that it uses of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo import (
    Triplets,
    frobenius_norm,
    polar_dtype,
    start_block,
    unit_frobenius,
    warmed,
)
from lit_fanions.lmo.block_power import subspace
from lit_fanions.lmo.factorisations import noise, wide
from lit_fanions.lmo.newton_schulz import iterate
from lit_fanions.lmo.presets import polynomials, rescales
from lit_fanions.optim.algorithms import resolve_rank
from lit_fanions.optim.bases import next_basis
from lit_fanions.optim.step_sizes import MATCHED_RMS, step_size_factor

Group = dict[str, Any]
State = dict[str, Any]  # momentum; of rank-k solvers basis, and cold until it is warmed
Direction = tuple[Tensor, float | None]  # and its Frobenius norm, None where it differs

# The Newton-Schulz method.
POLAR = "auto"
# The (a, b, c) of its steps.
POLYNOMIALS = polynomials(POLAR)
# Whether they are those of x / |x x^T|_F^(1/2).
RESCALE = rescales(POLAR)
# On a CPU an SVD is faster for matrices up to this size.
EXACT_SIZE = 32


def frobenius_partner(x: Tensor, group: Group) -> Tensor:
    """Return matrices of Frobenius norm 1 as they are."""
    return x


def sign_partner(x: Tensor, group: Group) -> Tensor:
    """Return the signs of the entries times sign_scale, in the memory of x."""
    scale = group["sign_scale"]
    return x.sign_().mul_((x.shape[-2] * x.shape[-1]) ** -0.5 if scale is None else scale)


partner: Callable[[Tensor, Group], Tensor] = frobenius_partner


def normalised_direction(m: Tensor, state: State, group: Group) -> Direction:
    """Return M / |M|_F, or its signs."""
    return partner(unit_frobenius(m)[0], group), None


def polar_direction(m: Tensor, state: State, group: Group) -> Direction:
    """Return U V^T by Newton-Schulz iterations."""
    x, _ = unit_frobenius(m, dtype=polar_dtype(m, POLAR))
    return iterate(x, POLYNOMIALS, overwrite=True, rescale=RESCALE), math.sqrt(min(m.shape[-2:]))


def blended_polar_direction(m: Tensor, state: State, group: Group) -> Direction:
    """Return alpha U V^T + (1 - alpha) partner, blended in the last Newton-Schulz product."""
    x, _ = unit_frobenius(m, dtype=polar_dtype(m, POLAR))

    def rest(unit: Tensor) -> Tensor:
        return partner(unit, group)

    alpha: float = group["alpha"]
    d = iterate(x, POLYNOMIALS, alpha=alpha, partner=rest, overwrite=True, rescale=RESCALE)
    return d, None


def rank_k_direction(m: Tensor, state: State, group: Group) -> Direction:
    """Return U_k V_k^T by a block iteration that starts where the last step ended."""
    k = resolve_rank(group["rank"], *m.shape[-2:])
    if k >= min(m.shape[-2:]):
        return polar_direction(m, state, group)
    return leading_part(m, k, state), math.sqrt(k)


def blended_rank_k_direction(m: Tensor, state: State, group: Group) -> Direction:
    """Return alpha U_k V_k^T + (1 - alpha) partner."""
    k = resolve_rank(group["rank"], *m.shape[-2:])
    if k >= min(m.shape[-2:]):
        return blended_polar_direction(m, state, group)
    d = leading_part(m, k, state)
    base = partner(unit_frobenius(m)[0], group)
    return base.lerp_(d.to(base.dtype), group["alpha"]), None


direction: Callable[[Tensor, State, Group], Direction] = polar_direction


def leading_part(m: Tensor, k: int, state: State) -> Tensor:
    """Return U_k V_k^T of matrices, and store the basis for the next step."""
    triplets = leading_triplets(m, state["basis"])
    state["basis"] = next_basis(triplets, state["basis"])
    s = triplets.S[..., :k]
    # The vectors of a zero singular value are arbitrary: D(0) = 0.
    u = triplets.U[..., :k] * ((s > noise(s, s.dtype)) | s.isnan()).unsqueeze(-2)
    return u @ triplets.Vh[..., :k, :]


def leading_triplets(m: Tensor, basis: Tensor) -> Triplets:
    """Return the leading singular triplets of matrices, as many as the basis has columns."""
    if m.device.type != "cpu" or min(m.shape[-2:]) > EXACT_SIZE:
        x = m if m.dtype == torch.float64 else m.float()
        return Triplets(*subspace(x, basis.to(x.dtype), iterations=1))
    x, norm = unit_frobenius(m)
    u, s, vh = (t.to(x) for t in torch.linalg.svd(wide(x), full_matrices=False))
    return Triplets(u, s * norm[..., 0], vh)


def prepare_basis(p: Tensor, state: State, group: Group, generator: torch.Generator) -> None:
    """Draw the basis of a rank-k solver, and turn it towards the first gradient that is usable."""
    rows, cols = p.flatten(1).shape
    k = resolve_rank(group["rank"], rows, cols)
    if k >= min(rows, cols):
        return
    if "basis" not in state:
        width, shape = min(k + group["oversampling"], rows, cols), torch.Size([1, rows, cols])
        start = start_block(shape, width, device=p.device, oversampling=0, generator=generator)
        state.update(basis=start, cold=True)
    if p.grad is None or not state["cold"]:
        return
    m = p.grad.flatten(1)[None]
    if 0 < float(m.abs().sum(dtype=torch.float64)) < math.inf:
        state.update(basis=warmed(m, state["basis"]), cold=False)


def no_basis(p: Tensor, state: State, group: Group, generator: torch.Generator) -> None:
    """Do nothing: the momentum is the only state."""


prepare: Callable[[Tensor, State, Group, torch.Generator], None] = no_basis


def size_factor(d: Tensor, length: float | None, group: Group) -> Tensor | float:
    """Return the factor of the step-size rule, see ``step_size_factor``."""
    rows, cols = d.shape[-2:]
    factor = step_size_factor(group["scale"], rows, cols, length)
    if factor is not None:
        return factor
    norm = frobenius_norm(d)
    return MATCHED_RMS * math.sqrt(rows * cols) / torch.where(norm == 0, 1.0, norm)


def step_parameter(p: Tensor, state: State, group: Group) -> None:
    """Step one parameter, in place.

    A gradient with a NaN, or so large that the momentum would overflow, changes nothing.
    """
    assert p.grad is not None
    momentum, basis = state["momentum"], state.get("basis")
    gradient = p.grad.to(momentum.dtype)
    finite = (gradient.abs() <= torch.finfo(momentum.dtype).max / 2).all()
    gradient = torch.where(finite, gradient, momentum)  # which leaves the momentum as it is
    momentum.lerp_(gradient, 1 - group["momentum"])
    n = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()
    d, length = direction(n.flatten(1)[None], state, group)
    if basis is not None:
        state["basis"] = torch.where(finite, state["basis"], basis)
    d = (d * size_factor(d, length, group)).view_as(p).to(p.dtype)
    move(p, d, finite, group["lr"], group["weight_decay"])


def move(p: Tensor, d: Tensor, finite: Tensor, lr: float, weight_decay: float) -> None:
    """Set p to (1 - lr * weight_decay) * p - lr * d where finite; with one rounding in 16 bits."""
    if weight_decay and p.dtype.itemsize < 4:
        factor = 1 - finite.float() * (lr * weight_decay)
        moved = p * factor.view([1] * p.ndim)  # in float32, as the factor has dimensions
        p.copy_(moved.addcmul_(d, finite, value=-lr))
        return
    if weight_decay:
        p.addcmul_(p, finite, value=-lr * weight_decay)
    p.addcmul_(d, finite, value=-lr)


class Exported(torch.optim.Optimizer):
    """The optimizer of an exported file; its constructor is written by ``export``."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices; convolutions are flattened to out x (in * kernel)."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim < 2:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is no matrix: give vectors, "
                    "embeddings and the output head to torch.optim.AdamW"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state_dict; momenta and bases keep the dtype that they were saved in."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    own = value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                    self.state[p][name] = own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient.

        Args:
            closure: Recomputes the loss and the gradients.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            generator = torch.Generator().manual_seed(group.get("seed", 0))
            for p in group["params"]:  # with a gradient or not: all draw in the first step
                state = self.state[p]
                if not state:
                    # float16 has too little range for sums of gradients.
                    dtype = torch.float32 if p.dtype == torch.float16 else p.dtype
                    state["momentum"] = torch.zeros_like(p, dtype=dtype)
                prepare(p, state, group, generator)
                if p.grad is not None:
                    step_parameter(p, state, group)
        return loss

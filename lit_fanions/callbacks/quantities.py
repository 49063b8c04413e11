"""The quantities that the monitors log, by name; docs/quantities.md explains each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_fanions import lmo
from lit_fanions.lmo.spectrum import QUANTILES, Spectrum, ky_fan, nuclear, spectral
from lit_fanions.optim.functional import resolve_rank

# Every quantity by the name it is logged under, with its title. The part of a name before the
# first underscore is its family.
QUANTITIES = {
    "gradient_dual": "Gradient: dual norm, in the group's own norm",
    "gradient_nuclear": "Gradient: nuclear norm",
    "gradient_kyfan": "Gradient: Ky Fan k norm",
    "gradient_frobenius": "Gradient: Frobenius norm",
    "gradient_spectral": "Gradient: spectral norm",
    "gradient_nuclear_rank": "Gradient: nuclear rank",
    "gradient_energy": "Gradient: energy in rank k",
    "momentum_dual": "Momentum: dual norm, in the group's own norm",
    "momentum_nuclear": "Momentum: nuclear norm",
    "momentum_kyfan": "Momentum: Ky Fan k norm",
    "momentum_frobenius": "Momentum: Frobenius norm",
    "momentum_spectral": "Momentum: spectral norm",
    "momentum_nuclear_rank": "Momentum: nuclear rank",
    "momentum_energy": "Momentum: energy in rank k",
    **{
        f"momentum_quantile{round(100 * q)}": f"Momentum: {round(100 * q)} % quantile of σ / σ₁"
        for q in QUANTILES
    },
    "oracle_quality": "Oracle: ⟨M, D⟩ / dual norm of M",
    "oracle_residual": "Oracle: part of the momentum left to error feedback",
    "update_rms": "Update: root mean square",
    "update_spectral": "Update: spectral norm",
    "update_relative": "Update: ‖ΔW‖ / ‖W‖",
    "update_lr": "Update: lr after the shape rule",
    "update_skipped": "Update: skipped steps so far",
    "weight_spectral": "Weight: spectral norm",
    "weight_stable_rank": "Weight: stable rank",
}


def own_dual(s: Spectrum, x: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The dual of the norm in whose ball a group steps: what its oracle can reach, (...).

    Args:
        s: Spectrum of the matrices.
        x: The matrices, (..., rows, cols).
        group: Options of ``Fanion``'s groups. Of dion the norm is that of fanion.
    """
    alpha, dual = group["alpha"], torch.zeros_like(s.frobenius)
    k = resolve_rank(group["rank"], *x.shape[-2:])
    if alpha and group["algorithm"] == "coordinate":
        dual = alpha * lmo.largest_entry(x)[..., 0, 0].to(dual)
    elif alpha and group["algorithm"] == "kyfan":
        dual = alpha * torch.maximum(spectral(s), nuclear(s) / k)
    elif alpha:
        dual = alpha * (nuclear(s) if k == min(x.shape[-2:]) else ky_fan(s, k))
    if alpha == 1:
        return dual
    if group["blend"] == "frobenius":
        return dual + (1 - alpha) * s.frobenius
    entries = x.abs().sum((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32))
    return dual + (1 - alpha) * group["sign_scale"] * entries.to(dual)

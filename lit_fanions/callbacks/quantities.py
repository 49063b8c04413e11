"""The quantities that the monitors log, by name; docs/quantities.md explains each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_fanions.lmo.spectrum import QUANTILES, Spectrum
from lit_fanions.optim.algorithms import oracle

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
    """Return the dual of the norm in whose ball a group steps: what its oracle can reach, (...).

    Args:
        s: Spectrum of the matrices.
        x: The matrices, (..., rows, cols).
        group: Options of one of ``Fanion``'s matrix groups.
    """
    return oracle(group, *x.shape[-2:]).dual(s, x)

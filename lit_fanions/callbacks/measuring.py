"""Measure every quantity of ``QUANTITIES`` on the matrices of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_fanions import lmo
from lit_fanions.callbacks.quantities import own_dual
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.spectrum import QUANTILES, Spectrum
from lit_fanions.optim.algorithms import resolve_rank
from lit_fanions.optim.observing import Observation

if TYPE_CHECKING:
    from lit_fanions.callbacks.watching import MatrixStep


def measure_step(
    step: MatrixStep, *, exact: bool = False, rank: int | None = None
) -> tuple[dict[str, Tensor], Spectrum | None]:
    """Return every quantity that is known for the matrices of a step.

    Args:
        step: The matrices.
        exact: As in ``spectrum.measure``.
        rank: As in ``SpectralMonitor``.

    Returns:
        Tensors (count,) by the names of ``QUANTITIES``, NaN where a value has no meaning; and the
        spectrum of the momentum or, without one, of the gradient.
    """
    observation = step.observation
    k = _ky_fan_rank(rank, observation, step.before.shape)
    dtype = torch.promote_types(step.before.dtype, torch.float32)
    change = step.after.to(dtype) - step.before.to(dtype)
    values: dict[str, Tensor] = {}
    spectrum = None
    if step.gradient is not None:
        spectrum = spectra.measure(step.gradient, exact=exact)
        values |= _norms_and_ranks("gradient", spectrum, k)
        if observation is not None:
            values["gradient_dual"] = own_dual(spectrum, step.gradient, observation.group)
    if observation is not None:
        spectrum = spectra.measure(observation.momentum, exact=exact)
        values |= _norms_and_ranks("momentum", spectrum, k)
        parts = spectra.quantiles(spectrum).unbind(-1)
        for q, part in zip(QUANTILES, parts, strict=True):
            values[f"momentum_quantile{round(100 * q)}"] = part
        values |= _oracle_quality(observation, spectrum)
    values |= _update_and_weight(step.before, change, exact)
    factor = torch.ones(len(change), device=change.device)
    if observation is not None:
        factor = torch.as_tensor(observation.factor, device=change.device).expand(len(change), 1, 1)
        factor = factor[:, 0, 0]
        values["update_skipped"] = observation.skipped.expand(len(change))
    values["update_lr"] = step.lr * factor
    return values, spectrum


def _ky_fan_rank(rank: int | None, observation: Observation | None, shape: torch.Size) -> int:
    """Return k of the Ky Fan norm: as given, or the group's, or a quarter of full rank."""
    limit = min(shape[-2:])
    if rank is not None:
        return min(rank, limit)
    own = limit if observation is None else resolve_rank(observation.group["rank"], *shape[-2:])
    return own if own < limit else max(1, limit // 4)


def _norms_and_ranks(name: str, s: Spectrum, k: int) -> dict[str, Tensor]:
    return {
        f"{name}_nuclear": spectra.nuclear(s),
        f"{name}_kyfan": spectra.ky_fan(s, k),
        f"{name}_frobenius": s.frobenius,
        f"{name}_spectral": spectra.spectral(s),
        f"{name}_nuclear_rank": spectra.nuclear_rank(s),
        f"{name}_energy": spectra.energy(s, k),
    }


def _oracle_quality(observation: Observation, s: Spectrum) -> dict[str, Tensor]:
    """Return how much of the dual norm the direction attains, and what it left out."""
    dual = own_dual(s, observation.momentum, observation.group)
    values = {"momentum_dual": dual}
    if observation.group["adapt"] == "none":  # else the direction has left the ball
        direction = observation.direction / observation.factor
        values["oracle_quality"] = spectra.inner(observation.momentum, direction) / dual
    if observation.captured is not None:
        rest = observation.momentum - observation.captured.to(observation.momentum.dtype)
        values["oracle_residual"] = lmo.frobenius_norm(rest)[..., 0, 0] / s.frobenius
    return values


def _update_and_weight(before: Tensor, change: Tensor, exact: bool) -> dict[str, Tensor]:
    weights = spectra.measure(before, exact=exact, leading=True)
    changes = spectra.measure(change, exact=exact, leading=True)
    return {
        "update_rms": changes.frobenius / (change.shape[-2] * change.shape[-1]) ** 0.5,
        "update_spectral": spectra.spectral(changes),
        "update_relative": changes.frobenius / weights.frobenius,
        "weight_spectral": spectra.spectral(weights),
        "weight_stable_rank": spectra.stable_rank(weights),
    }

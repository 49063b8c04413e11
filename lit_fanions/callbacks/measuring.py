"""Measure every quantity of ``QUANTITIES`` on the matrices of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_fanions.lmo import Oracle
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.factorisations import wide
from lit_fanions.lmo.spectrum import QUANTILES, Sketch, Spectrum
from lit_fanions.optim.algorithms import oracle, resolve_rank
from lit_fanions.optim.observing import Observation

if TYPE_CHECKING:
    from lit_fanions.callbacks.watching import MatrixStep

# Matrices of one shape are measured together, up to this many entries.
_MOST_ENTRIES = 2**26
# Of these matrices the whole spectrum is measured, of the others the largest singular value.
_WHOLE = ("gradient", "momentum")


class Measured(NamedTuple):
    """Measurements of the matrices of one parameter.

    Quantities have a value for each matrix, (count,), NaN where it has no meaning; spectra are
    those of "momentum" and "gradient", as far as they are known.
    """

    names: list[str]
    group: str
    values: dict[str, Tensor]
    spectra: dict[str, Spectrum]


class _Part(NamedTuple):
    """The matrices of one parameter: what is known of them before they are measured."""

    names: list[str]
    group: str
    shape: torch.Size
    k: int  # of the Ky Fan norm
    lr: float
    oracle: Oracle | None
    numbers: dict[str, Tensor]  # (count,)


class Look:
    """Measures the matrices of a step with one copy from their device.

    ``add`` copies matrices. Products with them run on their device, for all of one shape together.
    ``results`` copies the small matrices that are left to the CPU and decomposes them there.
    """

    def __init__(self, exact: bool = False, rank: int | None = None) -> None:
        self.exact, self.rank = exact, rank
        self._parts: list[_Part] = []
        self._sketches: list[dict[str, Sketch]] = []
        self._waiting: list[dict[str, Tensor]] = []  # matrices of the last parts

    def add(self, step: MatrixStep) -> None:
        """Copy the matrices of one parameter."""
        matrices = _copied_matrices(step)
        waiting = [x for part in (*self._waiting, matrices) for x in part.values()]
        alike = {(x.shape[1:], x.dtype, x.device) for x in waiting}
        if len(alike) > 1 or sum(x.numel() for x in waiting) > _MOST_ENTRIES:
            self._sketch()
        self._waiting.append(matrices)
        self._parts.append(_part(step, self.rank))

    def _sketch(self) -> None:
        """Replace the waiting matrices by their sketches."""
        waiting, self._waiting = self._waiting, []
        sketches: list[dict[str, Sketch]] = [{} for _ in waiting]
        for leading in (False, True):
            keys = [(i, k) for i, x in enumerate(waiting) for k in x if (k in _WHOLE) != leading]
            if keys:
                tensors = [waiting[i][kind] for i, kind in keys]
                sketch = spectra.sketch(torch.cat(tensors), exact=self.exact, leading=leading)
                split = _split(sketch, [*map(len, tensors)])
                for (i, kind), of_part in zip(keys, split, strict=True):
                    sketches[i][kind] = of_part
        self._sketches += sketches

    def results(self) -> Iterator[Measured]:
        """Return what was measured since the last call, parameter by parameter."""
        self._sketch()
        parts, sketches = self._parts, self._sketches
        self._parts, self._sketches = [], []
        copied = _copied_to_cpu([(p.numbers, s) for p, s in zip(parts, sketches, strict=True)])
        for part, (numbers, by_kind) in zip(parts, copied, strict=True):
            found = {kind: spectra.decompose(sketch) for kind, sketch in by_kind.items()}
            values = _quantities(part._replace(numbers=numbers), found)
            known = {kind: found[kind] for kind in _WHOLE if kind in found}
            yield Measured(part.names, part.group, values, known)


def _split(sketch: Sketch, counts: Sequence[int]) -> list[Sketch]:
    fields = (x.split(counts) if isinstance(x, Tensor) else [x] * len(counts) for x in sketch)
    return [Sketch(*values) for values in zip(*fields, strict=True)]


def _copied_to_cpu(data: Any) -> Any:
    """Return nested data with all tensors in float64 on the CPU, by one copy for each device."""
    tensors: list[Tensor] = []
    apply_to_collection(data, Tensor, tensors.append)
    for device in {x.device for x in tensors if x.device.type != "cpu"}:
        indices = [i for i, x in enumerate(tensors) if x.device == device]
        sizes = [tensors[i].numel() for i in indices]
        flat = torch.cat([wide(tensors[i]).flatten() for i in indices]).cpu()
        for i, x in zip(indices, flat.split(sizes), strict=True):
            tensors[i] = x.view(tensors[i].shape)
    remaining = iter(tensors)
    return apply_to_collection(data, Tensor, lambda _: next(remaining).double())


def _copied_matrices(step: MatrixStep) -> dict[str, Tensor]:
    dtype = torch.promote_types(step.before.dtype, torch.float32)
    matrices = {"gradient": step.gradient, "weight": step.before}
    if step.observation is not None:
        matrices["momentum"] = step.observation.momentum
    copies = {kind: x.to(dtype, copy=True) for kind, x in matrices.items() if x is not None}
    return {**copies, "update": step.after.to(dtype) - copies["weight"]}


def _part(step: MatrixStep, rank: int | None) -> _Part:
    count, rows, cols = step.before.shape
    limit, observation = min(rows, cols), step.observation
    k, solver, numbers = limit, None, {}
    if observation is not None:
        k = resolve_rank(observation.group["rank"], rows, cols)
        solver = oracle(observation.group, rows, cols)
        numbers = _products(observation, solver)
    if rank is not None or k == limit:  # the group's rank, unless that is full
        k = min(limit, rank or max(1, limit // 4))
    numbers.setdefault("factor", torch.ones(count, device="cpu"))
    return _Part(step.names, step.group, step.before.shape, k, step.lr, solver, numbers)


def _products(observation: Observation, solver: Oracle) -> dict[str, Tensor]:
    """Return what needs other matrices than the ones that are sketched."""
    momentum, count = observation.momentum, len(observation.before)
    factor = observation.factor
    if not isinstance(factor, Tensor):  # filled on the device: a tensor of it would be a copy
        factor = momentum.new_full((count, 1, 1), factor, dtype=torch.float32)
    numbers = {
        "factor": factor.expand(count, 1, 1)[:, 0, 0],
        "skipped": observation.skipped.expand(count),
    }
    # Norms of a blend are weighted sums, each of a function of the spectrum, which is not known
    # yet, or of the entries: a spectrum of zeros leaves the latter.
    zero = wide(momentum.new_zeros(count, 1))
    blank = Spectrum(zero, zero, zero[:, 0])
    for kind, x in (("gradient", observation.gradient), ("momentum", momentum)):
        numbers[f"{kind}_entries"] = solver.dual(blank, x)
    if observation.group["adapt"] == "none":  # else the direction has left the ball
        numbers["inner"] = spectra.inner(momentum, observation.direction)
    if observation.captured is not None:
        rest = wide(momentum) - wide(observation.captured)
        numbers["rest"] = torch.linalg.vector_norm(rest, dim=(-2, -1))
    return numbers


def _quantities(part: _Part, found: dict[str, Spectrum]) -> dict[str, Tensor]:
    """Return the quantities of measured matrices; ``numbers`` are on the CPU by now."""
    numbers, factor = part.numbers, part.numbers["factor"]
    values: dict[str, Tensor] = {}
    for kind in _WHOLE:
        if kind in found:
            s = found[kind]
            values |= {
                f"{kind}_nuclear": spectra.nuclear(s),
                f"{kind}_kyfan": spectra.ky_fan(s, part.k),
                f"{kind}_frobenius": s.frobenius,
                f"{kind}_spectral": spectra.spectral(s),
                f"{kind}_nuclear_rank": spectra.nuclear_rank(s),
                f"{kind}_energy": spectra.energy(s, part.k),
            }
            if part.oracle is not None:
                of_spectrum = part.oracle.dual(s, torch.zeros(1, *part.shape[1:], device="cpu"))
                values[f"{kind}_dual"] = of_spectrum + numbers[f"{kind}_entries"]
    if "momentum" in found:
        parts = spectra.quantiles(found["momentum"]).unbind(-1)
        for q, quantile in zip(QUANTILES, parts, strict=True):
            values[f"momentum_quantile{round(100 * q)}"] = quantile
    if "inner" in numbers:
        values["oracle_quality"] = numbers["inner"] / factor / values["momentum_dual"]
    if "rest" in numbers:
        values["oracle_residual"] = numbers["rest"] / found["momentum"].frobenius
    weight, update = found["weight"], found["update"]
    values |= {
        "update_rms": update.frobenius / (part.shape[-2] * part.shape[-1]) ** 0.5,
        "update_spectral": spectra.spectral(update),
        "update_relative": update.frobenius / weight.frobenius,
        "update_lr": part.lr * factor,
        "weight_spectral": spectra.spectral(weight),
        "weight_stable_rank": spectra.stable_rank(weight),
    }
    if "skipped" in numbers:
        values["update_skipped"] = numbers["skipped"]
    return values

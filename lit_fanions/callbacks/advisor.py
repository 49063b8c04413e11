"""Suggest a norm to step in, from the gradients of a short run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from lit_fanions import lmo
from lit_fanions.callbacks.activations import ActivationRanks
from lit_fanions.callbacks.lightning_interface import optimizer_steps
from lit_fanions.callbacks.watching import MatrixStep, Watcher
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.presets import polynomials
from lit_fanions.lmo.spectrum import Spectrum
from lit_fanions.optim.parameters import STANDARD_GROUPS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Parts of the momentum's energy and nuclear norm that an advised rank keeps. A spectral step loses
# what a low rank leaves out of the nuclear norm, so that part must be small.
ENERGY, NORM = 0.9, 0.99
# What an advised polar method reaches: part of the dual norm, and value of the lowest tenth of the
# singular values.
QUALITY, LOWEST = 0.98, 0.5
_METHODS = ("polar_express", "cans", "jordan")
_STEPS = range(3, 10)
# Largest advised rank, as a part of the smaller side; and agreement of successive bases from which
# one iteration of a warm-started solver suffices.
_LOW_RANK, _AGREEMENT = 0.25, 0.8
# Leading right singular vectors that are compared between successive steps.
_COMPARED_VECTORS = 4

HEURISTIC = (
    "A heuristic, from the gradients of this run alone: it suggests what to try, and compares no\n"
    "trainings. It does not advise on step sizes: tune lr after every change."
)


class NormAdvisor(Watcher):
    """Print, after a short run, the direction that each matrix favours, and a configuration.

    For each matrix:

    - the nuclear rank of its gradient against the stable rank of the activations that enter it:
      where the first is larger, a spectral step (Muon) promises the larger decrease of the loss,
      otherwise a Euclidean one (Davis & Drusvyatskiy, arXiv 2512.04299). It is known for linear
      layers, convolutions and the input projections of attention;
    - the smallest rank with 90 % of the momentum's energy, which a Euclidean step needs, and with
      99 % of its nuclear norm, with which a rank-k step reaches 99 % of the decrease that a
      spectral step promises;
    - the overlap of the leading singular vectors of successive momenta, on which a warm-started
      rank-k solver depends;
    - the polar method with the fewest steps that brings its momentum to 98 % of the dual norm and
      the lowest tenth of the singular values to .5 (after arXiv 2606.04058).

    The medians over a group give a fragment of a FanionConfig. This is a heuristic. With optimizers
    other than Fanion the gradient stands in for the momentum. Activations are measured by hooks on
    modules: not in compiled modules, nor where a weight is used without calling its module. Each
    matrix is decomposed as a whole, which takes long for large ones.

    Attributes:
        evidence: Matrix -> its measurements.
        table: The printed table of the matrices.
        fragment: The printed configuration, as YAML.

    Args:
        every_n_steps: Interval in optimizer steps; two successive steps are recorded.
        parameters: Patterns of parameter names to measure, with * as wildcard; None measures all.

    Raises:
        ValueError: If the interval is below 1.
    """

    def __init__(self, every_n_steps: int = 10, parameters: Sequence[str] | None = None) -> None:
        super().__init__(every_n_steps, parameters)
        self.evidence: dict[str, Evidence] = {}
        self.table = self.fragment = ""
        self._activations = ActivationRanks()
        self._bases: dict[str, tuple[int, Tensor]] = {}  # matrix -> step, right singular vectors
        self._step = 0

    def is_due(self, step: int) -> bool:
        """Return True for the first step of each interval and the one after it."""
        return step % self.every_n_steps <= 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the measurements of an earlier run."""
        super().on_train_start(trainer, pl_module)
        self.evidence, self._bases = {}, {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        """Measure activations in the batches of a step that is due."""
        self._step = optimizer_steps(trainer)
        if not trainer.barebones and self._step % self.every_n_steps == 0:
            self._activations.attach(pl_module)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        self._activations.detach()
        super().on_train_batch_end(*args, **kwargs)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Remove the hooks and detach from the optimizer."""
        self._activations.detach()
        super().on_exception(*args, **kwargs)

    def record(self, step: MatrixStep) -> None:
        """Measure some matrices, or compare their bases with those of the step before."""
        if step.gradient is None:
            return
        momentum = step.gradient if step.observation is None else step.observation.momentum
        # A finite gradient of 3e38 may make the momentum infinite.
        if not all(bool(x.isfinite().all()) for x in (step.gradient, momentum)):
            return
        if self._step % self.every_n_steps:  # the second of two successive steps
            for i, name in enumerate(step.names):
                if name in self.evidence:
                    self._compare_bases(name, self.evidence[name], momentum[i])
        else:
            self._measure(step, momentum)

    def _measure(self, step: MatrixStep, momentum: Tensor) -> None:
        assert step.gradient is not None
        # As a whole: ranks and polar methods depend on the small singular values.
        limit = min(momentum.shape[-2:])
        gradients = spectra.measure(step.gradient, small=limit)
        momenta = spectra.measure(momentum, small=limit)
        lows = spectra.quantiles(momenta, [0.1])[..., 0]
        options = {} if step.observation is None else step.observation.group
        for i, name in enumerate(step.names):
            if not float(momenta.frobenius[i]) > 0 or not float(gradients.frobenius[i]) > 0:
                continue
            feedback = bool(options.get("error_feedback"))
            new = Evidence(step.group, limit, step.parameter, options.get("splits"), feedback)
            evidence = self.evidence.setdefault(name, new)
            evidence.nuclear_rank.append(float(spectra.nuclear_rank(gradients)[i]))
            ranks = self._activations.by_weight
            activation = ranks.get(name, ranks.get(step.parameter))
            if activation is not None and math.isfinite(activation):
                evidence.stable_rank.append(activation)
            spectrum = Spectrum(momenta.values[i], momenta.weights[i], momenta.frobenius[i])
            evidence.energy_rank.append(smallest_rank(spectrum, ENERGY, power=2))
            evidence.norm_rank.append(smallest_rank(spectrum, NORM, power=1))
            evidence.low.append(float(lows[i]))
            evidence.polar.append(sufficient_polar(spectrum))
            self._compare_bases(name, evidence, momentum[i])

    def _compare_bases(self, name: str, evidence: Evidence, momentum: Tensor) -> None:
        width = max(1, min(_COMPARED_VECTORS, evidence.limit // 4))
        unit = lmo.unit_frobenius(momentum)[0]  # the solver takes entries up to 1e30
        basis = lmo.top_singular(unit, width, solver="subspace").Vh
        step, previous = self._bases.get(name, (None, basis))
        if step == self._step - 1:
            overlap = (previous @ basis.mT).square().sum() / width
            evidence.agreement.append(float(overlap))
        self._bases[name] = (self._step, basis.clone())

    def finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the activations of the step."""
        self._activations.by_weight = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and the configuration."""
        if trainer.barebones:
            return
        self.evidence = {n: self.evidence[n] for n in self.sort_by_parameter(self.evidence)}
        self.table, self.fragment = "NormAdvisor found no matrix with a gradient", ""
        if self.evidence:
            self.table = format_table(self.evidence)
            self.fragment = yaml.safe_dump(advise(self.evidence), sort_keys=False)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"\n{self.table}\n")
            if self.fragment:
                print("\n".join(f"# {line}" for line in HEURISTIC.splitlines()))
                print("# For a FanionConfig, such as the model's or FanionOptimizer's `optimizer`:")
                print(self.fragment)


@dataclass
class Evidence:
    """Measurements of one matrix; the lists have one entry for each recorded step."""

    group: str
    limit: int  # smaller side of the matrix
    parameter: str = ""
    splits: Any = None  # of the parameter into matrices
    feedback: bool = False  # trained with error feedback
    nuclear_rank: list[float] = field(default_factory=list)  # of the gradient
    stable_rank: list[float] = field(default_factory=list)  # of the activations that enter it
    energy_rank: list[int] = field(default_factory=list)  # with 90 % of the momentum's energy
    norm_rank: list[int] = field(default_factory=list)  # with 99 % of its nuclear norm
    # Overlap of the leading right singular subspaces of successive momenta, from 0 to 1.
    agreement: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)  # 10 % quantile of σ / σ₁ of the momentum
    # Polar method and steps that suffice, None where none does.
    polar: list[tuple[str, int] | None] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Nuclear rank of the gradient over stable rank of the activations, if both are known."""
        if not self.nuclear_rank or not self.stable_rank:
            return None
        return fmean(self.nuclear_rank) / fmean(self.stable_rank)


def smallest_rank(s: Spectrum, part: float, *, power: int) -> int:
    """Return the smallest rank with a part of the energy (power 2) or the nuclear norm (power 1).

    The spectrum is that of one matrix, not zero; the part is from 0 to 1.
    """
    shares = (s.values / s.values[0]) ** power * s.weights
    shares = shares / shares.sum()
    sums = shares.cumsum(0)
    last = int((sums < part).sum().clamp(max=len(sums) - 1))
    # A value that stands for several singular values is needed in part only.
    weight, before = float(s.weights[last]), float(sums[last] - shares[last])
    needed = min(weight, (part - before) / max(float(shares[last]), 1e-30) * weight)
    return max(1, math.ceil(float(s.weights[:last].sum()) + needed - 1e-6))


def sufficient_polar(s: Spectrum) -> tuple[str, int] | None:
    """Return the polar method of fewest steps that reaches ``QUALITY`` and ``LOWEST``, or None.

    The method's polynomials are applied to the singular values of one matrix, as ``lmo.polar``
    applies them; up to nine steps are tried.
    """
    start = s.values / s.frobenius
    for steps in _STEPS:
        for method in _METHODS:
            x = start
            for a, b, c in polynomials(method, steps):
                x = x * (a + b * x.square() + c * x.square().square())
            quality = (s.weights * s.values * x).sum() / spectra.nuclear(s)
            images, order = x.sort(descending=True)
            direction = Spectrum(images, s.weights[order], s.frobenius)
            lowest = spectra.quantiles(direction, [0.1])[0] * images[0]
            if quality >= QUALITY and lowest >= LOWEST:
                return method, steps
    return None


def advise(evidence: Mapping[str, Evidence]) -> dict[str, Any]:
    """Return a fragment of a FanionConfig: ``matrix``, and ``overrides`` for other groups."""
    groups: dict[str, list[Evidence]] = {}
    for found in evidence.values():
        groups.setdefault(found.group, []).append(found)
    sections = {name: _section(name, members) for name, members in groups.items()}
    config = {"matrix": sections.pop("matrix")} if "matrix" in sections else {}
    return {**config, "overrides": sections} if sections else config


def _section(name: str, members: Sequence[Evidence]) -> dict[str, Any]:
    """Return the options of a group; a group of the user's own also lists its parameters."""
    if name in STANDARD_GROUPS:
        return _options(members)
    section: dict[str, Any] = {"parameters": list(dict.fromkeys(m.parameter for m in members))}
    if members[0].splits is not None:
        section["splits"] = members[0].splits
    return {**section, **_options(members)}


def _options(members: Sequence[Evidence]) -> dict[str, Any]:
    """Return the options that the matrices of a group favour, by their medians."""
    ratios = [m.ratio for m in members if m.ratio is not None]
    # Weight of the spectral part: a half where both directions promise the same.
    ratio = median(ratios) if ratios else 1.0
    alpha = min(0.95, max(0.05, round(20 * ratio / (1 + ratio)) / 20))
    # A Euclidean step, which ratios below 1 favour, needs the energy, others the nuclear norm.
    needed = [m.norm_rank if m.ratio is None or m.ratio >= 1 else m.energy_rank for m in members]
    ranks = [median(own) for own in needed]
    parts = [rank / m.limit for rank, m in zip(ranks, members, strict=True)]
    if median(parts) <= _LOW_RANK:
        options: dict[str, Any] = {
            "algorithm": "f_fanion", "rank": math.ceil(median(ranks)), "alpha": alpha
        }  # fmt: skip
        agreements = [fmean(m.agreement) for m in members if m.agreement]
        if agreements and median(agreements) < _AGREEMENT:
            options |= {"solver": "subspace", "solver_steps": 2}
        return options
    options = {"algorithm": "f_muon", "rank": "full", "alpha": alpha}
    choices = [choice for m in members for choice in m.polar]
    steps = math.ceil(median([choice[1] if choice else max(_STEPS) for choice in choices]))
    methods = [choice[0] for choice in choices if choice and choice[1] == steps]
    if any(m.feedback for m in members):  # full rank has no error feedback
        options["error_feedback"] = False
    return {**options, "polar": max(_METHODS, key=methods.count), "polar_steps": steps}


def format_table(evidence: Mapping[str, Evidence]) -> str:
    """Return the measurements of each matrix as a line of a table."""
    rows: list[tuple[str, ...]] = [(
        "matrix", "group", "nuclear rank of G", "stable rank of A", "favours",
        f"{ENERGY:.0%} of energy in", f"{NORM:.0%} of norm in", "agreement", "lowest σ/σ₁", "polar",
    )]  # fmt: skip
    for name, found in evidence.items():
        ratio = found.ratio
        sufficient = [choice for choice in found.polar if choice is not None]
        often = 2 * len(sufficient) > len(found.polar)
        polar = max(dict.fromkeys(sufficient), key=sufficient.count) if often else None
        row = (
            name,
            found.group,
            f"{fmean(found.nuclear_rank):.1f}",
            f"{fmean(found.stable_rank):.1f}" if found.stable_rank else "?",
            "?" if ratio is None else "spectral" if ratio >= 1 else "Euclidean",
            f"{median(found.energy_rank):g} of {found.limit}",
            f"{median(found.norm_rank):g}",
            f"{fmean(found.agreement):.2f}" if found.agreement else "?",
            f"{fmean(found.low):.1e}",
            f"{polar[0]} {polar[1]}" if polar else f"> {max(_STEPS)} steps",
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # No line is wrapped: the output is often searched or cut.
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

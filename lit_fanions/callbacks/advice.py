"""Turn what NormAdvisor has measured into a table and a configuration."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.presets import polynomials
from lit_fanions.lmo.spectrum import Spectrum
from lit_fanions.optim.parameters import STANDARD_GROUPS

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

    @property
    def needed_rank(self) -> list[int]:
        """Ranks by energy where a Euclidean step is favoured, otherwise by nuclear norm."""
        return self.energy_rank if self.ratio is not None and self.ratio < 1 else self.norm_rank


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
    ranks = [median(m.needed_rank) for m in members]
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
    table = Table(box=None, pad_edge=False, header_style="")
    for heading in (
        "matrix", "group", "nuclear rank of G", "stable rank of A", "favours",
        f"{ENERGY:.0%} of energy in", f"{NORM:.0%} of norm in", "agreement", "lowest σ/σ₁", "polar",
    ):  # fmt: skip
        table.add_column(heading, no_wrap=True)
    for name, found in evidence.items():
        ratio = found.ratio
        sufficient = [choice for choice in found.polar if choice is not None]
        often = 2 * len(sufficient) > len(found.polar)
        polar = max(dict.fromkeys(sufficient), key=sufficient.count) if often else None
        table.add_row(
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
    text = io.StringIO()
    # Wider than any terminal, so that no line wraps: the output is often searched or cut.
    Console(file=text, width=1000, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

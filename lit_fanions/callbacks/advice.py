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
from lit_fanions.lmo.newton_schulz import polynomials
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
    """Measurements of one matrix; the lists have a number for each recorded step."""

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
    """Return the smallest rank with a part of a sum of powers of the singular values.

    Args:
        s: Spectrum of one matrix, not zero.
        part: The part, from 0 to 1.
        power: 2 for the energy, 1 for the nuclear norm.
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
    """Return the polar method of fewest steps that treats a matrix well enough.

    The method's polynomials are applied to the singular values, as ``lmo.polar`` applies them.

    Args:
        s: Spectrum of one matrix, not zero.

    Returns:
        Method and steps; None if none of up to nine steps brings ⟨m, d⟩ to 98 % of the nuclear
        norm and the lowest tenth of the singular values to .5.
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
    for one in evidence.values():
        groups.setdefault(one.group, []).append(one)
    sections = {name: _section(name, members) for name, members in groups.items()}
    config = {"matrix": sections.pop("matrix")} if "matrix" in sections else {}
    return {**config, "overrides": sections} if sections else config


def _section(name: str, members: Sequence[Evidence]) -> dict[str, Any]:
    """Return the options of a group; a group of the user's own also lists its parameters."""
    if name in STANDARD_GROUPS:
        return _options(members)
    parameters = list(dict.fromkeys(one.parameter for one in members))
    splits = members[0].splits
    split = {} if splits is None else {"splits": splits}
    return {"parameters": parameters, **split, **_options(members)}


def _options(members: Sequence[Evidence]) -> dict[str, Any]:
    """Return the options that the matrices of a group favour, by their medians."""
    ratios = [one.ratio for one in members if one.ratio is not None]
    alpha = _alpha(median(ratios)) if ratios else 0.5
    ranks = [median(one.needed_rank) for one in members]
    parts = [rank / one.limit for rank, one in zip(ranks, members, strict=True)]
    if median(parts) <= _LOW_RANK:
        options: dict[str, Any] = {
            "algorithm": "f_fanion", "rank": math.ceil(median(ranks)), "alpha": alpha
        }  # fmt: skip
        agreements = [fmean(one.agreement) for one in members if one.agreement]
        if agreements and median(agreements) < _AGREEMENT:
            options |= {"solver": "subspace", "solver_steps": 2}
        return options
    options = {"algorithm": "f_muon", "rank": "full", "alpha": alpha}
    choices = [choice for one in members for choice in one.polar]
    steps = math.ceil(median([choice[1] if choice else max(_STEPS) for choice in choices]))
    methods = [choice[0] for choice in choices if choice and choice[1] == steps]
    if any(one.feedback for one in members):  # full rank has no error feedback
        options["error_feedback"] = False
    return {**options, "polar": max(_METHODS, key=methods.count), "polar_steps": steps}


def _alpha(ratio: float) -> float:
    """Return the weight of the spectral part: a half where both directions promise the same."""
    return min(0.95, max(0.05, round(20 * ratio / (1 + ratio)) / 20))


def format_table(evidence: Mapping[str, Evidence]) -> str:
    """Return the measurements of each matrix as a line of a table."""
    table = Table(box=None, pad_edge=False, header_style="")
    for heading in (
        "matrix", "group", "nuclear rank of G", "stable rank of A", "favours",
        f"{ENERGY:.0%} of energy in", f"{NORM:.0%} of norm in", "agreement", "lowest σ/σ₁", "polar",
    ):  # fmt: skip
        table.add_column(heading, no_wrap=True)
    for name, one in evidence.items():
        table.add_row(*_cells(name, one))
    text = io.StringIO()
    # Wider than any terminal, so that no line wraps: the output is often searched or cut.
    Console(file=text, width=1000, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cells(name: str, one: Evidence) -> tuple[str, ...]:
    ratio = one.ratio
    favours = "?" if ratio is None else "spectral" if ratio >= 1 else "Euclidean"
    sufficient = [choice for choice in one.polar if choice is not None]
    polar = None
    if 2 * len(sufficient) > len(one.polar):
        polar = max(set(sufficient), key=sufficient.count)
    return (
        name,
        one.group,
        f"{fmean(one.nuclear_rank):.1f}",
        f"{fmean(one.stable_rank):.1f}" if one.stable_rank else "?",
        favours,
        f"{median(one.energy_rank):g} of {one.limit}",
        f"{median(one.norm_rank):g}",
        f"{fmean(one.agreement):.2f}" if one.agreement else "?",
        f"{fmean(one.low):.1e}",
        f"{polar[0]} {polar[1]}" if polar else f"> {max(_STEPS)} steps",
    )

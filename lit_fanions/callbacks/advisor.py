"""Which norm to step in, guessed from a short run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lit_fanions import lmo
from lit_fanions.callbacks.watching import Seen, Watcher, stepped
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.newton_schulz import polynomials
from lit_fanions.lmo.spectrum import Spectrum
from lit_fanions.optim.factory import configured_group
from lit_fanions.optim.parameters import STANDARD_GROUPS

# Parts of the momentum's energy and of its nuclear norm that a rank must have to be advised. What a
# low rank leaves out of the nuclear norm is lost to a spectral step, so that little may be.
ENERGY, NORM = 0.9, 0.99
# What a polar method must reach: of the dual norm, and at the lowest tenth of the singular values.
QUALITY, LOWEST = 0.98, 0.5
_Rows = Callable[[Sequence[Any]], dict[str, Tensor]]
# Names of inputs, of linear layers and of attention, in their order.
_INPUTS = ("input", "query", "key", "value")
_METHODS = ("polar_express", "cans", "jordan")
_STEPS = range(3, 10)
# Up to which part of the smaller side a low rank is advised, and from which agreement on one
# iteration of a warm start is enough.
_LOW_RANK, _AGREEING = 0.25, 0.8
# Compared between successive steps: so many leading right singular vectors.
_COMPARED = 4
# Rows of activations that are looked at.
_ROWS = 2048

HEURISTIC = (
    "A heuristic, from gradients of this run alone: a sign of where to look, no measurement of\n"
    "training. Step sizes are not advised on; tune lr after every change."
)


@dataclass
class Evidence:
    """What was seen of one matrix, a number for each look.

    Attributes:
        group: Its group in the configuration.
        limit: Its smaller side.
        parameter: What it is of.
        splits: How that is split into matrices.
        feedback: Whether it was trained with error feedback.
        nuclear_rank: Of the gradient.
        stable_rank: Of the activations that enter it.
        energy_rank: The smallest rank with 90 % of the momentum's energy.
        norm_rank: The smallest rank with 99 % of the momentum's nuclear norm.
        agreement: Of the leading right singular subspaces of successive momenta, from 0 to 1.
        low: The lowest tenth of the momentum's singular values, relative to the largest.
        polar: Method and steps that its singular values need, None if none suffices.
    """

    group: str
    limit: int
    parameter: str = ""
    splits: Any = None
    feedback: bool = False
    nuclear_rank: list[float] = field(default_factory=list)
    stable_rank: list[float] = field(default_factory=list)
    energy_rank: list[int] = field(default_factory=list)
    norm_rank: list[int] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    polar: list[tuple[str, int] | None] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Nuclear rank of the gradient over stable rank of the activations, if both are known."""
        if not self.nuclear_rank or not self.stable_rank:
            return None
        return fmean(self.nuclear_rank) / fmean(self.stable_rank)

    @property
    def rank_wanted(self) -> list[int]:
        """By energy where a Euclidean step is favoured, else by nuclear norm."""
        return self.energy_rank if self.ratio is not None and self.ratio < 1 else self.norm_rank


class NormAdvisor(Watcher):
    """Prints, after a short run, which direction each matrix's gradients favour, and a config.

    For each matrix:

    - the nuclear rank of its gradient against the stable rank of the activations that enter it:
      where the first is larger, a spectral step (Muon) promises the larger decrease of the loss,
      else a Euclidean one (Davis & Drusvyatskiy, arXiv 2512.04299). Known for linear layers,
      convolutions and attention's input projections;
    - the smallest rank that has 90 % of the momentum's energy, which is what a Euclidean step asks
      for, and that with 99 % of its nuclear norm, with which a rank-k step reaches 99 % of the
      decrease that a spectral one promises;
    - how far the leading singular vectors of successive momenta agree, which is what a warm-started
      rank-k solver lives on;
    - which polar method with how many steps brings its momentum to 98 % of the dual norm and the
      lowest tenth of the singular values to .5 (after arXiv 2606.04058).

    From their medians over a group it makes a fragment for a FanionConfig. This is a heuristic.
    With optimizers other than Fanion the gradient stands for the momentum. Activations are seen by
    hooks on the modules, and so neither in compiled ones nor where a weight is used without calling
    its module. Matrices are decomposed as a whole, which takes a while for large ones.

    Attributes:
        evidence: Matrix -> what was seen of it.
        table: What is printed of the matrices.
        fragment: The YAML.

    Args:
        every_n_steps: Interval in optimizer steps; two steps in a row are looked at.
        parameters: Patterns of the names of parameters to look at, * for anything; None: all.

    Raises:
        ValueError: If the interval is below 1.
    """

    def __init__(self, every_n_steps: int = 10, parameters: Sequence[str] | None = None) -> None:
        super().__init__(every_n_steps, parameters)
        self.evidence: dict[str, Evidence] = {}
        self.table = self.fragment = ""
        self._activations: dict[str, float] = {}  # parameter, or matrix of it -> stable rank
        self._bases: dict[str, tuple[int, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._step = 0

    def _is_due(self, step: int) -> bool:
        return step % self.every_n_steps <= 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run."""
        super().on_train_start(trainer, pl_module)
        self.evidence, self._bases = {}, {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        """Looks at activations on their way, in the batches of a step that is due."""
        self._step = stepped(trainer)
        if trainer.barebones or self._step % self.every_n_steps:
            return
        modules = dict(pl_module.named_modules())
        # A hook would have a compiled network compiled once more, and rounded otherwise.
        compiled = [path for path, module in modules.items() if _is_compiled(module)]
        for path, module in modules.items():
            rows = _inputs_of(module)
            inside = any(f"{path}.".startswith(f"{outer}.") or not outer for outer in compiled)
            if rows is not None and not inside:
                look = self._hook(path, rows)
                self._handles.append(module.register_forward_pre_hook(look, with_kwargs=True))

    def _hook(self, path: str, rows: _Rows) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = [*args, *(kwargs[name] for name in _INPUTS if name in kwargs)]
            if not module.training or not inputs or not isinstance(inputs[0], Tensor):
                return
            with torch.no_grad():
                for leaf, x in rows(inputs).items():
                    x = x[:: max(1, len(x) // _ROWS)][:_ROWS]
                    spectrum = spectra.measure(x, leading=True)
                    value = float(spectra.stable_rank(spectrum))
                    self._activations[f"{path}.{leaf}" if path else leaf] = value

        return look

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Lets go of the modules."""
        self._unhook()
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves modules and optimizer alone."""
        self._unhook()
        super().on_exception(trainer, pl_module, exception)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _look(self, seen: Seen) -> None:
        if seen.gradient is None or not bool(seen.gradient.isfinite().all()):
            return
        momentum = seen.gradient if seen.inside is None else seen.inside.momentum
        limit = min(momentum.shape[-2:])
        if self._step % self.every_n_steps:  # the second of two steps is looked at for this alone
            for i, name in enumerate(seen.names):
                if name in self.evidence:
                    self._compare(name, self.evidence[name], momentum[i])
            return
        # As a whole: ranks and polar methods hang on the small singular values.
        gradients = spectra.measure(seen.gradient, small=limit)
        momenta = spectra.measure(momentum, small=limit)
        lows = spectra.quantiles(momenta, [0.1])[..., 0]
        options = {} if seen.inside is None else seen.inside.group
        for i, name in enumerate(seen.names):
            if not float(momenta.frobenius[i]) > 0 or not float(gradients.frobenius[i]) > 0:
                continue
            found = self.evidence.setdefault(
                name,
                Evidence(
                    configured_group(seen.group),
                    limit,
                    seen.parameter,
                    options.get("splits"),
                    bool(options.get("error_feedback")),
                ),
            )
            found.nuclear_rank.append(float(spectra.nuclear_rank(gradients)[i]))
            activation = self._activations.get(name, self._activations.get(seen.parameter))
            if activation is not None and math.isfinite(activation):
                found.stable_rank.append(activation)
            one = Spectrum(momenta.values[i], momenta.weights[i], momenta.frobenius[i])
            found.energy_rank.append(rank_with(one, ENERGY, power=2))
            found.norm_rank.append(rank_with(one, NORM, power=1))
            found.low.append(float(lows[i]))
            found.polar.append(polar_needed(one))
            self._compare(name, found, momentum[i])

    def _compare(self, name: str, found: Evidence, m: Tensor) -> None:
        width = max(1, min(_COMPARED, found.limit // 4))
        basis = lmo.top_singular(m, width, solver="subspace").Vh
        before = self._bases.get(name)
        if before is not None and before[0] == self._step - 1:
            overlap = (before[1] @ basis.mT).square().sum() / width
            found.agreement.append(float(overlap))
        self._bases[name] = (self._step, basis.clone())

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._activations = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what was found."""
        if trainer.barebones:
            return
        self.evidence = {name: self.evidence[name] for name in self._in_order(self.evidence)}
        if not self.evidence:
            self.table, self.fragment = "NormAdvisor saw no matrix with a gradient", ""
        else:
            self.table = table(self.evidence)
            self.fragment = yaml.safe_dump(advice(self.evidence), sort_keys=False)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"\n{self.table}\n")
            if self.fragment:
                print("\n".join(f"# {line}" for line in HEURISTIC.splitlines()))
                print("# For a FanionConfig, such as the model's or FanionOptimizer's `optimizer`:")
                print(self.fragment)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _inputs_of(module: nn.Module) -> _Rows | None:
    """How the arguments of a module's forward become rows that its matrices multiply."""
    if isinstance(module, nn.Linear):
        return lambda args: {"weight": _rows(args[0])}
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1:
        return lambda args: {"weight": _patches(module, args[0].detach())}
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return lambda args: {f"in_proj_weight[{i}]": _rows(x) for i, x in enumerate(args[:3])}
    return None


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution's flattened weight multiplies, (patches, inputs * kernel)."""
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:
        x = x.unsqueeze(0)
    places = x[0, 0].numel()
    x = x[: max(1, 4 * _ROWS // places)].float()  # a few images have patches enough
    x = F.pad(x, [pad for size in reversed(_paddings(module)) for pad in size])
    if dims == 1:
        x = x.unsqueeze(-2)
    ones = (1,) * (2 - dims)
    unfolded = F.unfold(
        x,
        kernel_size=(*ones, *module.kernel_size),
        dilation=(*ones, *module.dilation),
        stride=(*ones, *module.stride),
    )
    return unfolded.mT.flatten(0, 1)


def _paddings(module: nn.Conv1d | nn.Conv2d) -> list[tuple[int, int]]:
    """Zeros before and after each dimension; other ways to pad are taken for zeros."""
    if not isinstance(module.padding, str):
        return [(size, size) for size in module.padding]
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    same = module.padding == "same"
    return [(span // 2, span - span // 2) if same else (0, 0) for span in spans]


def rank_with(s: Spectrum, part: float, *, power: int) -> int:
    """The smallest rank that has a part of the sum of powers of a matrix's singular values.

    Args:
        s: Spectrum of one matrix, not zero.
        part: From 0 to 1.
        power: 2 for the energy, 1 for the nuclear norm.
    """
    shares = (s.values / s.values[0]) ** power * s.weights
    shares = shares / shares.sum()
    sums = shares.cumsum(0)
    at = int((sums < part).sum().clamp(max=len(sums) - 1))
    # Where one value stands for several, the part of them that is needed.
    weight, before = float(s.weights[at]), float(sums[at] - shares[at])
    inside = min(weight, (part - before) / max(float(shares[at]), 1e-30) * weight)
    return max(1, math.ceil(float(s.weights[:at].sum()) + inside - 1e-6))


def polar_needed(s: Spectrum) -> tuple[str, int] | None:
    """The polar method of fewest steps that treats a matrix well enough.

    Its polynomials are applied to the singular values, as ``lmo.polar`` applies them.

    Args:
        s: Spectrum of one matrix, not zero.

    Returns:
        Method and steps; None if none of up to nine steps brings <m, d> to 98 % of the nuclear norm
        and the lowest tenth of the singular values to .5.
    """
    start = s.values / s.frobenius
    for steps in _STEPS:
        for method in _METHODS:
            x = start
            for a, b, c in polynomials(method, steps):
                x = x * (a + b * x.square() + c * x.square().square())
            quality = (s.weights * s.values * x).sum() / spectra.nuclear(s)
            images, order = x.sort(descending=True)
            imaged = Spectrum(images, s.weights[order], s.frobenius)
            lowest = spectra.quantiles(imaged, [0.1])[0] * images[0]
            if quality >= QUALITY and lowest >= LOWEST:
                return method, steps
    return None


def advice(evidence: Mapping[str, Evidence]) -> dict[str, Any]:
    """A fragment of a FanionConfig.

    Args:
        evidence: Matrix -> what was seen of it.

    Returns:
        The section ``matrix``, and ``overrides`` for other groups of the configuration.
    """
    groups: dict[str, list[Evidence]] = {}
    for found in evidence.values():
        groups.setdefault(found.group, []).append(found)
    sections = {name: _section(name, members) for name, members in groups.items()}
    config: dict[str, Any] = {}
    if "matrix" in sections:
        config["matrix"] = sections.pop("matrix")
    if sections:
        config["overrides"] = sections
    return config


def _section(name: str, members: Sequence[Evidence]) -> dict[str, Any]:
    """What a group favours; one of the user's own says whose it is, as its configuration does."""
    if name in STANDARD_GROUPS:
        return _options(members)
    parameters = list(dict.fromkeys(found.parameter for found in members))
    splits = members[0].splits
    split = {} if splits is None else {"splits": splits}
    return {"parameters": parameters, **split, **_options(members)}


def _options(members: Sequence[Evidence]) -> dict[str, Any]:
    """What the matrices of a group favour, by their medians."""
    ratios = [found.ratio for found in members if found.ratio is not None]
    alpha = _alpha(median(ratios)) if ratios else 0.5
    ranks = [median(found.rank_wanted) for found in members]
    parts = [rank / found.limit for rank, found in zip(ranks, members, strict=True)]
    if median(parts) <= _LOW_RANK:
        options: dict[str, Any] = {
            "algorithm": "f_fanion", "rank": math.ceil(median(ranks)), "alpha": alpha
        }  # fmt: skip
        agreements = [fmean(found.agreement) for found in members if found.agreement]
        if agreements and median(agreements) < _AGREEING:
            options |= {"solver": "subspace", "solver_steps": 2}
        return options
    options = {"algorithm": "f_muon", "rank": "full", "alpha": alpha}
    needed = [choice for found in members for choice in found.polar]
    steps = [choice[1] if choice else max(_STEPS) for choice in needed]
    wanted = math.ceil(median(steps))
    methods = [choice[0] for choice in needed if choice and choice[1] == wanted]
    method = max(_METHODS, key=methods.count)
    if any(found.feedback for found in members):  # there is none of full rank
        options["error_feedback"] = False
    return {**options, "polar": method, "polar_steps": wanted}


def _alpha(ratio: float) -> float:
    """The weight of the spectral part: a half where both directions promise the same."""
    return min(0.95, max(0.05, round(20 * ratio / (1 + ratio)) / 20))


def table(evidence: Mapping[str, Evidence]) -> str:
    """What was seen of each matrix, one a line."""
    header = (
        "matrix", "group", "nuclear rank of G", "stable rank of A", "favours",
        f"{ENERGY:.0%} of energy in", f"{NORM:.0%} of norm in", "agreement", "lowest σ/σ₁", "polar",
    )  # fmt: skip
    rows = [header, *(_row(name, found) for name, found in evidence.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(name: str, found: Evidence) -> tuple[str, ...]:
    ratio = found.ratio
    favours = "?" if ratio is None else "spectral" if ratio >= 1 else "Euclidean"
    needed = [choice for choice in found.polar if choice is not None]
    polar = max(set(needed), key=needed.count) if 2 * len(needed) > len(found.polar) else None
    return (
        name,
        found.group,
        f"{fmean(found.nuclear_rank):.1f}",
        f"{fmean(found.stable_rank):.1f}" if found.stable_rank else "?",
        favours,
        f"{median(found.energy_rank):g} of {found.limit}",
        f"{median(found.norm_rank):g}",
        f"{fmean(found.agreement):.2f}" if found.agreement else "?",
        f"{fmean(found.low):.1e}",
        f"{polar[0]} {polar[1]}" if polar else f"> {max(_STEPS)} steps",
    )

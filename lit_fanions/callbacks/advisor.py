"""Suggest a norm to step in, from the gradients of a short run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from lit_fanions import lmo
from lit_fanions.callbacks import advice
from lit_fanions.callbacks.activations import ActivationRanks
from lit_fanions.callbacks.advice import Evidence
from lit_fanions.callbacks.lightning_interface import optimizer_steps
from lit_fanions.callbacks.watching import MatrixStep, Watcher
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.spectrum import Spectrum

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

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
            evidence.energy_rank.append(advice.smallest_rank(spectrum, advice.ENERGY, power=2))
            evidence.norm_rank.append(advice.smallest_rank(spectrum, advice.NORM, power=1))
            evidence.low.append(float(lows[i]))
            evidence.polar.append(advice.sufficient_polar(spectrum))
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
            self.table = advice.format_table(self.evidence)
            self.fragment = yaml.safe_dump(advice.advise(self.evidence), sort_keys=False)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"\n{self.table}\n")
            if self.fragment:
                print("\n".join(f"# {line}" for line in HEURISTIC.splitlines()))
                print("# For a FanionConfig, such as the model's or FanionOptimizer's `optimizer`:")
                print(self.fragment)

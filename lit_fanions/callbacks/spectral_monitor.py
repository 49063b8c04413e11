"""Log what the optimizer does to each matrix: norms, ranks, the oracle's quality, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lit_fanions.callbacks import figures
from lit_fanions.callbacks.lightning_interface import optimizer_steps, tensorboard_writer
from lit_fanions.callbacks.measuring import Look, Measured
from lit_fanions.callbacks.watching import MatrixStep, Watcher, log_values
from lit_fanions.checks import check_flag, whole_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Number of recorded steps that the figures show; beyond it every other one is dropped.
_MAX_HISTORY = 512


class SpectralMonitor(Watcher):
    """Log the spectra of gradients, momenta, updates and weights, matrix by matrix.

    Every value is logged as ``spectral/QUANTITY/MATRIX``, such as
    ``spectral/momentum_nuclear/blocks.0.up.weight``, and its mean over a parameter group as
    ``spectral/QUANTITY/group/GROUP``; the quantities are those of ``callbacks.quantities``,
    explained in docs/quantities.md. They go to every logger and to EarlyStopping and
    ModelCheckpoint, which may monitor them. TensorBoard also gets histograms of the momentum's
    singular values (in powers of ten of the largest), a page of custom scalars and, after each
    validation, two figures. Lightning may be ``lightning`` or ``pytorch_lightning``.

    With Fanion the values come from inside its step. For other optimizers, and for Fanion's groups
    of adamw and sgd, gradients, weights and updates of those parameters are logged that
    ``split_parameters`` calls matrices; their weights are copied for this.

    Training is bit-equal to a run without the monitor.

    Args:
        every_n_steps: Interval in optimizer steps, starting with the first step.
        exact: Singular value decompositions in float64, instead of estimates whose errors
            ``spectrum.measure`` states.
        rank: k of the Ky Fan norm and of the energy; None: the group's own rank, or a quarter of
            the smaller side where that rank is full.
        parameters: Patterns of parameter names to log, with * as wildcard; None logs all.

    Raises:
        ValueError: If the interval or the rank is below 1.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        exact: bool = False,
        rank: int | None = None,
        parameters: Sequence[str] | None = None,
    ) -> None:
        super().__init__(every_n_steps, parameters)
        self.exact = check_flag("exact", exact)
        self.rank = None if rank is None else whole_number("rank", rank)
        self._look = Look(exact, self.rank)
        self._spectra: dict[str, figures.Sample] = {}
        self._history: dict[int, dict[str, float]] = {}  # step -> matrix -> stable rank
        self._recorded_step = self._drawn_step = -1
        self._warned: set[str] = set()
        self._has_layout = False

    @property
    def state_key(self) -> str:
        """Key that keeps the states of monitors with different arguments apart."""
        return self._generate_state_key(
            every_n_steps=self.every_n_steps,
            exact=self.exact,
            rank=self.rank,
            parameters=self.parameters,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history that the figures show, and the step counts."""
        return {"history": dict(self._history), "taken": dict(self._step_counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and the step counts."""
        self._history = {int(step): dict(v) for step, v in state_dict["history"].items()}
        self._step_counts = dict(state_dict["taken"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if there is no logger, or another monitor of the same matrices."""
        self._has_layout = False
        silent = trainer.fast_dev_run or trainer.barebones  # type: ignore[attr-defined]
        if stage == "fit" and not trainer.loggers and not silent:
            self._warn(
                "SpectralMonitor has no logger to log to; its values can only be monitored by "
                "EarlyStopping and ModelCheckpoint"
            )
        monitors = [own for own in trainer.callbacks if isinstance(own, SpectralMonitor)]  # type: ignore[attr-defined]
        if monitors[0] is not self and monitors[0].parameters == self.parameters:
            self._warn(
                "two SpectralMonitors log the same matrices under the same names: leave one out, "
                "or give them different parameters"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the history, unless the run is resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is None and optimizer_steps(trainer) == 0:
            self._history, self._spectra = {}, {}
        self._look = Look(self.exact, self.rank)
        self._recorded_step = self._drawn_step = max(self._history, default=-1)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)

    def record(self, step: MatrixStep) -> None:
        """Copy the matrices, to be measured when all of the step are there."""
        self._look.add(step)

    def finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, and log the values and, to TensorBoard, the histograms."""
        values: dict[str, dict[str, float]] = {}  # quantity -> matrix -> value
        groups: dict[str, str] = {}  # matrix -> group
        for found in self._look.results():
            groups |= dict.fromkeys(found.names, found.group)
            for quantity, numbers in found.values.items():
                named = zip(found.names, numbers.tolist(), strict=True)
                finite = {name: x for name, x in named if math.isfinite(x)}
                values.setdefault(quantity, {}).update(finite)
            self._spectra |= _samples(found)
        step, samples = optimizer_steps(trainer), self._spectra
        if not values:  # a gradient scaler has skipped the step
            return
        self._recorded_step = step
        tagged = log_values(trainer, values, groups)
        ranks = values.get("weight_stable_rank", {})
        if ranks:
            self._history[step] = {name: ranks[name] for name in self.sort_by_parameter(ranks)}
        if len(self._history) > _MAX_HISTORY:
            self._history = dict(list(self._history.items())[::2])
        for logger in trainer.loggers:
            writer = tensorboard_writer(logger) if trainer.is_global_zero else None
            if writer is None:
                continue
            if not self._has_layout:
                writer.add_custom_scalars(figures.custom_scalars(tagged))
            for name in groups:
                if name in samples:
                    figures.add_histogram(writer, name, samples[name], step)
        self._has_layout = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures if there are newly recorded steps."""
        if trainer.sanity_checking or self._recorded_step <= self._drawn_step:
            return
        self._drawn_step = self._recorded_step
        self.draw(trainer)

    def draw(self, trainer: Trainer) -> bool:
        """Draw stable ranks and spectra for TensorBoard; return True if anything was drawn."""
        if not trainer.is_global_zero:
            return False
        writers = list(filter(None, map(tensorboard_writer, trainer.loggers)))
        if not writers:
            return False
        drawn = {}
        if self._history:
            drawn["stable_rank"] = figures.stable_ranks(self._history)
        if self._spectra:
            names = self.sort_by_parameter(self._spectra)
            drawn["singular_values"] = figures.spectra({n: self._spectra[n] for n in names})
        for name, figure in drawn.items():
            for writer in writers:
                figures.add_figure(writer, name, figure, optimizer_steps(trainer))
        return bool(drawn)


def _samples(found: Measured) -> dict[str, figures.Sample]:
    """Return the spectra of the momenta, or of the gradients where there are none."""
    source = "momentum" if "momentum" in found.spectra else "gradient"
    if source not in found.spectra:
        return {}
    values, weights, *_ = found.spectra[source]
    rows = zip(found.names, values.tolist(), weights.tolist(), strict=True)
    return {
        name: figures.Sample(sigmas, counts, source)
        for name, sigmas, counts in rows
        if 0 < sigmas[0] < math.inf
    }

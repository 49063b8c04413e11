"""Logs what the optimizer does to each matrix: norms, ranks, the oracle's quality, the update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_fanions import lmo
from lit_fanions.callbacks import figures, quantities
from lit_fanions.callbacks.watching import Seen, Watcher, positive_int, stepped
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.lmo.spectrum import QUANTILES, Spectrum
from lit_fanions.optim.algorithms import resolve_rank
from lit_fanions.optim.factory import configured_group
from lit_fanions.optim.observing import Observation

# So many looks are remembered for the figures; beyond that every other one is forgotten.
_REMEMBERED = 512
# A histogram's buckets, in powers of ten of the largest singular value.
_LOWEST, _BUCKET = -6.0, 0.1

# Charts of TensorBoard's custom scalars, by norm: title -> quantities.
LAYOUT = {
    "The group's own norm": {
        "dual norm": ["gradient_dual", "momentum_dual"],
        "oracle quality": ["oracle_quality"],
        "effective lr": ["update_lr"],
    },
    "Nuclear norm": {
        "norm": ["gradient_nuclear", "momentum_nuclear"],
        "nuclear rank": ["gradient_nuclear_rank", "momentum_nuclear_rank"],
    },
    "Ky Fan k norm": {
        "norm": ["gradient_kyfan", "momentum_kyfan"],
        "energy in rank k": ["gradient_energy", "momentum_energy"],
    },
    "Frobenius norm": {
        "norm": ["gradient_frobenius", "momentum_frobenius"],
        "update": ["update_rms", "update_relative"],
    },
    "Spectral norm": {
        "norm": ["gradient_spectral", "momentum_spectral"],
        "update": ["update_spectral"],
        "weight": ["weight_spectral"],
        "stable rank": ["weight_stable_rank"],
    },
}


class SpectralMonitor(Watcher):
    """Logs the spectra of gradients, momenta, updates and weights, matrix by matrix.

    Every value is logged as ``QUANTITY/MATRIX``, such as ``momentum_nuclear/blocks.0.up.weight``,
    and its mean over a parameter group as ``QUANTITY/group/GROUP``; quantities are those of
    ``callbacks.quantities``, explained in docs/quantities.md. They go to every logger, and to
    EarlyStopping and ModelCheckpoint, which may monitor them. TensorBoard gets histograms of the
    momentum's singular values (in powers of ten of the largest), a page of custom scalars, and
    after each validation a figure, if matplotlib is installed.

    With Fanion everything is taken from inside its step. Other optimizers, and Fanion's groups of
    adamw and sgd, show gradients, weights and what the step made of them, for those parameters
    that ``split_parameters`` calls matrices; for this their weights are copied.

    Training goes on exactly as without the monitor, to the bit.

    Args:
        every_n_steps: Interval in optimizer steps, from the first one on.
        exact: Singular value decompositions in float64, instead of estimates whose errors
            ``spectrum.measure`` states.
        rank: k of the Ky Fan norm and of the energy; None: the group's own rank, and a quarter of
            the smaller side where that is full.
        parameters: Patterns of the names of parameters to look at, * for anything; None: all.

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
        self.exact = exact
        self.rank = None if rank is None else positive_int(rank, "rank")
        self._values: dict[str, dict[str, float]] = {}  # quantity -> matrix -> value
        self._groups: dict[str, str] = {}  # matrix -> group
        self._spectra: dict[str, figures.Sample] = {}
        self._history: dict[int, dict[str, float]] = {}  # step -> matrix -> stable rank
        self._drawn = -1
        self._warned: set[str] = set()
        self._laid_out = False

    @property
    def state_key(self) -> str:
        """Two monitors of other intervals or patterns keep their states apart."""
        return self._generate_state_key(
            every_n_steps=self.every_n_steps,
            exact=self.exact,
            rank=self.rank,
            parameters=self.parameters,
        )

    def state_dict(self) -> dict[str, Any]:
        """What the figures show of the run so far, and where in the interval it is."""
        return {
            "history": {step: dict(values) for step, values in self._history.items()},
            "taken": dict(self._taken),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes that back."""
        self._history = {int(step): dict(v) for step, v in state_dict["history"].items()}
        self._taken = dict(state_dict["taken"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says so if nothing will be logged."""
        self._laid_out = False
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
        """Forgets what an earlier run has shown; one that goes on has brought its history."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is None and stepped(trainer) == 0:
            self._history, self._spectra = {}, {}
        self._drawn = max(self._history, default=-1)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)

    def _look(self, seen: Seen) -> None:
        found, spectrum = measured(seen, exact=self.exact, rank=self.rank)
        # One read from the device for all numbers, and one for the spectra.
        table = torch.stack([values.double() for values in found.values()]).tolist()
        for quantity, values in zip(found, table, strict=True):
            by_matrix = self._values.setdefault(quantity, {})
            for name, value in zip(seen.names, values, strict=True):
                self._groups[name] = configured_group(seen.group)
                if math.isfinite(value):
                    by_matrix[name] = value
        if spectrum is None:
            return
        of = "gradient" if seen.inside is None else "momentum"
        samples = torch.stack([spectrum.values, spectrum.weights], 1).tolist()
        for name, (sigmas, weights) in zip(seen.names, samples, strict=True):
            if 0 < sigmas[0] < math.inf:
                self._spectra[name] = figures.Sample(sigmas, weights, of)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values, groups, spectra = self._values, self._groups, self._spectra
        self._values, self._groups = {}, {}
        step = stepped(trainer)
        if not values:  # a scaler may have skipped the step
            return
        tagged = {}
        for quantity, by_matrix in values.items():
            by_group: dict[str, list[float]] = {}
            for name, value in by_matrix.items():
                tagged[f"{quantity}/{name}"] = value
                by_group.setdefault(groups[name], []).append(value)
            for group, members in by_group.items():
                tagged[f"{quantity}/group/{group}"] = sum(members) / len(members)
        trainer.callback_metrics.update({tag: torch.tensor(v) for tag, v in tagged.items()})
        ranks = values.get("weight_stable_rank", {})
        if ranks:
            self._history[step] = {name: ranks[name] for name in self._in_order(ranks)}
        if len(self._history) > _REMEMBERED:
            self._history = dict(list(self._history.items())[::2])
        for logger in trainer.loggers:
            logger.log_metrics(tagged, step=step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                if not self._laid_out:
                    logger.experiment.add_custom_scalars(_layout())
                for name in groups:
                    if name in spectra:
                        _add_histogram(logger, name, spectra[name], step)
        self._laid_out = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws what has been seen since the last figures."""
        last = max(self._history, default=-1)
        if trainer.sanity_checking or last <= self._drawn:
            return
        self._drawn = last
        self.draw(trainer)

    def draw(self, trainer: Trainer) -> bool:
        """Draws the stable ranks so far and the latest spectra for TensorBoard.

        Returns:
            Whether there was something to draw, and somebody to draw for.
        """
        loggers = [log for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
        if not loggers or not trainer.is_global_zero:
            return False
        if not figures.available():
            self._warn("SpectralMonitor draws no figures: pip install matplotlib")
            return False
        samples = {name: self._spectra[name] for name in self._in_order(self._spectra)}
        drawn = {}
        if self._history:
            drawn["stable_rank"] = figures.stable_ranks(self._history)
        if samples:
            drawn["singular_values"] = figures.spectra(samples)
        for name, figure in drawn.items():
            for logger in loggers:
                # Drawn by hand: add_figure would start matplotlib's state machine in the process.
                logger.experiment.add_image(
                    f"spectra/{name}", figures.pixels(figure), stepped(trainer), dataformats="HWC"
                )
        return bool(drawn)


def measured(
    seen: Seen, *, exact: bool = False, rank: int | None = None
) -> tuple[dict[str, Tensor], Spectrum | None]:
    """Every quantity that can be told of some matrices.

    Args:
        seen: The matrices.
        exact: As in ``spectrum.measure``.
        rank: As in ``SpectralMonitor``.

    Returns:
        Tensors (count,) by the names of ``QUANTITIES``, NaN where a value has no meaning; and the
        spectrum of the momentum, or else of the gradient.
    """
    inside = seen.inside
    k = _rank(rank, inside, seen.before.shape)
    dtype = torch.promote_types(seen.before.dtype, torch.float32)
    change = seen.after.to(dtype) - seen.before.to(dtype)
    found: dict[str, Tensor] = {}
    spectrum = None
    if seen.gradient is not None:
        spectrum = spectra.measure(seen.gradient, exact=exact)
        found |= _of_direction("gradient", spectrum, k)
        if inside is not None:
            found["gradient_dual"] = quantities.own_dual(spectrum, seen.gradient, inside.group)
    if inside is not None:
        spectrum = spectra.measure(inside.momentum, exact=exact)
        found |= _of_direction("momentum", spectrum, k)
        found |= _of_step(inside, spectrum)
    found |= _of_weights(seen.before, change, exact)
    factor = torch.ones(len(change), device=change.device)
    if inside is not None:
        factor = torch.as_tensor(inside.factor, device=change.device).expand(len(change), 1, 1)
        factor = factor[:, 0, 0]
        found["update_skipped"] = inside.skipped.expand(len(change))
    found["update_lr"] = seen.lr * factor
    return found, spectrum


def _rank(rank: int | None, inside: Observation | None, shape: torch.Size) -> int:
    limit = min(shape[-2:])
    if rank is not None:
        return min(rank, limit)
    own = limit if inside is None else resolve_rank(inside.group["rank"], *shape[-2:])
    return own if own < limit else max(1, limit // 4)


def _of_direction(what: str, s: Spectrum, k: int) -> dict[str, Tensor]:
    """Norms and ranks of the gradient or of the momentum."""
    found = {
        "nuclear": spectra.nuclear(s),
        "kyfan": spectra.ky_fan(s, k),
        "frobenius": s.frobenius,
        "spectral": spectra.spectral(s),
        "nuclear_rank": spectra.nuclear_rank(s),
        "energy": spectra.energy(s, k),
    }
    if what == "momentum":
        parts = spectra.quantiles(s).unbind(-1)
        found |= {f"quantile{round(100 * q)}": x for q, x in zip(QUANTILES, parts, strict=True)}
    return {f"{what}_{name}": value for name, value in found.items()}


def _of_step(inside: Observation, s: Spectrum) -> dict[str, Tensor]:
    """How far the direction goes along the momentum, of what is possible."""
    dual = quantities.own_dual(s, inside.momentum, inside.group)
    direction = inside.direction / inside.factor
    found = {
        "momentum_dual": dual,
        "oracle_quality": spectra.inner(inside.momentum, direction) / dual,
    }
    if inside.captured is not None:
        rest = inside.momentum - inside.captured.to(inside.momentum.dtype)
        found["oracle_residual"] = lmo.frobenius_norm(rest)[..., 0, 0] / s.frobenius
    return found


def _of_weights(before: Tensor, change: Tensor, exact: bool) -> dict[str, Tensor]:
    weights = spectra.measure(before, exact=exact, leading=True)
    changes = spectra.measure(change, exact=exact, leading=True)
    return {
        "update_rms": changes.frobenius / (change.shape[-2] * change.shape[-1]) ** 0.5,
        "update_spectral": spectra.spectral(changes),
        "update_relative": changes.frobenius / weights.frobenius,
        "weight_spectral": spectra.spectral(weights),
        "weight_stable_rank": spectra.stable_rank(weights),
    }


def _layout() -> Mapping[str, Mapping[str, Sequence[Any]]]:
    return {
        norm: {
            chart: ["Multiline", [f"^{name}/group/.*" for name in names]]
            for chart, names in charts.items()
        }
        for norm, charts in LAYOUT.items()
    }


def _add_histogram(logger: TensorBoardLogger, name: str, sample: figures.Sample, step: int) -> None:
    """The singular values over the largest, in powers of ten."""
    values = torch.tensor(sample.values, dtype=torch.float64)
    weights = torch.tensor(sample.weights, dtype=torch.float64)
    powers = (values / values[0]).clamp(min=10**_LOWEST).log10()
    limits = torch.arange(_LOWEST, _BUCKET / 2, _BUCKET, dtype=torch.float64)
    buckets = torch.bucketize(powers, limits + 1e-9).clamp(max=len(limits) - 1)
    counts = torch.zeros_like(limits).index_add_(0, buckets, weights)
    logger.experiment.add_histogram_raw(
        f"{sample.of}_spectrum/{name}",
        min=float(powers.min()),
        max=0.0,
        num=int(weights.sum().round()),
        sum=float((weights * powers).sum()),
        sum_squares=float((weights * powers.square()).sum()),
        bucket_limits=limits.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )

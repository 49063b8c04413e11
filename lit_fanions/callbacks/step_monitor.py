"""Learning rates and throughput at logged steps, without waiting for the device."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import torch

from lit_fanions.callbacks.lightning_interface import Callback, optimizer_steps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_Mark = Any  # a float of the host's clock, or a CUDA event


@dataclasses.dataclass
class _Span:
    """The steps from one logged step to the next."""

    start: _Mark
    end: _Mark = None
    step: int = 0  # the logged step at its end
    pauses: list[tuple[_Mark, _Mark]] = dataclasses.field(default_factory=list)  # validation
    work: Counter[str] = dataclasses.field(default_factory=Counter)


class StepMonitor(Callback):
    """Logs learning rates, momenta and throughput at the trainer's logged steps.

    - ``NAME/GROUP`` and ``NAME/GROUP-momentum``: the step's learning rate and momentum of each
      parameter group, under the names of Lightning's LearningRateMonitor. NAME is that of the
      scheduler or, without one, ``lr-`` and the class of the optimizer.
    - ``throughput/steps_per_s``, the mean since the logged step before, without validations. If the
      module has a method ``count_work(batch) -> dict[str, float]``, such as
      ``{"images": 2000, "flops": 2.8e15}``, also ``throughput/images_per_s`` and so on, of all
      processes together.

    Lightning's own monitors make the host wait for a GPU: ThroughputMonitor after every batch, and
    LearningRateMonitor for each value that it copies to the device. This one takes times from CUDA
    events that the device has already passed. So a throughput may be written one logged step late,
    under its own step.
    """

    def __init__(self) -> None:
        self._on_cuda = False
        self._stepped = False
        self._span: _Span | None = None
        self._ended: deque[_Span] = deque()  # spans whose ends the device may not have reached
        self._pause: _Mark = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._on_cuda = trainer.strategy.root_device.type == "cuda"
        self._stepped, self._span = False, None
        self._ended.clear()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the settings of a logged step."""
        self._stepped = True
        if _is_logged(trainer):
            values = _group_settings(trainer, optimizer)
            metrics = {k: torch.tensor(v, device="cpu") for k, v in values.items()}
            trainer.callback_metrics.update(metrics)
            _log(trainer, values, optimizer_steps(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at a logged step, end the span and log those that are over."""
        span, count_work = self._span, getattr(pl_module, "count_work", None)
        if span is not None:
            span.work.update({} if count_work is None else count_work(batch))
            span.work["steps"] += self._stepped  # False while gradients are accumulated
        if self._stepped and _is_logged(trainer):
            end = self._mark()
            if span is not None:
                span.end, span.step = end, optimizer_steps(trainer)
                self._ended.append(span)
            self._span = _Span(end)
            self._log_ended(trainer)
        self._stepped = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause = self._mark()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock run on."""
        if self._span is not None:
            self._span.pauses.append((self._pause, self._mark()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the device, once, and log what is left."""
        if self._ended and self._on_cuda:
            self._ended[-1].end.synchronize()
        self._log_ended(trainer)
        self._span = None

    def _mark(self) -> _Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: _Mark, end: _Mark) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start

    def _log_ended(self, trainer: Trainer) -> None:
        while self._ended and (not self._on_cuda or self._ended[0].end.query()):
            span = self._ended.popleft()
            seconds = self._seconds(span.start, span.end)
            seconds -= sum(self._seconds(*pause) for pause in span.pauses)
            work = {name: trainer.world_size * count for name, count in span.work.items()}
            work["steps"] = span.work["steps"]
            rates = {f"throughput/{name}_per_s": count / seconds for name, count in work.items()}
            _log(trainer, rates, span.step)


def _is_logged(trainer: Trainer) -> bool:
    """Return whether Lightning logs the metrics of this optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (optimizer_steps(trainer) + 1) % every == 0


def _group_settings(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return learning rate and momentum of each group under LearningRateMonitor's names."""
    scheduled = (
        config.name
        for config in trainer.lr_scheduler_configs
        if config.scheduler.optimizer is optimizer and config.name
    )
    prefix = next(scheduled, f"lr-{type(optimizer).__name__}")
    alike = [each for each in trainer.optimizers if type(each) is type(optimizer)]
    if number := alike.index(optimizer):
        prefix += f"-{number}"
    settings = {}
    for number, group in enumerate(optimizer.param_groups, 1):
        name = prefix
        if len(optimizer.param_groups) > 1 or "name" in group:
            name += f"/{group.get('name', f'pg{number}')}"
        settings[name] = float(group["lr"])
        if "momentum" in group:
            settings[f"{name}-momentum"] = float(group["momentum"])
    return settings


def _log(trainer: Trainer, values: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)

"""Callbacks that time a fit from inside: against a bare loop, and the looks of a monitor.

Apart from the commands, because their help need not load Lightning.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers

from experiments.bench import report
from lit_fanions.callbacks import SpectralMonitor
from lit_fanions.callbacks.quantities import parse_tag


class BareLoop:
    """The training of a copy of a module without a Trainer.

    Args:
        trainer: Trainer of the original, about to begin: its precision, clipping and accumulation
            are taken over.
        module: The original, whose optimizer has made no step yet.
        batches: The batches of the original, in the same order.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterator[Any]
    ) -> None:
        self.module = copy.deepcopy(module)
        self.module.trainer = trainer
        for original, copied in zip(module.modules(), self.module.modules(), strict=True):
            if original._compiled_call_impl is not None:  # deepcopy does not copy compilation
                copied.compile()
        self.module.log = self.module.log_dict = _ignore  # type: ignore[method-assign]
        self.module.on_train_start()
        (self.optimizer,), schedules = _init_optimizers_and_lr_schedulers(self.module)
        self.schedulers = [s.scheduler for s in schedules if s.interval == "step"]
        self.epoch_schedulers = [s.scheduler for s in schedules if s.interval == "epoch"]
        self.batches = batches
        self.autocast = trainer.precision_plugin.forward_context
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scaler = copy.deepcopy(scaler) or torch.amp.GradScaler(enabled=False)
        self.accumulate = trainer.accumulate_grad_batches
        self.clip = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        self.random = torch.get_rng_state()

    def step(self, index: int, last: bool) -> None:
        """Train on the next batch.

        Args:
            index: Place of the batch in the epoch.
            last: Whether it is the last batch of the epoch.
        """
        batch = move_data_to_device(next(self.batches), self.module.device)
        with self.autocast():
            output = self.module.training_step(batch, index)
        loss = output["loss"] if isinstance(output, Mapping) else output
        assert isinstance(loss, torch.Tensor)
        if index % self.accumulate == 0:
            self.optimizer.zero_grad()
        self.scaler.scale(loss / self.accumulate).backward()
        if (index + 1) % self.accumulate == 0 or last:
            self.module.on_before_optimizer_step(self.optimizer)
            self._clip_gradients()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            for scheduler in self.schedulers:
                scheduler.step()
        for scheduler in self.epoch_schedulers if last else []:
            scheduler.step()

    @contextlib.contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Use the copy's own stream of random numbers, so that the original's is not advanced."""
        original = torch.get_rng_state()
        torch.set_rng_state(self.random)
        yield
        self.random = torch.get_rng_state()
        torch.set_rng_state(original)

    def _clip_gradients(self) -> None:
        value, algorithm = self.clip
        if not value:
            return
        self.scaler.unscale_(self.optimizer)
        clip = torch.nn.utils.clip_grad_norm_
        if algorithm == "value":
            clip = torch.nn.utils.clip_grad_value_  # type: ignore[assignment]
        # In the order of the groups, as Lightning does: a sum of squares depends on it.
        clip([p for group in self.optimizer.param_groups for p in group["params"]], value)


class PairedTraining(Callback):
    """Lets a bare loop take the steps of the fit in turns with it, and times both.

    Args:
        batches: Batches for the bare loop, in the order of the fit's.

    Attributes:
        fit: Seconds of every turn of the fit in each epoch after the warm-up.
        bare: Seconds of every turn of the bare loop in each epoch after the warm-up.
        difference: Largest difference between the weights of the two at the end.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.fit: list[list[float]] = []
        self.bare: list[list[float]] = []
        self.difference = 0.0
        self._clock = 0.0
        self._seconds = 0.0
        self._turn: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the training and start the fit's clock."""
        self.device = trainer.strategy.root_device
        self.steps = int(trainer.num_training_batches)
        self.precision = trainer.precision
        self.loop = BareLoop(trainer, pl_module, self.batches)
        self._clock = report.now(self.device)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
    ) -> None:
        """Let the bare loop make the same steps, after each batch on a CPU, else once an epoch."""
        self._turn.append(index)
        last = index + 1 == self.steps
        if self.device.type != "cpu" and not last:
            return
        self._pause()
        start = report.now(self.device)
        with self.loop.own_randomness():
            for each in self._turn:
                self.loop.step(each, last=each + 1 == self.steps)
        end = report.now(self.device)
        if self._turn[0] == 0:
            self.fit.append([])
            self.bare.append([])
        self.fit[-1].append(self._seconds)
        self.bare[-1].append(end - start)
        self._seconds = 0.0
        self._turn.clear()
        self._clock = report.now(self.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the fit's clock."""
        self._pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the fit's clock again."""
        self._clock = report.now(self.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the weights and drop the warm-up."""
        pairs = zip(pl_module.parameters(), self.loop.module.parameters(), strict=True)
        self.difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
        del self.fit[0], self.bare[0]

    def _pause(self) -> None:
        self._seconds += report.now(self.device) - self._clock


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Accept and drop what the copy logs."""


class Looks(Callback):
    """Times optimizer steps, those with a look of the monitor apart from those without.

    Args:
        monitor: The monitor.
        every: Steps between two looks.

    Attributes:
        plain: Seconds of each step without a look; the first steps are left out.
        looking: Seconds of each step with a look; the first one is left out.
        figures: Seconds that drawing takes; None if no logger takes figures.
        matrices: Number of monitored matrices.
    """

    def __init__(self, monitor: SpectralMonitor, every: int) -> None:
        self.monitor, self.every = monitor, every
        self.plain: list[float] = []
        self.looking: list[float] = []
        self.figures: float | None = None
        self.matrices = 0
        self._steps = 0
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.device = trainer.strategy.root_device
        self._clock = report.now(self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Note the time if an optimizer step has ended."""
        if trainer.global_step == self._steps:
            return
        self._steps, now = trainer.global_step, report.now(self.device)
        seconds, self._clock = now - self._clock, now
        if self._steps > self.every:
            # The monitor counts steps from 0, so the step that has just ended is global_step - 1.
            looked = (self._steps - 1) % self.every == 0
            (self.looking if looked else self.plain).append(seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time the figures."""
        self.monitor.draw(trainer)  # untimed: the first call imports matplotlib
        start = report.now(self.device)
        if self.monitor.draw(trainer):
            self.figures = report.now(self.device) - start
        tags = filter(None, map(parse_tag, trainer.callback_metrics))
        self.matrices = sum(tag.quantity == "update_rms" and not tag.is_group for tag in tags)

"""What Lightning's loop costs over the bare steps of the same recipe.

The recipe is trained by Lightning's fit with its own callbacks and loggers. From inside it, a
second copy of model, optimizer, schedule, data and precision takes the very same steps in a bare
loop. The two take turns, one step each on a CPU and one epoch each on a GPU (where waiting for
every step would hide that Lightning's work overlaps with the device's), so that both see the same
noise of a shared machine. The clock of one stands still while the other runs; validation counts
for neither. All else that fit does between its first and last step counts for Lightning,
checkpoints and epoch ends included. The first epoch is warm-up.

  python -m experiments.bench overhead --config configs/quickstart.yaml --epochs 5

All options of fit are accepted, such as --trainer.limit_train_batches 20 for a long epoch.
"""

import argparse
import contextlib
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers

from experiments.bench import race, report
from lit_fanions.cli import console

GOAL = 1.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    parser.add_argument("--epochs", type=race.whole, default=5, help="timed epochs of a run")
    parser.add_argument("--repeats", type=race.whole, default=1, help="runs, each from the start")


def run(options: argparse.Namespace, recipe: Sequence[str]) -> report.Report:
    """Time the recipe.

    Args:
        options: Options of ``add_arguments``.
        recipe: Arguments of fit, such as ``--config FILE``.
    """
    timings = [time_recipe(recipe, options.epochs) for _ in range(options.repeats)]
    fit = [turns for each in timings for turns in each.fit]
    bare = [turns for each in timings for turns in each.bare]
    fit_seconds, bare_seconds = [sum(turns) for turns in fit], [sum(turns) for turns in bare]
    ratios = [a / b for a, b in zip(fit_seconds, bare_seconds, strict=True)]
    ratio = typical_epoch(fit) / typical_epoch(bare)
    difference = max(each.difference for each in timings)
    last = timings[-1]
    return report.Report(
        title=f"Lightning's loop against bare steps: {' '.join(recipe)}",
        columns=["seconds per epoch", "typical", "min", "max"],
        rows=[
            ["Lightning's fit", typical_epoch(fit), min(fit_seconds), max(fit_seconds)],
            ["bare loop", typical_epoch(bare), min(bare_seconds), max(bare_seconds)],
            ["ratio", ratio, min(ratios), max(ratios)],
        ],
        notes=[
            f"{len(ratios)} paired epochs of {last.steps} steps; precision {last.precision}; "
            "typical: the sum of every step's median over the epochs",
            f"weights after the same steps: {_describe_difference(difference)}",
            report.machine_line(last.device),
            f"goal: ratio at most {GOAL}: {'met' if ratio <= GOAL else 'missed'}",
        ],
        data={
            "recipe": list(recipe),
            "steps_per_epoch": last.steps,
            "precision": last.precision,
            "device": str(last.device),
            "fit_seconds": fit,
            "bare_seconds": bare,
            "ratio": ratio,
            "largest_weight_difference": difference,
        },
    )


def typical_epoch(epochs: Sequence[Sequence[float]]) -> float:
    """Return the sum, over the turns of an epoch, of each turn's median over the epochs.

    On a shared machine a burst of other work hits a few turns; the sum of a single epoch would
    include it.

    Args:
        epochs: Seconds of every turn of each epoch.
    """
    return sum(statistics.median(turns) for turns in zip(*epochs, strict=True))


def time_recipe(recipe: Sequence[str], epochs: int) -> "PairedTraining":
    """Train the recipe once, with the bare loop inside, and return the timings.

    Args:
        recipe: Arguments of fit.
        epochs: Number of epochs after the warm-up.

    Raises:
        Refused: If jsonargparse is missing.
        ValueError: If the recipe trains in several processes.
    """
    console.require("jsonargparse", "training a recipe")
    from experiments.bench.recipe import builder, training_batches

    with builder(
        *recipe, f"--trainer.max_epochs={epochs + 1}", "--trainer.limit_val_batches=1"
    ) as build:
        fit, twin = build(), build()
        if fit.trainer.world_size > 1:
            raise ValueError(
                f"overhead compares single processes, got {fit.trainer.world_size}: "
                "set --trainer.devices 1"
            )
        timing = PairedTraining(training_batches(twin))
        fit.trainer.callbacks.append(timing)  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, datamodule=fit.datamodule)
    return timing


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


def _describe_difference(difference: float) -> str:
    if difference == 0:
        return "equal"
    return f"up to {difference:.3g} apart (data drawn from torch's global random numbers differ)"


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Accept and drop what the copy logs."""

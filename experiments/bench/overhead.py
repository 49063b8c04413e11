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
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers

from lit_fanions.cli import console
from lit_fanions.cli.app import CLI

GOAL = 1.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command; all others are those of fit."""
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of a run")
    parser.add_argument("--repeats", type=int, default=1, help="runs, each from the start")


def run(options: argparse.Namespace, recipe: Sequence[str]) -> console.Report:
    """Time the recipe.

    Args:
        options: `epochs` and `repeats`.
        recipe: Arguments of fit, such as `--config FILE`.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    races = [race(recipe, options.epochs) for _ in range(options.repeats)]
    fit = [turns for each in races for turns in each.fit]
    bare = [turns for each in races for turns in each.bare]
    fit_seconds, bare_seconds = [sum(turns) for turns in fit], [sum(turns) for turns in bare]
    ratios = [a / b for a, b in zip(fit_seconds, bare_seconds, strict=True)]
    ratio = typical_epoch(fit) / typical_epoch(bare)
    difference = max(each.difference for each in races)
    last = races[-1]
    return console.Report(
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
            f"weights after the same steps: {_agreement(difference)}",
            console.machine_line(last.device),
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
    """Return the seconds of an epoch, each of its turns the median over the epochs.

    A burst of other work on a shared machine hits a few turns; an epoch's sum would keep it.
    """
    return sum(statistics.median(turns) for turns in zip(*epochs, strict=True))


def race(recipe: Sequence[str], epochs: int) -> "Race":
    """Train the recipe once, with the bare loop inside, and returns the timings."""
    with tempfile.TemporaryDirectory() as logs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = [
            *recipe,
            f"--trainer.max_epochs={epochs + 1}",
            f"--trainer.default_root_dir={logs}",
            "--trainer.limit_val_batches=1",
            "--trainer.num_sanity_val_steps=0",
        ]
        fit, twin = Recipe(args, logs), Recipe(args, logs)
        if fit.trainer.world_size > 1:
            raise ValueError(
                f"overhead compares single processes, got {fit.trainer.world_size}: "
                "set --trainer.devices 1"
            )
        timing = Race(_endless(twin))
        fit.trainer.callbacks.append(timing)  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, datamodule=fit.datamodule)
    return timing


class Recipe(CLI):
    """A recipe that is built but not run, with its loggers writing into the folder `logs`."""

    def __init__(self, args: Sequence[str], logs: str) -> None:
        self.logs = logs
        super().__init__(args, run=False)

    def before_instantiate_classes(self) -> None:
        """Redirect the loggers."""
        loggers = self.config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and "save_dir" in logger.init_args:
                logger.init_args.save_dir = self.logs


class BareLoop:
    """A copy of a module in training, and the same training without a trainer.

    Args:
        trainer: The trainer of the original, about to begin: gives precision, clipping and the
            number of steps.
        module: The original, with its optimizer untouched so far.
        batches: Batches in the order of the original.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterator[Any]
    ) -> None:
        self.module = copy.deepcopy(module)
        self.module.trainer = trainer
        for original, copied in zip(module.modules(), self.module.modules(), strict=True):
            if original._compiled_call_impl is not None:  # a copy is not compiled
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
            index: Its place in the epoch.
            last: Whether it is the last one of the epoch.
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

    @contextlib.contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Keep the stream of random numbers apart from the original's."""
        theirs = torch.get_rng_state()
        torch.set_rng_state(self.random)
        yield
        self.random = torch.get_rng_state()
        torch.set_rng_state(theirs)


class Race(Callback):
    """Lets a bare loop take the steps of the fit in turns with it, and times both.

    Args:
        batches: The bare loop's own batches, in the order of the fit's.

    Attributes:
        fit: Seconds of every turn in each epoch of the fit, the first epoch left out.
        bare: Likewise in the bare loop.
        difference: Largest difference between the weights of the two in the end.
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
        """Copy the training and starts the fit's clock."""
        self.device = trainer.strategy.root_device
        self.steps = int(trainer.num_training_batches)
        self.precision = trainer.precision
        self.loop = BareLoop(trainer, pl_module, self.batches)
        self._clock = console.now(self.device)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
    ) -> None:
        """Give the bare loop its turn, on a GPU once an epoch."""
        self._turn.append(index)
        last = index + 1 == self.steps
        if self.device.type != "cpu" and not last:
            return
        self._pause()
        start = console.now(self.device)
        with self.loop.own_randomness():
            for each in self._turn:
                self.loop.step(each, last=each + 1 == self.steps)
        end = console.now(self.device)
        if self._turn[0] == 0:
            self.fit.append([])
            self.bare.append([])
        self.fit[-1].append(self._seconds)
        self.bare[-1].append(end - start)
        self._seconds = 0.0
        self._turn.clear()
        self._clock = console.now(self.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the fit's clock."""
        self._pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start it again."""
        self._clock = console.now(self.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the weights and forget the warm-up."""
        pairs = zip(pl_module.parameters(), self.loop.module.parameters(), strict=True)
        self.difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
        del self.fit[0], self.bare[0]

    def _pause(self) -> None:
        self._seconds += console.now(self.device) - self._clock


def _endless(cli: CLI) -> Iterator[Any]:
    """Yield the training batches of a recipe, epoch after epoch, without training."""
    data = cli.datamodule or cli.model
    if cli.datamodule is not None:
        data.trainer = cli.trainer
        data.prepare_data()
        data.setup("fit")
    loader: Iterable[Any] = data.train_dataloader()
    limit = cli.trainer.limit_train_batches
    while True:
        length = len(loader)  # type: ignore[arg-type]
        stop = int(limit * length) if isinstance(limit, float) else min(limit, length)
        for index, batch in enumerate(loader):
            yield batch
            if index + 1 == stop:
                break


def _agreement(difference: float) -> str:
    """Say whether fit and bare loop did the same."""
    if difference == 0:
        return "equal"
    return f"up to {difference:.3g} apart (data drawn from torch's global random numbers differ)"


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for logging."""

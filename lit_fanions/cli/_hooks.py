"""Callbacks of every run from the command line; private, so that no help lists them."""

import math
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from fsspec.implementations.local import LocalFileSystem
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_fanions.cli.messages import print_warning
from lit_fanions.cli.results import plural
from lit_fanions.progress import Meter

WARN_AFTER = 10  # steps in a row that a parameter skips
LOOK_EVERY = 50  # steps between looks at the counters of a GPU


class WatchProgress(Callback):
    """Knows whether a batch was run, and keeps the progress bar right after a resume."""

    def __init__(self) -> None:
        self.has_begun = False
        self.checkpoint: str | None = None  # the one asked for
        self.folders: list[Path] = []  # made for the logs of this run

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to start from scratch where `last` found no checkpoint; leave no folder behind."""
        if self.checkpoint == "last" and trainer.ckpt_path is None:
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
            raise MisconfigurationException(
                "--ckpt_path last looks in this run's own folder only, which has no checkpoint: "
                "give the path of one, or leave --ckpt_path out to start from scratch"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Give the progress bar of an epoch that is resumed in its middle its length.

        Lightning sets it when an epoch starts, and this one started before the checkpoint.
        """
        self.has_begun = True
        callback = trainer.progress_bar_callback
        if not isinstance(callback, TQDMProgressBar) or not callback.is_enabled:
            return
        bar, total = callback.train_progress_bar, callback.total_train_batches
        if bar.total is None and math.isfinite(total):
            bar.total = total
            bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note that the run has begun."""
        self.has_begun |= not trainer.sanity_checking

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]


class ReportRestoredOptions(Callback):
    """Warns where a resumed optimizer runs with other options than the configured ones.

    A checkpoint restores the options of every parameter group with its state.
    """

    def __init__(self) -> None:
        self._configured: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the configured options: nothing is restored yet."""
        self._configured = _group_options(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the configured options with the restored ones."""
        if trainer.ckpt_path:
            pairs = zip(self._configured, _group_options(trainer), strict=False)
            for index, (ours, theirs) in enumerate(pairs):
                for name, value in ours.items():
                    if value != theirs.get(name, value):
                        print_warning(
                            f"group {ours.get('name', index)}: {name} {theirs[name]} from the "
                            f"checkpoint is used, not the configured {value}"
                        )


class ResumeExactly(Callback):
    """Corrects the counts of epochs and batches that Lightning 2.6 leaves in some checkpoints.

    Refuses to resume where parts of a checkpoint are missing, which Lightning would start anew in
    silence.

    An epoch that begins with a resume at the end of the one before is not counted as started. A
    checkpoint of it then looks as if it was saved between two epochs, and resuming that would take
    up to an epoch of steps too many. And where max_steps is set, a run that is resumed from the end
    of an epoch would leave out the next one, because its batches seem to be done.
    """

    def __init__(self) -> None:
        self._states: dict[str, int] = {}  # numbers of states in the checkpoint, by its keys

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the counts before the loops are restored."""
        if trainer.state.fn == TrainerFn.FITTING and "loops" not in checkpoint:
            raise MisconfigurationException(
                "the checkpoint has no loops (the steps and epochs done), so that it cannot be "
                "resumed: take one that a Trainer has saved"
            )
        keys = "optimizer_states", "lr_schedulers"
        self._states = {key: len(checkpoint[key]) for key in keys if key in checkpoint}
        try:
            _correct_counts(checkpoint.get("loops", {}).get("fit_loop", {}))
        except (AttributeError, KeyError, TypeError) as error:
            raise MisconfigurationException(
                f"the checkpoint's loops (the steps and epochs done) are damaged ({error!r}): take "
                "an earlier one"
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the numbers of states with those of optimizers and schedules."""
        if not trainer.ckpt_path:
            return
        optimizers, schedules = len(trainer.optimizers), len(trainer.lr_scheduler_configs)
        if (saved := self._states.get("optimizer_states", optimizers)) != optimizers:
            raise MisconfigurationException(
                f"the checkpoint has states of {plural(saved, 'optimizer')}, the run has "
                f"{optimizers}: resume with the configuration that saved it"
            )
        if (saved := self._states.get("lr_schedulers", schedules)) != schedules:
            print_warning(
                f"the checkpoint has states of {plural(saved, 'lr schedule')}, the run has "
                f"{schedules}: those without a state start at their beginning"
            )


def _correct_counts(loop: dict[str, Any]) -> None:
    """Correct the counts of the loop of a fit in place (``ResumeExactly``)."""
    batches = loop.get("epoch_loop.batch_progress")
    # Epochs of this fit, and of all fits.
    epochs = [loop["epoch_progress"][part] for part in ("current", "total")] if batches else []
    if not batches or any(counts["ready"] != counts["completed"] for counts in epochs):
        return
    if not batches["is_last_batch"] and batches["current"]["ready"]:
        for counts in epochs:
            counts["ready"] += 1
            counts["started"] += 1
    elif batches["current"]["ready"] == batches["current"]["completed"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


class SaveLastStep(Callback):
    """Lets last.ckpt hold the end of a fit that ends between two saves."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it again, for every ModelCheckpoint with save_last."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last is True:
                saved = getattr(callback, "_last_global_step_saved", trainer.global_step)
                if callback.last_model_path and saved != trainer.global_step:
                    trainer.save_checkpoint(
                        callback.last_model_path, weights_only=callback.save_weights_only
                    )


class WatchSkippedSteps(Callback):
    """Warns of parameters whose gradients stay non-finite, and ends the run if asked to.

    A run that has diverged would go on to its last step, and be tested, with the weights of the
    last finite gradient.

    ``patience`` is the number of steps in a row without a finite gradient of some parameter that
    ends the run; None: never.
    """

    def __init__(self) -> None:
        self.patience: int | None = None
        self._first_step = self._step = 0
        # Steps that each parameter has skipped.
        self._first, self._counts = Counter[str](), Counter[str]()
        self._in_a_row: dict[str, int] = {}
        self._has_warned = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what earlier runs, from which this one is resumed, have skipped."""
        self._first_step = self._step = trainer.global_step
        self._first = self._counts = _skipped_steps(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Count the steps in a row; on a GPU rarely, because a look waits for the device."""
        new = trainer.global_step - self._step
        is_free = pl_module.device.type == "cpu"
        if new < (1 if is_free else min(self.patience or LOOK_EVERY, LOOK_EVERY)):
            return
        counts = _skipped_steps(trainer, pl_module)
        self._in_a_row = {
            name: self._in_a_row.get(name, 0) + new
            for name, count in counts.items()
            if count - self._counts[name] >= new
        }
        self._step, self._counts = trainer.global_step, counts
        longest = max(self._in_a_row.values(), default=0)
        if self.patience and longest >= self.patience:
            raise RuntimeError(
                f"{self._describe(longest)}; the weights are those of step {self._step - longest}; "
                "lower the lr or clip the gradients (nonfinite_patience ended the run)"
            )
        if longest >= WARN_AFTER and not self._has_warned:
            print_warning(f"step {self._step}: {self._describe(longest)}")
        self._has_warned = longest >= WARN_AFTER

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many steps were skipped."""
        counts = _skipped_steps(trainer, pl_module)
        if skipped := counts - self._first:
            steps = plural(trainer.global_step - self._first_step, "step")
            ((worst, most),) = skipped.most_common(1)
            print_warning(
                f"{most} of {steps} skipped, for {worst!r}: non-finite gradients; "
                f"{len(skipped)} of {len(counts)} parameters skipped steps"
            )

    def _describe(self, longest: int) -> str:
        names = [name for name, steps in self._in_a_row.items() if steps == longest]
        others = f" and {plural(len(names) - 1, 'other parameter')}" if len(names) > 1 else ""
        return f"no finite gradient of {names[0]!r}{others} in {plural(longest, 'step')}"


def _skipped_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Counter[str]:
    names: dict[Any, str] = {p: name for name, p in pl_module.named_parameters()}
    states = [item for optimizer in trainer.optimizers for item in optimizer.state.items()]
    return Counter(
        {names.get(p, "?"): int(state["skipped"]) for p, state in states if "skipped" in state}
    )


def reserve_version(logger: Logger, folders: list[Path]) -> None:
    """Let a logger create the folder of its version, so that no other run takes the same number.

    Lightning's own loggers choose the next number when it is first asked for. The folder is then
    added to ``folders``.
    """
    has_versions = hasattr(logger, "_get_next_version")
    is_local = isinstance(getattr(logger, "_fs", None), LocalFileSystem)
    if has_versions and is_local and not set("~$") & set(logger.root_dir or ""):
        # No closure: ddp_spawn pickles the logger.
        logger._get_next_version = partial(_reserve, logger, folders)  # type: ignore[attr-defined]


def _reserve(logger: Any, folders: list[Path]) -> int:
    """Return the number of the logger's version, whose folder the first rank makes."""
    version: int = type(logger)._get_next_version(logger)
    # The other ranks get the folder from the first one.
    while rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        folder = Path(str(logger.root_dir), f"version_{version}")
        try:
            folder.mkdir(parents=True)
            folders.append(folder)
            break
        except FileExistsError:  # another run was faster
            version += 1
    return version


class SaveRecipe(SaveConfigCallback):
    """Saves the configuration without the arguments of one call, such as the checkpoint.

    The file beside the logs is then a recipe that every subcommand accepts.
    """

    def __init__(self, parser: Any, config: Namespace, *args: Any, **kwargs: Any) -> None:
        recipe = config.clone()
        for name in ("config", "ckpt_path", "weights_only", "verbose", "return_predictions"):
            recipe.pop(name, None)
        recipe.pop("allow_untrained", None)
        super().__init__(parser, recipe, *args, **kwargs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save it, unless there is no logger: that would put it into the working directory."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def _group_options(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the options of every parameter group, before any schedule."""
    return [
        {
            name: group.get(f"initial_{name}", value)
            for name, value in group.items()
            if name not in ("params", "param_names") and not name.startswith("initial_")
        }
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    ]


def without_bars(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return callbacks with plain lines in the place of a bar of Lightning's; others stay."""
    bars = (TQDMProgressBar, RichProgressBar)
    return [PlainProgress() if type(own) in bars else own for own in callbacks]


class PlainProgress(ProgressBar):
    """Says in plain lines how far a stage is; a stage of a few seconds says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._training: Meter | None = None
        self._evaluation: Meter | None = None

    def enable(self) -> None:
        """Report again."""
        self.is_enabled = True

    def disable(self) -> None:
        """Report nothing, as on other ranks than the first."""
        self.is_enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where a checkpoint has ended."""
        share = _trained_share(trainer)
        self._training = Meter("training", math.inf if share is None else 1.0, share or 0.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Report the step, the metrics of the bar and the time left."""
        if not self.is_enabled or self._training is None:
            return
        if self._training.is_due():  # metrics on a GPU make the host wait
            metrics = self.get_metrics(trainer, pl_module).items()
            numbers = [f"{key} {value:.4g}" for key, value in metrics if isinstance(value, float)]
            detail = ", ".join([f"step {trainer.global_step}", *numbers])
            self._training.reach(_trained_share(trainer) or 0.0, detail)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a validation."""
        self._evaluation = Meter("validation", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a test."""
        self._evaluation = Meter("test", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a prediction."""
        self._evaluation = Meter("prediction", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        if self.is_enabled and self._evaluation is not None:
            self._evaluation.advance()

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end


def _trained_share(trainer: pl.Trainer) -> float | None:
    """Return the share of the training that is done, None if it has no end in steps or epochs."""
    shares = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    if epochs > 0 and math.isfinite(batches) and batches > 0:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches
        shares.append((trainer.current_epoch + done) / epochs)
    return max(shares, default=None)

"""Ctrl-C and SIGTERM: where a fit stops, what it saves, and what the last line says."""

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_fanions.cli import runner
from lit_fanions.cli.failures import user_place
from lit_fanions.cli.messages import program_command, relative_path
from lit_fanions.cli.results import plural

_STOPS = (signal.SIGINT, signal.SIGTERM)
# Signals by which SLURM announces the end of a job's time; Windows has neither.
_REQUEUES = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@dataclass(eq=False)
class Interrupted(BaseException):
    """A signal stopped the run; no `except Exception` of a user's code may swallow it.

    ``number`` is the signal's, ``lost`` counts the optimizer steps that no checkpoint holds, and
    ``finished`` says that the fit had ended before, and only its final test was stopped.
    """

    number: int
    checkpoint: str = ""
    lost: int = 0
    finished: bool = False

    def last_line(self, args: Sequence[str]) -> str:
        """Say what was saved, what was lost, and how to go on after the command ``args``."""
        words = ["interrupted" if self.number == signal.SIGINT else "terminated"]
        steps = plural(self.lost, "optimizer step")
        if self.checkpoint and Path(self.checkpoint).exists():
            if self.lost:
                words.append(f"{steps} since the last checkpoint lost")
            verb, subcommand = ("test", "test") if self.finished else ("resume", args[0])
            rest = _without_option(args[1:], "--ckpt_path")
            command = [subcommand, *rest, "--ckpt_path", relative_path(self.checkpoint)]
            words.append(f"{verb} with: {program_command()} {shlex.join(command)}")
        elif args[:1] == ["fit"]:
            words += ["no checkpoint was saved"] + [f"{steps} lost"] * bool(self.lost)
        return "; ".join(words)


class StopBetweenSteps(Callback):
    """Lets Ctrl-C and SIGTERM end a fit after the optimizer step in progress, with a checkpoint.

    Inside a step, a checkpoint could hold half-updated weights; between the micro-batches of a
    step it would lose their gradients; raised outside a hook, an exception could leave a logger's
    lock held. The processes of a run agree after every step, so that a signal to one of them stops
    all after the same step. A second signal stops at once. SLURM's signal waits for the end of the
    step too; Lightning then saves and requeues the job.
    """

    def __init__(self) -> None:
        self._number = 0  # the signal that waits for the end of the step; 0: none
        self._process = os.getpid()
        self._trainer: pl.Trainer | None = None  # while it trains
        self._previous: dict[int, Callable[..., Any]] = {}  # handlers to give back
        self._step = 0  # global_step before the batch
        self._saved_step = 0  # global_step of the last checkpoint
        self._between_steps = True
        self._checkpoint = ""
        self._other_ranks: list[subprocess.Popen[Any]] = []

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Turn SIGTERM into an exception, so that a run can say how it ended."""
        previous = self._handle(signal.SIGTERM)
        try:
            yield
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)

    def stopped_by(self, error: BaseException, trainer: pl.Trainer) -> int | None:
        """Return the signal behind an error that ended a run, or None if it was none."""
        if isinstance(error, Interrupted):
            return error.number
        # Such as the end of a loader's worker; an error in the user's code is shown as one.
        is_own_error = isinstance(error, Exception) and user_place(error) is not None
        if self._number in _STOPS and not is_own_error:
            return self._number
        if isinstance(error, SIGTERMException):
            return signal.SIGTERM
        is_exit = isinstance(error, SystemExit) and trainer.interrupted  # Lightning's, on Ctrl-C
        return signal.SIGINT if is_exit or isinstance(error, KeyboardInterrupt) else None

    def interruption(self, trainer: pl.Trainer, number: int) -> Interrupted:
        """Return the exception that tells what is left of a stopped run."""
        finished = trainer.state.fn != TrainerFn.FITTING
        callback, newest = trainer.checkpoint_callback, self._checkpoint
        if isinstance(callback, ModelCheckpoint):
            newest = newest or callback.last_model_path or callback.best_model_path
        lost = 0 if finished or self._checkpoint else trainer.global_step - self._saved_step
        return Interrupted(number, newest, lost, finished)

    def end_other_ranks(self, trainer: pl.Trainer) -> None:
        """End the processes that Lightning started for the other ranks, also one that hangs.

        A rank that waits for this one in a collective would otherwise stay behind.
        """
        self._detach_other_ranks(trainer)
        runner.end(self._other_ranks, ())

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM over from Lightning, whose handler waits for the other processes."""
        self._handle(signal.SIGTERM)  # Lightning restores it after the run

    on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over all signals: Lightning would stop, or save, within a step."""
        self._saved_step = self._step = trainer.global_step
        self._trainer = trainer
        self._handle(signal.SIGTERM)
        # Those of SLURM only where Lightning handles them.
        modules = {n: type(signal.getsignal(n)).__module__.partition(".")[0] for n in _REQUEUES}
        own = [n for n, module in modules.items() if module in ("lightning", "pytorch_lightning")]
        for number in (signal.SIGINT, *own):
            if (previous := self._handle(number)) is not None:
                self._previous[number] = previous
        if trainer.received_sigterm:  # during the setup
            self._on_signal(signal.SIGTERM, None)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note that a step is in progress."""
        self._step = trainer.global_step
        self._between_steps = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save and stop if a signal asked for it and an optimizer step has ended."""
        self._between_steps = trainer.global_step > self._step
        if self._between_steps:
            self._obey(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop between two batches of a validation that lies between two steps."""
        if self._number in _STOPS and self._stops_in_validation():
            raise self.interruption(trainer, self._number)

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note which steps are saved."""
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save and stop if a signal came after the last step; give the signals back."""
        self._obey(trainer)
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save between two steps: after a stop in validation, or if a loader's worker died."""
        # The other processes may not be between two steps, and would have to save as well.
        is_alone = trainer.world_size == 1 and not isinstance(exception, KeyboardInterrupt)
        if self._trainer and is_alone and self._number in _STOPS and self._between_steps:
            self._save(trainer)
        self._release()

    def _obey(self, trainer: pl.Trainer) -> None:
        """Do what a signal to any process of the run asks for; all processes must call it."""
        number = self._number
        if trainer.world_size > 1:
            asked = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if number in _STOPS:
            self._number = number
            self._save(trainer)
            self._detach_other_ranks(trainer)
            raise self.interruption(trainer, number)
        if number:
            self._number = self._number if self._number in _STOPS else 0
            self._previous[number](number, None)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker; the training still needs its batches
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif number in _REQUEUES:
            self._number = self._number or number
        elif self._trainer is None or self._number in _STOPS:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Interrupted(number)
        else:
            self._number = number
            # The end of a loader's workers, which a signal to the whole group stops as well, must
            # not raise in the middle of this step; its batch has arrived.
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self._trainer.is_global_zero and not self._stops_in_validation():
                again = "press Ctrl-C" if number == signal.SIGINT else "send SIGTERM"
                line = f"\nfinishing this optimizer step; {again} again to stop at once\n"
                os.write(2, line.encode())  # print may be interrupted in itself

    def _stops_in_validation(self) -> bool:
        """Return True if a stop need not wait for a step; other processes would have to agree."""
        trainer = self._trainer
        if trainer is None or trainer.world_size > 1:
            return False
        return trainer.validating and self._between_steps

    def _save(self, trainer: pl.Trainer) -> None:
        """Save the state beside the other checkpoints; every process of the run must call it."""
        callback = trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        folder = folder or Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        if not trainer.fast_dev_run and not self._checkpoint:  # type: ignore[attr-defined]
            path = str(Path(folder, "interrupted.ckpt"))
            trainer.save_checkpoint(path)
            self._checkpoint = path

    def _detach_other_ranks(self, trainer: pl.Trainer) -> None:
        """Take them over from Lightning, which kills this process once one of them has ended."""
        started = getattr(trainer.strategy.launcher, "procs", [])
        for process in [own for own in started if isinstance(own, subprocess.Popen)]:
            started.remove(process)
            self._other_ranks.append(process)

    def _handle(self, number: int) -> Any:
        """Handle a signal here and return its previous handler, or None outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return None
        return signal.signal(number, self._on_signal)

    def _release(self) -> None:
        """Give the signals back; SIGTERM stays an exception until the run has ended."""
        self._trainer = None
        while self._previous:
            signal.signal(*self._previous.popitem())


def _without_option(args: Sequence[str], option: str) -> list[str]:
    """Return `args` without `option VALUE` and `option=VALUE`."""
    rest = [arg for arg in args if not arg.startswith(f"{option}=")]
    while option in rest:
        at = rest.index(option)
        del rest[at : at + 2]
    return rest

"""Train one trial of a sweep in a child process, and report its curve to the study."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optuna
from optuna.trial import Trial

from lit_fanions.cli import curves, runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.results import commit, recipe_digests
from lit_fanions.cli.runner import Run, Training
from lit_fanions.sweep.plan import Plan, Settings, run_name, short

LOOK = 1.0  # seconds between looks at the logs of a training that may be pruned


UNREAD = "without_metric.json"  # beside the logs of a training that did not log the metric


class MetricMissing(Refused):
    """A training has not logged the metric."""


class TrainingFailed(Exception):
    """A training has no value; Optuna records its trial as failed."""


class TrialTraining:
    """A trial that is trained by this process, with settings chosen for it.

    ``recipes`` are the digests of the recipes when the sweep began.
    """

    def __init__(
        self, plan: Plan, trial: Trial, settings: Settings, recipes: Mapping[str, str]
    ) -> None:
        self.plan, self.trial = plan, trial
        self._settings, self._recipes = settings, recipes
        self._reported: set[int] = set()  # steps that the study knows

    def run(self, slot: int, received: Sequence[int], has_error: Callable[[], bool]) -> float:
        """Train on the GPU of a slot, and return the last value of the metric.

        A received signal and an error that has ended the sweep raise ``TrainingFailed``, as a
        training that fails does.
        """
        run = self._describe()
        if (curve := self._unread_curve(run)) is not None:
            return self._report(curve)
        training = self._start(run, slot)
        try:
            if recipe_digests(self.plan.recipe) != self._recipes:
                raise Refused("the recipe was changed during the sweep: choose another --out")
            prunes = self.plan.prune and self.trial.user_attrs["searched"]
            events = curves.open_events(training.logs)
            look = time.monotonic() + LOOK
            while training.process.poll() is None and not received and not has_error():
                time.sleep(runner.POLL)
                if prunes and time.monotonic() > look:
                    self._report(curves.read_curve(events, self.plan.metric))
                    if self.trial.should_prune():
                        raise optuna.TrialPruned
                    look = time.monotonic() + LOOK
            return self._report(self._final_curve(training, received))
        finally:
            runner.end([training.process], received)

    def _describe(self) -> Run:
        plan, seed = self.plan, self.trial.user_attrs["seed"]
        name = run_name(self.trial.number, self._settings, seed)
        self.trial.set_user_attr("folder", name)
        self.trial.set_user_attr("commit", commit())
        names = {short(name): name for name in plan.space}
        options = [f"--{names[name]}={value}" for name, value in self._settings.items()]
        args = (*plan.recipe, *options, f"--seed_everything={seed}", "--trainer.devices=1")
        return Run(name, args)

    def _start(self, run: Run, slot: int) -> Training:
        environment = runner.shared_threads(self.plan.jobs)
        if devices := self.plan.devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        (self._folder(run) / UNREAD).unlink(missing_ok=True)
        return runner.start(run, self._folder(run).parent, environment)

    def _folder(self, run: Run) -> Path:
        return self.plan.out / "runs" / run.name

    def _unread_curve(self, run: Run) -> curves.Curve | None:
        """Return the curve of a training that a call with a mistyped metric left, if it is equal.

        The names of metrics are known when the first training has ended; it need not be repeated.
        """
        note = self._folder(run) / UNREAD
        if not note.is_file() or json.loads(note.read_text()) != self._identity(run):
            return None
        return self._read_curve(run)

    def _identity(self, run: Run) -> dict[str, object]:
        return {"args": [*run.args], "recipes": {**self._recipes}, "commit": commit()}

    def _read_curve(self, run: Run) -> curves.Curve:
        try:
            return curves.read_curves(self._folder(run), [self.plan.metric])[self.plan.metric]
        except Refused as error:
            (self._folder(run) / UNREAD).write_text(json.dumps(self._identity(run)))
            raise MetricMissing(str(error)) from None

    def _final_curve(self, training: Training, received: Sequence[int]) -> curves.Curve:
        status = training.process.poll()
        if status is None or (status and received):
            raise TrainingFailed  # without a reason: it was interrupted
        if (reason := runner.failure(training)) is not None:
            self.trial.set_user_attr("reason", reason)
            if status in runner.KILLED:
                self.trial.set_user_attr("stopped", True)
            raise TrainingFailed
        return self._read_curve(training.run)

    def _report(self, curve: curves.Curve) -> float:
        """Report the values of a curve that the study does not have yet, and return the last one.

        The worst possible value stands for one that is not finite.
        """
        last = worst = self.plan.loss(math.inf)
        for step, value in curve:
            last = value if math.isfinite(value) else worst
            if step not in self._reported:
                self._reported.add(step)
                self.trial.report(last, step)
        return last

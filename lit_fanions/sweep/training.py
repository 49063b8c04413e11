"""Train one trial of a sweep in a child process, and report its curve to the study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import optuna
from optuna.trial import Trial

from lit_fanions.cli import curves, runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.results import commit, recipe_digests
from lit_fanions.cli.runner import Run, Training
from lit_fanions.sweep.plan import Plan, Settings, run_name, short

LOOK = 1.0  # seconds between looks at the logs of a training that may be pruned


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
        training = self._start(slot)
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
            curve = self._final_curve(training, received)
            self._report(curve)
            return self._comparable(curve[-1][1])
        finally:
            runner.end([training.process], received)

    def _start(self, slot: int) -> Training:
        plan, seed = self.plan, self.trial.user_attrs["seed"]
        name = run_name(self.trial.number, self._settings, seed)
        self.trial.set_user_attr("folder", name)
        self.trial.set_user_attr("commit", commit())
        names = {short(name): name for name in plan.space}
        options = [f"--{names[name]}={value}" for name, value in self._settings.items()]
        args = (*plan.recipe, *options, f"--seed_everything={seed}", "--trainer.devices=1")
        environment = runner.shared_threads(plan.jobs)
        if plan.devices:
            environment["CUDA_VISIBLE_DEVICES"] = plan.devices[slot % len(plan.devices)]
        return runner.start(Run(name, args), plan.out / "runs", environment)

    def _final_curve(self, training: Training, received: Sequence[int]) -> curves.Curve:
        status = training.process.poll()
        if status is None or (status and received):
            raise TrainingFailed  # without a reason: it was interrupted
        if (reason := runner.failure(training)) is not None:
            self.trial.set_user_attr("reason", reason)
            if status in runner.KILLED:
                self.trial.set_user_attr("stopped", True)
            raise TrainingFailed
        try:
            return curves.read_curves(training.logs, [self.plan.metric])[self.plan.metric]
        except Refused as error:
            raise MetricMissing(str(error)) from None

    def _report(self, curve: curves.Curve) -> None:
        """Report the values of a curve that the study does not have yet."""
        for step, value in curve:
            if step not in self._reported:
                self._reported.add(step)
                self.trial.report(self._comparable(value), step)

    def _comparable(self, value: float) -> float:
        """Return the value, or the worst possible one if it is not finite."""
        return value if math.isfinite(value) else self.plan.loss(math.inf)

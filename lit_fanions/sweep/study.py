"""Train what a sweep asks for; its Optuna study knows what is queued, in progress and finished.

Every training is queued in the study (``enqueue_trial``) and taken from there by
``Study.optimize``, in this process and in all others that work on the sweep. Optuna's GridSampler
is not used: two processes would train the same point, and a grid that grows would start again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import queue
import time
import warnings
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_fanions.cli import curves, runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.results import commit, plural, recipe_digests
from lit_fanions.cli.runner import Run, Stopped, Training
from lit_fanions.progress import Progress
from lit_fanions.sweep import storage
from lit_fanions.sweep.plan import Plan, Request, Settings, run_name, short

# Seconds between looks at the logs of a training that may be pruned, and at other processes.
LOOK = 1.0
UNREAD = "without_metric.json"  # beside the logs of a training that did not log the metric
# Priority of the trials of one training: the highest counts, and the newest of those.
_PRIORITY = {TrialState.FAIL: 0, TrialState.WAITING: 1, TrialState.RUNNING: 2}
_PRIORITY |= {TrialState.PRUNED: 3, TrialState.COMPLETE: 3}


class MetricMissing(Refused):
    """A training has not logged the metric."""


class TrainingFailed(Exception):
    """A training has no value; Optuna records its trial as failed."""


class TrialTraining:
    """A trial that is trained by this process, with the settings that were chosen for it."""

    def __init__(self, sweep: Sweep, trial: Trial) -> None:
        self.plan, self.trial = sweep.plan, trial
        settings, seed = sweep.settings(trial), trial.user_attrs["seed"]
        options = [f"--{sweep.names[name]}={value}" for name, value in settings.items()]
        args = (*self.plan.recipe, *options, f"--seed_everything={seed}", "--trainer.devices=1")
        self._run = Run(run_name(trial.number, settings, seed), args)
        self._logs = self.plan.out / "runs" / self._run.name
        self._recipes = sweep.recipes
        self._identity = {"args": [*args], "recipes": self._recipes, "commit": commit()}
        self._reported: set[int] = set()  # steps that the study knows
        trial.set_user_attr("folder", self._run.name)
        trial.set_user_attr("commit", commit())

    def run(self, slot: int, received: Sequence[int], has_error: Callable[[], bool]) -> float:
        """Train on the GPU of a slot, and return the last value of the metric.

        A received signal and an error that has ended the sweep raise ``TrainingFailed``, as a
        training that fails does.
        """
        note = self._logs / UNREAD
        # The names of metrics are known when the first training has ended: one that a call with a
        # mistyped name has left need not be repeated.
        # Text is compared, because a full disk may have left half a note.
        if note.is_file() and note.read_text() == json.dumps(self._identity):
            return self._report(self._read_curve())
        note.unlink(missing_ok=True)
        environment = runner.shared_threads(self.plan.jobs)
        if devices := self.plan.devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        training = runner.start(self._run, self._logs.parent, environment)
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

    def _final_curve(self, training: Training, received: Sequence[int]) -> curves.Curve:
        status = training.process.poll()
        if status is None or (status and received):
            raise TrainingFailed  # without a reason: it was interrupted
        if (reason := runner.failure(training)) is not None:
            self.trial.set_user_attr("reason", reason)
            if status in runner.KILLED:
                self.trial.set_user_attr("stopped", True)
            raise TrainingFailed
        return self._read_curve()

    def _read_curve(self) -> curves.Curve:
        try:
            return curves.read_curves(self._logs, [self.plan.metric])[self.plan.metric]
        except Refused as error:
            (self._logs / UNREAD).write_text(json.dumps(self._identity))
            raise MetricMissing(str(error)) from None

    def _report(self, curve: curves.Curve) -> float:
        """Report the values of a curve that the study does not have yet; return the last one."""
        last = worst = self.plan.loss(math.inf)  # the worst stands for what is not finite
        for step, value in curve:
            last = value if math.isfinite(value) else worst
            if step not in self._reported:
                self._reported.add(step)
                self.trial.report(last, step)
        return last


class Sweep:
    """A study, and the work of this process on it.

    A trial has these user attributes: key, seed, settings and searched from its request; worker,
    folder and commit of its training; and one of reason (why it failed), stopped (somebody killed
    it), "same as" (the number of an equal trial) or skipped (nothing was trained). A failed trial
    without a reason was interrupted, and is retried.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.study = storage.open_study(plan)
        self.names = {short(name): name for name in plan.space}
        self.recipes = recipe_digests(plan.recipe)
        self._keys: set[str] = set()
        self._workers = plan.out / "workers"
        self._worker = ""
        self._progress = Progress(0)
        self._error: Exception | None = None  # ends the sweep
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(plan.jobs):
            self._slots.put(slot)

    def train(self, requests: Sequence[Request], received: Sequence[int]) -> None:
        """Train what is missing of all requests, and wait for what other processes train.

        Trainings that were interrupted or killed in earlier calls are retried, with
        ``plan.retry_failed`` also those that failed. A signal in ``received`` raises ``Stopped``
        once all processes of this one have ended.
        """
        self._keys = {request.key for request in requests}
        with storage.register_worker(self._workers) as self._worker:
            if self.plan.storage is not None or len(list(self._workers.iterdir())) > 1:
                # Processes that began at one time would propose the same settings.
                self.study.sampler.reseed_rng()
            waiting, running = self._queue(requests, resume=True)
            self._progress = Progress(len(self._keys), len(self._keys) - waiting - running)
            print(self._announcement(waiting, running), flush=True)
            while waiting or running:
                if waiting:  # trials that other processes take first are skipped
                    self.study.optimize(
                        lambda trial: self._objective(trial, received),
                        n_trials=waiting,
                        n_jobs=min(waiting, self.plan.jobs),
                        catch=(TrainingFailed,),
                        callbacks=[self._print_outcome],
                    )
                else:
                    time.sleep(LOOK)
                if received:
                    raise Stopped(received[0])
                if self._error is not None:
                    self._forget_study(self._error)
                    raise self._error
                others, (waiting, running) = running, self._queue(requests, resume=False)
                if running and not (waiting or others):
                    print(f"waiting for {running} in other processes", flush=True)

    def trials(self, requests: Sequence[Request]) -> list[tuple[Request, FrozenTrial]]:
        """Return the requests that were trained, with the trial of each."""
        latest = self._latest()
        return [(request, latest[request.key]) for request in requests if request.key in latest]

    def settings(self, trial: FrozenTrial | Trial) -> Settings:
        """Return the values of the swept options that a trial was trained with."""
        chosen = {name: trial.params[name] for name in self.names if name in trial.params}
        texts = {n: v if isinstance(v, str) else repr(v) for n, v in chosen.items()}
        return {**trial.user_attrs["settings"], **texts}

    def _queue(self, requests: Sequence[Request], resume: bool) -> tuple[int, int]:
        """Queue what is missing; return how many trials are waiting and running."""
        self._fail_orphans()
        latest = self._latest()
        for request in requests:
            trial = latest.get(request.key)
            if trial is None or self._is_retried(trial, resume):
                attributes = {
                    "key": request.key,
                    "seed": request.seed,
                    "settings": request.settings,
                    "searched": request.trial is not None,
                }
                self.study.enqueue_trial(trial.params if trial else {}, user_attrs=attributes)
        states = [trial.state for trial in self._latest().values()]
        return states.count(TrialState.WAITING), states.count(TrialState.RUNNING)

    def _latest(self) -> dict[str, FrozenTrial]:
        """Return the trial that counts for each requested training, by its key."""
        trials = sorted(  # not in place: the list may be Optuna's own
            self.study.get_trials(deepcopy=False),
            key=lambda trial: (_PRIORITY[trial.state], trial.number),
        )
        return {
            trial.user_attrs["key"]: trial
            for trial in trials
            if trial.user_attrs.get("key") in self._keys and "skipped" not in trial.user_attrs
        }

    def _is_retried(self, trial: FrozenTrial, resume: bool) -> bool:
        """Return True for a trial that is trained again: interrupted or, with resume, failed."""
        if trial.state != TrialState.FAIL:
            return False
        known = trial.user_attrs
        return "reason" not in known or (resume and ("stopped" in known or self.plan.retry_failed))

    def _fail_orphans(self) -> None:
        """Fail the running trials of processes that were killed, so that they are retried."""
        if self.plan.storage is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
        for trial in self._latest().values():
            if trial.state == TrialState.RUNNING and self._is_orphan(trial):
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        """Return True if no process trains a running trial."""
        if (worker := trial.user_attrs.get("worker")) is None:  # killed right after taking it?
            assert trial.datetime_start is not None
            age = datetime.datetime.now() - trial.datetime_start
            return age.total_seconds() > storage.PATIENCE
        return self.plan.storage is None and not storage.is_working(self._workers, worker)

    def _objective(self, trial: Trial, received: Sequence[int]) -> float:
        """Train, and return the last value of the metric."""
        key = trial.user_attrs.get("key")  # None: another process took the last one of the queue
        is_ours = key in self._keys and not self._has_older(trial.number, key)
        if received or self._has_error() or not is_ours:
            trial.set_user_attr("skipped", True)
            raise TrainingFailed
        trial.set_user_attr("worker", self._worker)
        if trial.user_attrs["searched"]:
            for name, full in self.names.items():
                self.plan.space[full].suggest(trial, name)
            if (equal := self._equal_trial(trial)) is not None:
                trial.set_user_attr("same as", equal.number)
                assert equal.value is not None
                return equal.value
        slot = self._slots.get()
        try:
            return TrialTraining(self, trial).run(slot, received, self._has_error)
        except (TrainingFailed, optuna.TrialPruned):
            raise
        except Exception as error:
            self._error = error
            raise TrainingFailed from None
        finally:
            self._slots.put(slot)
            if received or self._has_error():
                self.study.stop()

    def _has_error(self) -> bool:
        return self._error is not None

    def _has_older(self, trial: int, key: str) -> bool:
        """Return True if two processes that began at one time have both queued this training."""
        return any(
            other.number < trial
            and other.user_attrs.get("key") == key
            and other.state != TrialState.FAIL
            for other in self.study.get_trials(deepcopy=False)
        )

    def _equal_trial(self, trial: Trial) -> FrozenTrial | None:
        """Return the finished training with the same settings and seed, if there is one."""
        mine = (trial.user_attrs["seed"], self.settings(trial))
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            known = other.user_attrs
            if "same as" not in known and (known.get("seed"), self.settings(other)) == mine:
                return other
        return None

    def _announcement(self, waiting: int, running: int) -> str:
        total = len(self._keys)
        line = f"{plural(total, 'training')} in {self.plan.out}/runs: {waiting} to train"
        if waiting:
            where = f"GPU {', '.join(self.plan.devices)}" if self.plan.devices else "this machine"
            line += f", {min(waiting, self.plan.jobs)} at a time on {where}"
        if running:
            line += f"; {running} in other processes"
        finished = total - waiting - running
        return f"{line}; finished before: {finished}" if finished else line

    def _print_outcome(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Print how a training of this process ended, and how long the others will take."""
        if trial.state == TrialState.COMPLETE and "same as" not in trial.user_attrs:
            outcome = f"{self.plan.metric} {trial.value:.4g}"
        elif trial.state == TrialState.PRUNED:
            outcome = "pruned"
        elif reason := trial.user_attrs.get("reason"):
            outcome = f"failed: {reason}"
        else:
            return
        ended = sum(trial.state.is_finished() for trial in self._latest().values())
        print(self._progress.advance(trial.user_attrs["folder"], outcome, ended), flush=True)

    def _forget_study(self, error: Exception) -> None:
        """Delete a study without results that asked for a wrong metric: its name is free again."""
        states = {trial.state for trial in self.study.get_trials(deepcopy=False)}
        if isinstance(error, MetricMissing) and states <= {TrialState.FAIL, TrialState.WAITING}:
            optuna.delete_study(study_name=self.plan.study, storage=storage.open_storage(self.plan))

"""Trains what a sweep asks for. Optuna's storage knows what is to do, in progress and done.

All trainings are queued there (``enqueue_trial``) and taken from there by ``Study.optimize``, here
and in every other command that works on the study. Optuna's GridSampler is not used: several
workers would train the same point, and a grid that grows would be trained all over.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import random
import re
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.runner import Run, Stopped, Training
from lit_fanions.sweep.space import Choice, Space, number, short

Sampler = Literal["grid", "random", "tpe"]
Settings = dict[str, str]  # values of options, as fit is given them, by the options' short names

HEARTBEAT = 5  # seconds between the signs of life of a training
PATIENCE = 30  # seconds without one, after which it is trained again
LOOK = 1.0  # seconds between looks at the logs of a training that may be pruned
_ATTEMPTS = 4
LOCK = 60  # seconds that SQLite may be locked by others
# What makes a trial the one that counts for its training; of equals the last.
_RANKS = {TrialState.WAITING: 1, TrialState.RUNNING: 2, TrialState.PRUNED: 3}
_RANKS |= {TrialState.FAIL: 0, TrialState.COMPLETE: 3}


@dataclass(frozen=True)
class Plan:
    """What a study is about.

    Args:
        recipe: Arguments of fit.
        space: The values of further options, by their names.
        sampler: Who combines them; a grid has all combinations.
        metric: The scalar of which the last value counts.
        direction: Where it is better.
        prune: Whether a search ends trainings that fall behind.
        retry_failed: Whether what failed in earlier calls is tried again.
        out: Folder of the logs.
        study: Its name in the storage.
        storage: The URL of a database; None is SQLite in ``out``.
        jobs: Trainings at a time.
        devices: GPUs, as CUDA_VISIBLE_DEVICES names them, for the trainings in turn; none for
            trainings on the processor.
    """

    recipe: tuple[str, ...]
    space: Space
    sampler: Sampler
    metric: str
    direction: Literal["minimize", "maximize"]
    prune: bool
    retry_failed: bool
    out: Path
    study: str
    storage: str | None
    jobs: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """A training that is asked for.

    Args:
        seed: Its seed.
        settings: What it is trained with; a sampler decides for one of a search.
        trial: Its number in the search; None outside of one.
    """

    seed: int
    settings: Settings
    trial: int | None = None

    @property
    def key(self) -> str:
        """What tells it from all others of the study."""
        if self.trial is not None:
            return f"trial {self.trial}"
        values = {name: number(value) for name, value in sorted(self.settings.items())}
        return json.dumps([values, self.seed])


class _NoMetric(Refused):
    """What the study is about is not logged."""


class _Failed(Exception):
    """A training came to nothing; Optuna notes it as failed."""


class Sweep:
    """A study and this process's share in its work.

    Args:
        plan: What it is about.

    Raises:
        Refused: If the storage cannot be used, or the study is about something else.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.study = _study(plan)
        self._names = {short(name): name for name in plan.space}
        self._recipes = runner.digests(plan.recipe)
        self._keys: set[str] = set()
        self._error: Exception | None = None  # that ends all
        self._seen: dict[int, float] = {}  # when a trial that has not begun was first seen
        self._told: set[str] = set()  # whose end was told, which the study may not know yet
        self._telling = threading.Lock()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(plan.jobs):
            self._slots.put(slot)

    def train(self, wanted: Sequence[Wanted], received: Sequence[int], resume: bool) -> None:
        """Train what is missing, and wait for what is in progress elsewhere.

        Args:
            wanted: All trainings that are asked for, finished ones as well.
            received: Signals, see ``runner.signals``.
            resume: Whether to try again what was stopped in earlier calls, and what failed.

        Raises:
            Stopped: By a signal; all processes of this one have ended.
            Refused: If a training does not log the metric.
        """
        self._keys = {request.key for request in wanted}
        patient = False
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
            self._give_up()
            self._enqueue(wanted, resume)
            resume = False
            states = [trial.state for trial in self._latest().values()]
            waiting, running = map(states.count, (TrialState.WAITING, TrialState.RUNNING))
            if waiting:  # what others take first is skipped
                self.study.optimize(
                    lambda trial: self._objective(trial, received),
                    n_trials=waiting,
                    n_jobs=min(waiting, self.plan.jobs),
                    catch=(_Failed,),
                )
            if received:
                raise Stopped(received[0])
            if self._error is not None:
                if isinstance(self._error, _NoMetric):
                    self._forget()
                raise self._error
            if not (waiting or running):
                return
            if not (waiting or patient):
                patient = True
                what = f"waiting for {running} of another process"
                print(f"{what}; if it was killed, they begin anew in {PATIENCE} s", flush=True)
            time.sleep(0 if waiting else LOOK)

    def _forget(self) -> None:
        """Leave the name of a study about what is not logged to a command that does better."""
        states = {trial.state for trial in self.study.get_trials(deepcopy=False)}
        if states <= {TrialState.FAIL, TrialState.WAITING}:  # nobody else works on it
            optuna.delete_study(study_name=self.plan.study, storage=_storage(self.plan))

    def trials(self, wanted: Sequence[Wanted]) -> list[tuple[Wanted, FrozenTrial]]:
        """What became of trainings that were trained."""
        latest = self._latest()
        return [(request, latest[request.key]) for request in wanted if request.key in latest]

    def settings(self, trial: FrozenTrial | Trial) -> Settings:
        """What a trial was trained with; of a search that it may not have known yet."""
        chosen = {name: trial.params[name] for name in self._names if name in trial.params}
        texts = {n: v if isinstance(v, str) else repr(v) for n, v in chosen.items()}
        return {**trial.user_attrs["settings"], **texts}

    def _latest(self) -> dict[str, FrozenTrial]:
        """The trial that counts for each training asked for, by its key."""
        known = [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.user_attrs.get("key") in self._keys and "skipped" not in trial.user_attrs
        ]
        known.sort(key=lambda trial: (_RANKS[trial.state], trial.number))
        return {trial.user_attrs["key"]: trial for trial in known}

    def _enqueue(self, wanted: Sequence[Wanted], resume: bool) -> None:
        """Queue what the study does not know, and what failed and is tried again."""
        latest = self._latest()
        for request in wanted:
            trial = latest.get(request.key)
            if trial is not None and not self._tries_again(trial, resume):
                continue
            attributes = {
                "key": request.key,
                "seed": request.seed,
                "settings": request.settings,
                "searched": request.trial is not None,
            }
            self.study.enqueue_trial(trial.params if trial else {}, user_attrs=attributes)

    def _tries_again(self, trial: FrozenTrial, resume: bool) -> bool:
        """Whether a failure is tried again: what was stopped in an earlier call always is."""
        known = trial.user_attrs
        stopped = "stopped" in known or "reason" not in known
        began = "folder" in known
        again = not began or (resume and (stopped or self.plan.retry_failed))
        return trial.state == TrialState.FAIL and again

    def _give_up(self) -> None:
        """Fail what a worker took and never began: it was killed before the first heartbeat."""
        for trial in self._latest().values():
            if trial.state == TrialState.RUNNING and "folder" not in trial.user_attrs:
                first = self._seen.setdefault(trial.number, time.monotonic())
                if time.monotonic() > first + PATIENCE:
                    with contextlib.suppress(ValueError):  # it ended meanwhile
                        self.study.tell(trial.number, state=TrialState.FAIL)

    def _objective(self, trial: Trial, received: Sequence[int]) -> float:
        """Train, and return the last value of the metric."""
        attributes = trial.user_attrs
        key = attributes.get("key")  # None: another process took the last of the queue
        stopped = received or self._error is not None
        if stopped or key not in self._keys or self._has_older(trial.number, key):
            trial.set_user_attr("skipped", True)
            raise _Failed
        if attributes["searched"]:
            for name, full in self._names.items():
                self.plan.space[full].suggest(trial, name)
            twin = self._twin(trial)
            if twin is not None:
                trial.set_user_attr("same as", twin.number)
                assert twin.value is not None
                return twin.value
        slot = self._slots.get()
        training = self._start(trial, slot)
        try:
            if runner.digests(self.plan.recipe) != self._recipes:
                raise Refused("the recipe was changed during the sweep: choose another --out")
            self._watch(training, trial, received)
            return self._value(training, trial, received)
        except (_Failed, optuna.TrialPruned):
            raise
        except Exception as error:
            self._error = error
            raise _Failed from None
        finally:
            runner.end([training.process], received)
            self._slots.put(slot)
            if received or self._error is not None:
                self.study.stop()

    def _has_older(self, trial: int, key: str) -> bool:
        """Whether this training has been queued twice, by commands that began at one time."""
        return any(
            other.number < trial
            and other.user_attrs.get("key") == key
            and other.state != TrialState.FAIL
            for other in self.study.get_trials(deepcopy=False)
        )

    def _twin(self, trial: Trial) -> FrozenTrial | None:
        """The training of the same settings and seed that has been finished, if there is one."""
        wanted = (trial.user_attrs["seed"], self.settings(trial))
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            known = other.user_attrs
            if "same as" not in known and (known.get("seed"), self.settings(other)) == wanted:
                return other
        return None

    def _start(self, trial: Trial, slot: int) -> Training:
        plan, settings, seed = self.plan, self.settings(trial), trial.user_attrs["seed"]
        values = {name: number(value) for name, value in settings.items()}
        label = ",".join(
            f"{name.rpartition('.')[2]}={f'{v:.4g}' if isinstance(v, float) else v}"
            for name, v in values.items()
        )
        safe = re.sub(r"[^\w.,=+-]", "_", label)[:120]
        name = "-".join(filter(None, [f"{trial.number:03d}", safe, f"seed{seed}"]))
        trial.set_user_attr("folder", name)
        trial.set_user_attr("commit", runner.commit())
        options = [f"--{self._names[name]}={value}" for name, value in settings.items()]
        args = (*plan.recipe, *options, f"--seed_everything={seed}", "--trainer.devices=1")
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // plan.jobs))}
        if plan.devices:
            environment["CUDA_VISIBLE_DEVICES"] = plan.devices[slot % len(plan.devices)]
        return runner.start(Run(name, args), plan.out / "runs", environment)

    def _watch(self, training: Training, trial: Trial, received: Sequence[int]) -> None:
        """Wait for the end; on the way report to the pruner what a search's training logs."""
        prunes = self.plan.prune and trial.user_attrs["searched"]
        events = runner.events(training.logs)
        look = time.monotonic() + LOOK
        while training.process.poll() is None and not received and self._error is None:
            time.sleep(runner.POLL)
            if prunes and time.monotonic() > look:
                self._report(runner.curve(events, self.plan.metric), trial)
                if trial.should_prune():
                    self._tell(training, trial, "pruned")
                    raise optuna.TrialPruned
                look = time.monotonic() + LOOK

    def _value(self, training: Training, trial: Trial, received: Sequence[int]) -> float:
        status = training.process.poll()
        if status is None or (status and received):
            raise _Failed  # without a reason: it was stopped
        if (reason := runner.failure(training)) is not None:
            trial.set_user_attr("reason", reason)
            if status in runner.KILLED:
                trial.set_user_attr("stopped", True)
            self._tell(training, trial, f"failed: {reason}")
            raise _Failed
        try:
            curve = runner.read_curves(training.logs, [self.plan.metric])[self.plan.metric]
        except Refused as error:
            raise _NoMetric(str(error)) from None
        self._report(curve, trial)
        self._tell(training, trial, f"{self.plan.metric} {curve[-1][1]:.4g}")
        return self._comparable(curve[-1][1])

    def _report(self, curve: runner.Curve, trial: Trial) -> None:
        """Let the study know values that it does not know yet."""
        (known,) = (t for t in self.study.get_trials(deepcopy=False) if t.number == trial.number)
        for step, value in curve:
            if step not in known.intermediate_values:
                trial.report(self._comparable(value), step)

    def _comparable(self, value: float) -> float:
        """A value; what is not finite is the worst, whichever direction is better."""
        worst = math.inf if self.plan.direction == "minimize" else -math.inf
        return value if math.isfinite(value) else worst

    def _tell(self, training: Training, trial: Trial, what: str) -> None:
        with self._telling:
            self._told.add(trial.user_attrs["key"])
            ended = {key for key, known in self._latest().items() if known.state.is_finished()}
            done = len(ended | self._told & self._keys)
            print(f"[{done}/{len(self._keys)}] {training.run.name}: {what}", flush=True)


def _study(plan: Plan) -> optuna.Study:
    """Open the study, or make it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    plan.out.mkdir(parents=True, exist_ok=True)
    try:
        storage = _storage(plan)
        study = optuna.create_study(
            storage=storage, study_name=plan.study, direction=plan.direction, load_if_exists=True
        )
    except (ImportError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        line = str(error).partition("\n")[0]
        raise Refused(f"--storage {hidden(plan.storage)} cannot be used: {line}") from None
    _check_identity(study, plan)
    # Another seed in every call: the same would propose the same settings again.
    seed = len(study.get_trials(deepcopy=False))
    samplers = optuna.samplers
    chosen = samplers.TPESampler if plan.sampler == "tpe" else samplers.RandomSampler
    study.sampler = chosen(seed=seed)
    study.pruner = optuna.pruners.MedianPruner()
    return study


def _storage(plan: Plan) -> optuna.storages.RDBStorage:
    """Open the storage; tables that another command is just making make it fail at first."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            return _opened(plan)
        time.sleep(1 + random.random())  # two that fail together shall not try together
    return _opened(plan)


def _opened(plan: Plan) -> optuna.storages.RDBStorage:
    path = plan.out / "study.db"
    url = plan.storage or sqlalchemy.URL.create("sqlite", database=str(path))
    sqlite = sqlalchemy.make_url(url).get_backend_name() == "sqlite"
    # Python's own transactions with SQLite begin after the first read, so that two workers could
    # take the same trial.
    connect = {"timeout": LOCK, "isolation_level": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            str(url),
            engine_kwargs={"connect_args": connect} if sqlite else None,
            heartbeat_interval=HEARTBEAT,
            grace_period=PATIENCE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
    if sqlite:
        sqlalchemy.event.listen(storage.engine, "begin", _begin)
    return storage


def _begin(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def hidden(storage: str | None) -> str | None:
    """A storage's URL without its password."""
    try:
        return storage and sqlalchemy.make_url(storage).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return storage


def _check_identity(study: optuna.Study, plan: Plan) -> None:
    """Let a study be about one recipe, one metric and, if it searches, one space."""
    searched = {short(name): repr(values) for name, values in plan.space.items()}
    identity: dict[str, Any] = {
        "arguments of fit": list(plan.recipe),
        "recipe": runner.digests(plan.recipe),
        "metric": [plan.metric, plan.direction],
        "search": None if plan.sampler == "grid" else searched,
    }
    known: Mapping[str, Any] = study.user_attrs
    changed = [name for name, value in identity.items() if known.get(name, value) != value]
    if changed:
        raise Refused(
            f"the study {plan.study} was made with another {' and another '.join(changed)}: "
            "choose another --out or --study"
        )
    for name in identity.keys() - known.keys():
        study.set_user_attr(name, identity[name])


def grid(space: Space, seeds: int) -> list[Wanted]:
    """All combinations of values with all seeds, a whole round of settings for each seed."""
    combinations: list[Settings] = [{}]
    for name, values in space.items():
        assert isinstance(values, Choice)
        combinations = [{**c, short(name): value} for c in combinations for value in values.values]
    return [Wanted(seed, settings) for seed in range(seeds) for settings in combinations]

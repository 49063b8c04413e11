"""Open the study of a sweep, and tell which processes work on it.

The study is kept in an Optuna journal in the sweep's folder, or in a database of the user. A
database has Optuna's heartbeats, by which a trial of a killed process is retried. A journal has
none: there each process holds a file lock, which the system releases when the process ends.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import SQLAlchemyError

from lit_fanions.cli.console import Refused
from lit_fanions.cli.results import recipe_digests
from lit_fanions.sweep.plan import Plan, short

HEARTBEAT = 5  # seconds between heartbeats of a training, in a database
PATIENCE = 30  # seconds without one after which the training is retried
_ATTEMPTS = 4


def open_study(plan: Plan) -> optuna.Study:
    """Open the study of a sweep, or create it; refuse a study that belongs to another sweep."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=open_storage(plan),
            study_name=plan.study,
            direction=plan.direction,
            load_if_exists=True,
        )
    except (ImportError, OSError, ValueError, SQLAlchemyError, optuna.exceptions.OptunaError) as e:
        where = f"--storage {hide_password(plan.storage)}" if plan.storage else f"--out {plan.out}"
        raise Refused(f"{where} cannot be used: {str(e).partition(chr(10))[0]}") from None
    _check_identity(study, plan)
    # Another seed in every call: the same one would propose the same settings again.
    seed = len(study.get_trials(deepcopy=False))
    tpe, uniform = optuna.samplers.TPESampler, optuna.samplers.RandomSampler
    study.sampler = (tpe if plan.sampler == "tpe" else uniform)(seed=seed)
    study.pruner = optuna.pruners.MedianPruner()
    return study


def _check_identity(study: optuna.Study, plan: Plan) -> None:
    """Refuse a study of another recipe, another metric or, for a search, another space."""
    searched = {short(name): repr(values) for name, values in plan.space.items()}
    identity: dict[str, Any] = {
        "arguments of fit": list(plan.recipe),
        "recipe": recipe_digests(plan.recipe),
        "metric": [plan.metric, plan.direction],
        "search": searched if plan.searches else None,
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


def open_storage(plan: Plan) -> JournalStorage | RDBStorage:
    """Open the storage of a sweep, or create it."""
    if plan.storage is None:
        plan.out.mkdir(parents=True, exist_ok=True)
        journal = plan.out / "journal.log"
        return JournalStorage(JournalFileBackend(str(journal), _JournalLock(journal)))
    for _ in range(_ATTEMPTS - 1):  # fails while another process creates the tables
        with contextlib.suppress(SQLAlchemyError):
            return _open_database(plan.storage)
        time.sleep(1 + random.random())
    return _open_database(plan.storage)


def _open_database(url: str) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT,
            grace_period=PATIENCE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


class _JournalLock(JournalFileOpenLock):
    """A lock of a journal that does not outlive its process, and that repairs the journal.

    The lock of a killed process is released by the system; Optuna's own would block all others for
    30 seconds. A line that a killed process left unfinished is removed; Optuna would append to it,
    and could not read the journal any more.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(f"{journal}.lock", poll_interval=0.01)

    def acquire(self) -> bool:
        """Wait for the lock, then repair the journal."""
        self._lock.acquire()
        with self._journal.open("rb+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


@contextlib.contextmanager
def register_worker(folder: Path) -> Iterator[str]:
    """Hold a lock in a folder, which shows other processes that this one works; yield its name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    with FileLock(folder / name):
        yield name
    (folder / name).unlink(missing_ok=True)


def is_working(folder: Path, name: str) -> bool:
    """Return True if the process that registered under a name has not ended."""
    if not (path := folder / name).exists():
        return False
    try:
        with FileLock(path, blocking=False):
            path.unlink(missing_ok=True)
            return False
    except Timeout:
        return True


def hide_password(url: str | None) -> str | None:
    """Return the URL of a storage without its password."""
    return url and re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)

"""The journal survives killed processes; a study belongs to one sweep."""

import dataclasses
import time
from pathlib import Path

import optuna
import pytest

from lit_fanions.cli.console import Refused
from lit_fanions.sweep import storage
from lit_fanions.sweep.plan import Choice, Range
from tests.sweep.fakes import PLAN, go, in_another_process, search, trained, wait_for


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"recipe": ("--config=recipe.yaml", "--a=1")}, "arguments of fit"),
        ({"metric": "val/acc"}, "metric"),
        ({"direction": "maximize"}, "metric"),
        ({"sampler": "tpe"}, "search"),
    ],
)
def test_another_sweep_in_the_same_study_is_refused(change, what, fake):
    go()
    with pytest.raises(Refused, match=rf"^the study s was made with another {what}: choose"):
        go(**change)
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}


def test_changed_recipe_is_refused(fake):
    go()
    Path("recipe.yaml").write_text("lr: 2")
    with pytest.raises(Refused, match="the study s was made with another recipe"):
        go()
    assert len(trained()) == 2


def test_another_space_is_refused(fake):
    search(1)
    with pytest.raises(Refused, match="another search"):
        search(1, space={"x": Range(0.0, 2.0)})


def test_storage_that_cannot_be_used_is_named(fake):
    with pytest.raises(Refused, match=r"^--storage nonsense cannot be used: "):
        go(storage="nonsense")


def test_password_is_hidden():
    assert storage.hide_password("mysql://me:secret@host/db") == "mysql://me:***@host/db"
    assert storage.hide_password(None) is None


def test_database_of_the_user_is_used(fake, tmp_path):
    url = f"sqlite:///{tmp_path}/own.db"
    go(storage=url, jobs=1)
    assert (tmp_path / "own.db").exists()
    go(storage=url, jobs=1, out=Path("elsewhere"))
    assert len(trained()) == 2


def test_database_has_heartbeats_and_retries_trials(fake, tmp_path):
    plan = dataclasses.replace(PLAN, storage=f"sqlite:///{tmp_path}/own.db")
    database = storage.open_storage(plan)
    assert database.get_heartbeat_interval() == storage.HEARTBEAT
    callback = database.get_heartbeat_stale_trial_callback()
    assert isinstance(callback, optuna.storages.RetryHeartbeatStaleTrialCallback)


def test_killed_sweep_in_a_database_is_resumed_after_its_last_heartbeat(
    fake, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "HEARTBEAT", 1)
    monkeypatch.setattr(storage, "PATIENCE", 2)
    url = f"sqlite:///{tmp_path}/own.db"
    fake("log(x) if x == 1 else time.sleep(10)")
    process = in_another_process(lambda: go(storage=url, jobs=1))
    wait_for(lambda: len(trained()) == 2)
    process.kill()
    process.join()
    fake()
    assert go(storage=url, jobs=1) == {(1, 0): 1.0, (2, 0): 2.0}
    assert len(trained()) == 3


def test_unfinished_line_of_a_killed_process_is_removed(fake):
    go(space={"x": Choice(("1",))})
    journal = Path("out/journal.log")
    whole = journal.read_bytes()
    for rest in (b'{"unfinished', b"\x00\x00"):
        with journal.open("ab") as file:
            file.write(rest)
        go(space={"x": Choice(("1",))})
        assert journal.read_bytes().startswith(whole) and rest not in journal.read_bytes()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert len(trained()) == 2


def test_lock_of_a_killed_process_is_released(fake):
    go(space={"x": Choice(("1",))})

    def hold():
        storage._JournalLock(Path("out/journal.log")).acquire()
        Path("held").touch()
        time.sleep(60)

    process = in_another_process(hold)
    wait_for(Path("held").exists)
    process.kill()
    process.join()
    start = time.monotonic()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert time.monotonic() - start < 25  # Optuna's own lock waits for 30 seconds


def test_registered_worker_is_known_until_it_ends(tmp_path):
    with storage.register_worker(tmp_path) as name:
        assert storage.is_working(tmp_path, name)
    assert not storage.is_working(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_named(fake):
    Path("file").touch()
    with pytest.raises(Refused, match=r"^--out file/out cannot be used: "):
        go(out=Path("file/out"))

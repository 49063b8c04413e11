"""A training gets its arguments and its device, and its last value counts."""

import math
import os
import time

import optuna
import pytest

from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused
from lit_fanions.sweep.plan import Choice
from lit_fanions.sweep.study import TrialTraining
from tests.sweep.fakes import SIMPLE, assert_gone, go, points, search, trained


def test_training_gets_its_settings_seed_and_one_device(fake, monkeypatch):
    given = []
    command = runner._command
    monkeypatch.setattr(runner, "_command", lambda run, out: given.append(run) or command(run, out))
    space = {"model.init_args.x": Choice(("1",))}
    go(space=space, recipe=("--config=recipe.yaml", "--x=7"))
    assert given[0].name == "000-x=1-seed0"
    assert given[0].args == (
        *("--config=recipe.yaml", "--x=7", "--model.init_args.x=1"),
        *("--seed_everything=0", "--trainer.devices=1"),
    )


def test_recipe_changed_during_the_sweep_is_refused(fake):
    fake(f"open('recipe.yaml', 'a').write(' '); {SIMPLE}")
    with pytest.raises(Refused, match="the recipe was changed during the sweep"):
        go(jobs=1)
    assert points() in ([(1, 0)], [(1, 0), (2, 0)])


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_divergence_is_the_worst_value(direction, worst, fake):
    fake("log(float('inf'))")
    assert go(direction=direction, space={}) == {(0,): worst}


def test_error_of_the_storage_ends_the_sweep(fake, monkeypatch):
    fake("time.sleep(0 if x == 1 else 60); log(x)")

    def report(*args):
        raise optuna.exceptions.StorageInternalError("gone")

    monkeypatch.setattr(TrialTraining, "_report", report)
    with pytest.raises(optuna.exceptions.StorageInternalError, match="gone"):
        go()
    assert_gone(pid for _, _, pid, *_ in trained())


def test_each_training_has_a_device_of_its_own(fake):
    fake(f"time.sleep(0.3); {SIMPLE}")
    go(seeds=2, devices=("3", "5"))
    devices = [device for *_, device, _ in trained()]
    assert set(devices[:2]) == set(devices[2:]) == {"3", "5"}


def test_trainings_share_the_cores_that_the_sweep_may_use(fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    go(jobs=2)
    assert [threads for *_, threads in trained()] == ["3", "3"]


def test_trainings_have_the_number_of_threads_that_the_user_has_set(fake, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    go(jobs=2)
    assert [threads for *_, threads in trained()] == ["5", "5"]


def test_search_prunes_trainings_that_fall_behind(fake, capfd):
    # Settings are ever worse, and only those that are pruned take long.
    later = "rank = len(open('trained').readlines()); log(rank)"
    fake(f"{later}; time.sleep(0 if rank <= 5 else 60); log(rank)")
    start = time.monotonic()
    sweep, requests = search(7)
    assert time.monotonic() - start < 30
    states = [trial.state.name for _, trial in sweep.trials(requests)]
    assert states == ["COMPLETE"] * 5 + ["PRUNED"] * 2
    assert "[7/7]" in capfd.readouterr().out
    search(7)  # what is pruned is finished
    assert len(trained()) == 7
    assert_gone(pid for _, _, pid, *_ in trained())

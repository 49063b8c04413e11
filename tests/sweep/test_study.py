"""Sweeps with processes that only stand for trainings: nothing is lost, repeated or left behind."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import optuna
import pytest

from lit_fanions.cli import curves, runner
from lit_fanions.cli.console import Refused
from lit_fanions.sweep import result, storage, study, training
from lit_fanions.sweep.plan import Plan, Request, grid_requests
from lit_fanions.sweep.space import Choice, Range
from lit_fanions.sweep.study import Sweep
from lit_fanions.sweep.training import TrialTraining

# What stands for a training: `log` notes a step of its curve, after it has said what it trains.
TRAINING = """
import json, os, pathlib, signal, sys, time
folder, args = pathlib.Path(sys.argv[1]), dict(a[2:].split("=") for a in sys.argv[2:] if "=" in a)
x, seed = float(args.get("x", 0)), int(args["seed_everything"])
environment = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
with open("trained", "a") as file:
    file.write(json.dumps([x, seed, os.getpid(), *environment]) + "\\n")
curve = []
def log(value):
    curve.append((len(curve), value))
    (folder / "partial").write_text(json.dumps(curve))
    (folder / "partial").rename(folder / "curve")
"""
SIMPLE = "log(x + seed / 100)"


def python_command(code):
    def command(run, folder):
        return [sys.executable, "-c", TRAINING + code, str(folder / run.name), *run.args]

    return command


def read(logs, metric="val/loss"):
    with contextlib.suppress(FileNotFoundError):
        return [tuple(point) for point in json.loads((logs / "curve").read_text())]
    return []


@pytest.fixture
def fake(hears_signals, monkeypatch, tmp_path):
    """Replace trainings by Python code; returns the function that does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(curves, "open_events", lambda logs: logs)
    monkeypatch.setattr(curves, "read_curve", read)
    monkeypatch.setattr(curves, "read_curves", lambda logs, metrics: {metrics[0]: read(logs)})
    monkeypatch.setattr(study, "LOOK", 0.05)
    monkeypatch.setattr(training, "LOOK", 0.05)
    Path("recipe.yaml").write_text("lr: 1")

    def replace(code=SIMPLE):
        monkeypatch.setattr(runner, "_command", python_command(code))

    replace()
    return replace


PLAN = Plan(
    recipe=("--config=recipe.yaml",),
    space={"x": Choice(("1", "2"))},
    sampler="grid",
    metric="val/loss",
    direction="minimize",
    prune=True,
    retry_failed=False,
    out=Path("out"),
    study="s",
    storage=None,
    jobs=2,
    devices=(),
)


def go(seeds=1, **changes):
    """Train a grid; values by settings and seed, None where there is none."""
    plan = dataclasses.replace(PLAN, **changes)
    sweep = Sweep(plan)
    requests = grid_requests(plan.space, seeds)
    with runner.signals() as received:
        sweep.train(requests, received)
    return {
        (*map(float, request.settings.values()), request.seed): trial.value
        for request, trial in sweep.trials(requests)
    }


def trained():
    """What was trained, in the order of its beginning."""
    path = Path("trained")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def points():
    return sorted((x, seed) for x, seed, *_ in trained())


def assert_gone(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# What is finished is not trained again.


def test_every_setting_is_trained_with_every_seed_once(fake):
    expected = {(1, 0): 1.0, (2, 0): 2.0, (1, 1): 1.01, (2, 1): 2.01}
    assert go(seeds=2) == expected
    assert go(seeds=2) == expected
    assert points() == sorted(expected)


def test_a_sweep_grows(fake):
    go()
    assert len(go(seeds=2, space={"x": Choice(("3", "1.0", "2"))})) == 6  # 1.0 is 1
    assert Counter(points()) == Counter((x, seed) for x in (1, 2, 3) for seed in (0, 1))
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}


def test_seed_by_seed(fake):
    go(seeds=2, jobs=1)
    assert [(x, seed) for x, seed, *_ in trained()] == [(1, 0), (2, 0), (1, 1), (2, 1)]


def test_arguments_of_a_training(fake, monkeypatch):
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


def test_recipe_that_changes_on_the_way_is_refused(fake):
    fake(f"open('recipe.yaml', 'a').write(' '); {SIMPLE}")
    with pytest.raises(Refused, match="the recipe was changed during the sweep"):
        go(jobs=1)
    assert points() in ([(1, 0)], [(1, 0), (2, 0)])


# What fails.


def test_failure_is_kept_with_its_reason_until_asked_for(fake, capfd):
    fake("log(x) if x == 1 else sys.exit('error: bad x')")
    assert go() == {(1, 0): 1.0, (2, 0): None}
    assert "001-x=2-seed0: failed: exit status 1: error: bad x" in capfd.readouterr().out
    assert go() == {(1, 0): 1.0, (2, 0): None}
    assert len(trained()) == 2
    fake()
    assert go(retry_failed=True) == {(1, 0): 1.0, (2, 0): 2.0}
    assert points() == [(1, 0), (2, 0), (2, 0)]


def test_training_that_was_killed_is_trained_again(fake, capfd):
    fake("os.kill(os.getpid(), signal.SIGKILL) if x == 2 else log(x)")
    assert go() == {(1, 0): 1.0, (2, 0): None}
    assert "failed: killed by SIGKILL" in capfd.readouterr().out
    fake()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert points() == [(1, 0), (2, 0), (2, 0)]


def test_missing_metric_ends_the_sweep(fake, monkeypatch):
    fake("time.sleep(0 if x == 1 else 60)")

    def read_curves(logs, metrics):
        if metrics == ["typo"]:
            raise Refused("no metric")
        return {metrics[0]: read(logs)}

    monkeypatch.setattr(curves, "read_curves", read_curves)
    with pytest.raises(Refused, match="no metric"):
        go(seeds=2, metric="typo", direction="maximize")
    assert len(trained()) <= 2
    assert_gone(pid for _, _, pid, *_ in trained())
    # The name is free for a corrected command, as there are no results; then it is not.
    fake()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    with pytest.raises(Refused, match="another metric"):
        go(metric="typo")


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_what_diverges_is_the_worst(direction, worst, fake):
    fake("log(float('inf'))")
    assert go(direction=direction, space={}) == {(0,): worst}


# What is killed.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_all_and_the_same_call_goes_on(number, fake):
    fake(
        f"""
if (x, seed) == (1, 0):
    log(x)
    sys.exit()
while len(open("trained").readlines()) < 3:
    time.sleep(0.01)
os.kill(os.getppid(), {int(number)})
time.sleep(60)
"""
    )
    start = time.monotonic()
    with pytest.raises(runner.Stopped):
        go(seeds=2)
    assert time.monotonic() - start < 20
    assert_gone(pid for _, _, pid, *_ in trained())
    assert len(trained()) == 3
    fake()
    assert len(go(seeds=2)) == 4
    assert Counter(points())[1, 0] == 1  # it was finished


def in_another_process(target):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_sweep_is_resumed(fake):
    # The second sees that its parent has gone, as `lit_fanions.cli.child` does.
    fake("log(x) if x == 1 else os.read(0, 1) or open('ended', 'w')")
    parent = in_another_process(lambda: go(jobs=1))
    wait_for(lambda: len(trained()) == 2)
    parent.kill()
    parent.join()
    wait_for(Path("ended").exists)
    fake()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert points() == [(1, 0), (2, 0), (2, 0)]


def test_sweep_that_was_killed_before_a_training_began_is_resumed(fake, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 1)
    sweep = Sweep(PLAN)
    requests = grid_requests(PLAN.space, 1)
    sweep._keys = {request.key for request in requests}
    sweep._queue(requests, resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no heartbeat
        sweep.study.ask()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert points() == [(1, 0), (2, 0)]


def test_storage_that_fails_ends_the_sweep(fake, monkeypatch):
    fake("time.sleep(0 if x == 1 else 60); log(x)")

    def report(*args):
        raise optuna.exceptions.StorageInternalError("gone")

    monkeypatch.setattr(TrialTraining, "_report", report)
    with pytest.raises(optuna.exceptions.StorageInternalError, match="gone"):
        go()
    assert_gone(pid for _, _, pid, *_ in trained())


def test_two_commands_share_the_work(fake):
    fake(f"time.sleep(0.05); {SIMPLE}")
    space = {"x": Choice(tuple(map(str, range(8))))}
    other = in_another_process(lambda: go(space=space))
    assert len(go(space=space)) == 8
    other.join()
    assert other.exitcode == 0
    assert points() == [(x, 0) for x in range(8)]


# Devices.


def test_each_training_has_a_device_of_its_own(fake):
    fake(f"time.sleep(0.3); {SIMPLE}")
    go(seeds=2, devices=("3", "5"))
    devices = [device for *_, device, _ in trained()]
    assert set(devices[:2]) == set(devices[2:]) == {"3", "5"}


def test_trainings_share_the_cores(fake, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    go(jobs=2)
    assert [threads for *_, threads in trained()] == ["3", "3"]


# Searches.


SEARCH = {"sampler": "tpe", "space": {"x": Range(0.0, 1.0)}, "jobs": 1}


def search(trials, seeds=1, **changes):
    sweep = Sweep(dataclasses.replace(PLAN, **(SEARCH | changes)))
    requests = [Request(0, {}, trial) for trial in range(trials)]
    with runner.signals() as received:
        sweep.train(requests, received)
        best = result.best_settings(sweep, requests)
        requests += [Request(seed, best) for seed in range(1, seeds)]
        sweep.train(requests, received)
    return sweep, requests


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_search_repeats_the_best_with_other_seeds(sampler, fake):
    search(4, seeds=3, sampler=sampler)
    tried = [x for x, seed, *_ in trained() if seed == 0]
    assert len(set(tried)) == 4
    assert all(0 <= x <= 1 for x in tried)
    assert [(x, seed) for x, seed, *_ in trained()[4:]] == [(min(tried), 1), (min(tried), 2)]
    search(4, seeds=3, sampler=sampler)
    assert len(trained()) == 6
    search(6, sampler=sampler)  # other settings than those of before
    assert len({x for x, *_ in trained()}) == 6


def test_setting_that_is_proposed_again_is_not_trained_again(fake):
    sweep, requests = search(6, space={"x": Choice(("0.25", "0.5"))})
    assert len(trained()) == len({x for x, *_ in trained()}) == 2
    (table,) = result.summarize(sweep, requests)[0].tables
    assert [row[-1] for row in table.rows] == [1, 1]


def test_failed_setting_of_a_search_is_tried_again(fake):
    fake("sys.exit(1)")
    search(2)
    fake()
    search(2, retry_failed=True)
    xs = [x for x, *_ in trained()]
    assert xs[:2] == xs[2:]


def test_search_prunes_what_falls_behind(fake, capfd):
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


def test_another_space_is_refused(fake):
    search(1)
    with pytest.raises(Refused, match="another search"):
        search(1, space={"x": Range(0.0, 2.0)})


# The storage.


def test_storage_that_cannot_be_used_is_named(fake):
    with pytest.raises(Refused, match=r"^--storage nonsense cannot be used: "):
        go(storage="nonsense")


def test_password_is_hidden():
    assert storage.hide_password("mysql://me:secret@host/db") == "mysql://me:***@host/db"
    assert storage.hide_password(None) is None


def test_storage_of_ones_own(fake, tmp_path):
    url = f"sqlite:///{tmp_path}/own.db"
    go(storage=url)
    assert (tmp_path / "own.db").exists()
    go(storage=url, out=Path("elsewhere"))
    assert len(trained()) == 2


# The outcome.


def test_outcome_of_a_grid(fake):
    fake("x = float(args['m.init_args.x']); log(x + seed) if x + seed < 3 else sys.exit('bad')")
    plan = dataclasses.replace(PLAN, space={"m.init_args.x": Choice(("1", "2"))})
    sweep, requests = Sweep(plan), grid_requests(plan.space, 2)
    sweep.train(requests, [])
    found, failed = result.summarize(sweep, requests)
    assert failed
    assert found.tables[0].rows == [["1", "1.5000 ± 0.7071", 2], ["2", "2.0000", 1]]
    assert "best: x=1" in found.notes
    assert "failed: 003-x=2-seed1: exit status 1: bad" in found.notes
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    assert [(row["m.x"], row["seed"], row["val/loss"]) for row in rows] == [
        *((1.0, 0, 1.0), (2.0, 0, 2.0), (1.0, 1, 2.0), (2.0, 1, None))
    ]
    assert rows[3]["state"] == "fail"
    found.save(Path("out"), "sweep")
    assert json.loads(Path("out/sweep.json").read_text())["settings"]["seeds"] == [0, 1]
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_outcome_of_a_search(fake, monkeypatch):
    monkeypatch.setattr(result, "SHOWN", 2)
    sweep, requests = search(
        3, seeds=2, space={"a.x": Range(0.1, 1.0, log=True), "b.x": Choice("pq")}
    )
    found, failed = result.summarize(sweep, requests)
    assert not failed
    (table,) = found.tables
    assert table.columns == ["a.x", "b.x", "val/loss", "n"]
    assert [row[-1] for row in table.rows] == [2, 1]  # first what was found to be the best
    found.save(Path("out"), "sweep")
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_but_failures(fake):
    fake("sys.exit('error: bad')")
    sweep, requests = Sweep(PLAN), grid_requests(PLAN.space, 1)
    sweep.train(requests, [])
    with pytest.raises(Refused, match=r"^every training failed, as 00\d-x=\d-seed0: exit status 1"):
        result.summarize(sweep, requests)

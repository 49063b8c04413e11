"""Runs in processes of their own: none is trained twice, mixed up, or left behind."""

import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from experiments.paper import execution
from experiments.paper.execution import execute
from lit_fanions.cli import results, runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.runner import Run, Stopped

INF = math.inf
CURVE = [(0, 2.0), (4, 1.5)]

# What the process that stands for a training does: it says who it is, then something more.
HERE = "import os, signal, sys, time; open('pid', 'a').write(f'{os.getpid()}\\n'); "


@pytest.fixture
def fake(hears_signals, monkeypatch, tmp_path):
    """Replace the training by Python code, and reading its logs by a constant."""

    def replace(code):
        monkeypatch.setattr(runner, "_command", lambda run, folder: [sys.executable, "-c", code])
        monkeypatch.setattr(execution, "read_curves", lambda logs, metrics: {"val/loss": CURVE})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "POLL", 0.01)
    return replace


def pids():
    path = Path("pid")
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_gone(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def some(count=1, args=()):
    return [Run(f"run{i}", tuple(args)) for i in range(count)]


def go(given, jobs=1):
    found = execute(given, Path("out"), ["val/loss"], jobs)
    assert all(list(curves) == ["val/loss"] for curves in found.values())
    return {name: curves["val/loss"] for name, curves in found.items()}


# What is finished is not run again, unless it was another run.


def test_finished_runs_are_kept(fake):
    fake(HERE)
    assert go(some(2), jobs=2) == {"run0": CURVE, "run1": CURVE}
    assert go(some(3), jobs=2) == {"run0": CURVE, "run1": CURVE, "run2": CURVE}
    assert len(pids()) == 3


def test_diverged_run_is_kept(fake, monkeypatch):
    fake(HERE)
    diverged = [(0, 2.0), (4, INF)]
    monkeypatch.setattr(execution, "read_curves", lambda logs, metrics: {"val/loss": diverged})
    assert go(some()) == go(some()) == {"run0": diverged}
    assert len(pids()) == 1


def test_failed_run_has_no_curve_and_says_why(fake, capfd):
    fake(HERE + "print('error: bad lr\\n  all options: --help'); sys.exit(2)")
    assert go(some()) == {}
    printed = capfd.readouterr()
    assert printed.err == "run0: exit status 2: error: bad lr\n"
    assert printed.out.splitlines() == ["out: 1 to train, 1 at a time", "[1/1] run0: failed"]
    assert not Path("out/run0", execution.FINISHED).exists()


def test_no_more_is_tried_where_nothing_can_succeed(fake, capfd):
    fake(HERE + "print('error: no data'); sys.exit(1)")
    with pytest.raises(Refused, match="the first two runs failed alike: exit status 1: error: no"):
        go(some(5))
    assert len(pids()) == 2
    # What has succeeded before shows that something can.
    fake(HERE)
    go(some())
    fake(HERE + "print('error: no data'); sys.exit(1)")
    assert go(some(4)) == {"run0": CURVE}
    assert "out: 3 to train, 1 at a time; finished before: 1\n" in capfd.readouterr().out


@pytest.mark.parametrize("args", [["--a=1"], ["--a", "1"]])
def test_other_arguments_are_refused(fake, args):
    fake(HERE)
    go(some(args=args))
    changed = r"out/run0 holds a run with other settings \(--a=1, --a=2\)"
    with pytest.raises(Refused, match=changed):
        go(some(args=["--a=2"]))


@pytest.mark.parametrize("args", [["--config=recipe.yaml"], ["--config", "recipe.yaml"]])
def test_changed_recipe_is_refused(fake, args):
    fake(HERE)
    Path("recipe.yaml").write_text("lr: 1")
    go(some(args=args))
    assert go(some(args=args)) == {"run0": CURVE}
    Path("recipe.yaml").write_text("lr: 2")
    with pytest.raises(Refused, match=r"choose another --out, or delete it"):
        go(some(args=args))
    assert len(pids()) == 1


def test_recipe_counts_as_it_was_at_the_start(fake):
    fake("open('recipe.yaml', 'w').write('lr: 2')")
    Path("recipe.yaml").write_text("lr: 1")
    go(some(args=["--config=recipe.yaml"]))
    with pytest.raises(Refused, match="other settings"):
        go(some(args=["--config=recipe.yaml"]))


def test_other_metrics_are_refused(fake):
    fake(HERE)
    go(some())
    with pytest.raises(Refused, match="other settings"):
        execute(some(), Path("out"), ["val/loss", "val/acc"], 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"args": 5, "recipes": {}}'])
def test_damaged_result_of_a_run_is_named(fake, content):
    fake(HERE)
    go(some())
    result = Path("out/run0/result.json")
    result.write_text(content)
    with pytest.raises(Refused, match=r"out/run0/result\.json is damaged .*: delete it"):
        go(some())
    with pytest.raises(Refused, match="delete it"):
        execution.run_commits(Path("out"))
    result.unlink()
    assert go(some()) == {"run0": CURVE}


def test_one_command_at_a_time(fake):
    fake(HERE)
    with (
        execution._exclusive(Path("out")),
        pytest.raises(Refused, match="another command works in out"),
    ):
        go(some())
    assert go(some()) == {"run0": CURVE}


def test_result_says_how_it_was_made(fake):
    fake(HERE)
    go(some(args=["--a=1"]))
    saved = json.loads(Path("out/run0", execution.FINISHED).read_text())
    assert saved["args"] == ["--a=1"]
    assert saved["commit"] == results.commit()
    assert saved["machine"]["torch"]
    assert saved["seconds"] > 0


def test_remaining_time_is_estimated_after_each_run(fake, capfd):
    fake(HERE)
    go(some(3))
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "out: 3 to train, 1 at a time"
    assert re.fullmatch(r"\[1/3\] run0: val/loss 1.5; about \d+ s left", lines[1])
    assert lines[3] == "[3/3] run2: val/loss 1.5"


# Nothing is left behind.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", [1, 2])
def test_signal_ends_all_processes(number, jobs, fake):
    all_here = f"[time.sleep(0.01) for _ in iter(lambda: len(list(open('pid'))) < {jobs}, False)]; "
    fake(HERE + all_here + f"os.kill(os.getppid(), {int(number)}); time.sleep(60)")
    handler = signal.getsignal(number)
    start = time.monotonic()
    with pytest.raises(Stopped, match=number.name) as stop:
        go(some(4), jobs)
    assert stop.value.status == 128 + number
    assert time.monotonic() - start < 20
    assert signal.getsignal(number) is handler
    assert len(pids()) == jobs
    started = sorted(path.name for path in Path("out").glob("run*"))
    assert started == [f"run{i}" for i in range(jobs)]  # none was started later
    for pid in pids():
        assert_gone(pid)


def test_process_that_does_not_end_is_killed(fake, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    fake(HERE + deaf + "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    with pytest.raises(Stopped):
        go(some())
    assert_gone(*pids())


def test_second_signal_kills_at_once(fake):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    twice = "os.kill(os.getppid(), signal.SIGINT); time.sleep(0.3); " * 2
    fake(HERE + deaf + twice + "time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(Stopped):
        go(some())
    assert time.monotonic() - start < runner.GRACE
    assert_gone(*pids())


def test_process_that_ends_by_itself_after_ctrl_c_is_no_failure(fake, capfd):
    # As in a terminal, where Ctrl-C reaches both.
    fake(HERE + "os.kill(os.getppid(), signal.SIGINT); sys.exit(130)")
    with pytest.raises(Stopped):
        go(some())
    assert capfd.readouterr() == ("out: 1 to train, 1 at a time\n", "")


def test_signal_during_the_last_outcome_counts(fake, monkeypatch):
    fake(HERE)

    def read(logs, metrics):
        signal.raise_signal(signal.SIGTERM)
        return {"val/loss": CURVE}

    monkeypatch.setattr(execution, "read_curves", read)
    with pytest.raises(Stopped):
        go(some())
    assert go(some()) == {"run0": CURVE}  # it was finished all the same


def test_ignored_signal_stays_ignored(fake):
    fake(HERE + "os.kill(os.getppid(), signal.SIGINT)")
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert go(some()) == {"run0": CURVE}
    finally:
        signal.signal(signal.SIGINT, previous)


def test_error_ends_the_other_processes(fake, monkeypatch):
    code = HERE + "time.sleep(0 if len(open('pid').readlines()) == 2 else 60)"
    fake(code)

    def read(logs, metrics):
        raise Refused("no metric")

    monkeypatch.setattr(execution, "read_curves", read)
    with pytest.raises(Refused, match="no metric"):
        go(some(3), jobs=2)
    assert len(pids()) == 2
    for pid in pids():
        assert_gone(pid)


def test_infinity_becomes_none_in_json():
    found = execution.finite_or_none([(0, 1.5), (1, INF), (2, math.nan), (3, -INF)])
    assert found == [(0, 1.5), (1, None), (2, None), (3, None)]
    json.dumps(found, allow_nan=False)

"""Runs in processes of their own: none is trained twice, mixed up, or left behind."""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_fanions.cli import runner
from lit_fanions.cli.console import Refused
from lit_fanions.cli.runner import Run, Stopped, execute, finite, mean_curve, read_curves, spread

INF, NAN = math.inf, math.nan
CURVE = [(0, 2.0), (4, 1.5)]

# What the process that stands for a training does: it says who it is, then something more.
HERE = "import os, signal, sys, time; open('pid', 'a').write(f'{os.getpid()}\\n'); "


@pytest.fixture
def fake(hears_signals, monkeypatch, tmp_path):
    """Replace the training by Python code, and reading its logs by a constant."""

    def replace(code):
        monkeypatch.setattr(runner, "_command", lambda run, folder: [sys.executable, "-c", code])
        monkeypatch.setattr(runner, "read_curves", lambda logs, metrics: {"val/loss": CURVE})

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
    monkeypatch.setattr(runner, "read_curves", lambda logs, metrics: {"val/loss": diverged})
    assert go(some()) == go(some()) == {"run0": diverged}
    assert len(pids()) == 1


def test_failed_run_has_no_curve_and_says_why(fake, capfd):
    fake(HERE + "print('error: bad lr\\n  all options: --help'); sys.exit(2)")
    assert go(some()) == {}
    printed = capfd.readouterr()
    assert printed.err == "run0: exit status 2: error: bad lr\n"
    assert printed.out == "[1/1] run0: failed\n"
    assert not Path("out/run0", runner.FINISHED).exists()


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
    assert "finished before: 1\n" in capfd.readouterr().out


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


def test_one_command_at_a_time(fake):
    fake(HERE)
    with runner._alone(Path("out")), pytest.raises(Refused, match="another command works in out"):
        go(some())
    assert go(some()) == {"run0": CURVE}


def test_result_says_how_it_was_made(fake):
    fake(HERE)
    go(some(args=["--a=1"]))
    saved = json.loads(Path("out/run0", runner.FINISHED).read_text())
    assert saved["args"] == ["--a=1"]
    assert saved["commit"] == runner.commit()
    assert saved["machine"]["torch"]
    assert saved["seconds"] > 0


def test_no_commit_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    assert runner.commit.__wrapped__() is None


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
    assert capfd.readouterr() == ("", "")


def test_signal_during_the_last_outcome_counts(fake, monkeypatch):
    fake(HERE)

    def read(logs, metrics):
        signal.raise_signal(signal.SIGTERM)
        return {"val/loss": CURVE}

    monkeypatch.setattr(runner, "read_curves", read)
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

    monkeypatch.setattr(runner, "read_curves", read)
    with pytest.raises(Refused, match="no metric"):
        go(some(3), jobs=2)
    assert len(pids()) == 2
    for pid in pids():
        assert_gone(pid)


def test_likely_scalar_is_named(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for tag in ("val/acc", "epoch", "momentum_nuclear/group/matrix"):
            writer.add_scalar(tag, 1.0, 0)
    with pytest.raises(Refused, match=r"has no val/accc: did you mean val/acc\?"):
        runner.read_curves(tmp_path, ["val/accc"])
    with pytest.raises(Refused, match=r"has no x: logged are epoch, val/acc$"):
        runner.read_curves(tmp_path, ["x"])


# Options that a command sets itself.


RESERVED = {"--model.optimizer.matrix.lr": "use --factors", "--trainer.logger": "they are in --out"}


@pytest.mark.parametrize(
    "arg",
    [
        "--model.optimizer.matrix.lr",
        "--model.init_args.optimizer.matrix.lr=0.1",
        "--trainer.logger=false",
        "--trainer.logger.init_args.name=x",
        "--trainer.logger+=CSVLogger",
    ],
)
def test_reserved_options_are_refused(arg):
    with pytest.raises(Refused, match=r"^--\S+[a-z] is set for every run by this command: "):
        runner.refuse(["--trainer.max_steps", "3", arg, "1"], RESERVED)


def test_other_options_are_not():
    args = ["--model.optimizer.matrix.lr_min=1", "--trainer.logger_x", "--model.optimizer.other.lr"]
    runner.refuse(args, RESERVED)


# Curves.


def test_what_was_meant_for_the_command_is_refused():
    parser = argparse.ArgumentParser()
    for option in ("--config", "--seeds", "--jobs", "--metric", "--out", "--set", "--tune"):
        parser.add_argument(option)
    typos = {"--seed": "--seeds", "--job=2": "--jobs", "--metrics": "--metric"}
    for given, meant in typos.items():
        with pytest.raises(Refused, match=f"unknown option --.*: did you mean {meant}\\?"):
            runner.refuse_mistyped(["--trainer.max_steps=2", given, "2"], parser)
    fit = "config print_config seed_everything trainer model data test_after_fit ckpt_path"
    names = [*fit.split(), "weights_only", "data.seed", "model.metric", "trainer.logger"]
    runner.refuse_mistyped([f"--{name}" for name in names], parser)


def test_curve_is_read_from_the_logs(tmp_path):
    values = {0: 2.5, 3: NAN, 7: INF, 9: -INF, 12: 0.5}
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in values.items():
            writer.add_scalar("val/loss", value, step)
            writer.add_scalar("train/loss", -1.0, step)
    curves = read_curves(tmp_path, ["train/loss", "val/loss"])
    assert list(curves) == ["train/loss", "val/loss"]
    assert curves["val/loss"] == [(0, 2.5), (3, INF), (7, INF), (9, INF), (12, 0.5)]
    with pytest.raises(Refused, match=r"has no val/acc"):
        read_curves(tmp_path, ["val/loss", "val/acc"])


def test_finite_is_valid_json():
    found = finite([(0, 1.5), (1, INF), (2, NAN), (3, -INF)])
    assert found == [(0, 1.5), (1, None), (2, None), (3, None)]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ([3.0], 3.0, 0.0),
        ([1.0, 3.0], 2.0, 2**0.5),
        ([1.0, 2.0, 3.0], 2.0, 1.0),
        ([1.0, INF], INF, 0.0),
        ([INF, INF], INF, 0.0),
        ([1.0, NAN], NAN, 0.0),
    ],
)
def test_spread(values, mean, deviation):
    assert spread(values) == pytest.approx((mean, deviation), nan_ok=True)


def test_mean_curve_has_the_steps_that_all_have():
    curves = [[(0, 1.0), (2, 4.0), (4, 5.0)], [(0, 3.0), (1, 9.0), (4, INF)]]
    assert mean_curve(curves) == ([0, 4], [2.0, INF], [2**0.5, 0.0])
    assert mean_curve(curves[:1]) == ([0, 2, 4], [1.0, 4.0, 5.0], [0.0, 0.0, 0.0])
    assert mean_curve([[(0, 1.0)], [(1, 1.0)]]) == ([], [], [])

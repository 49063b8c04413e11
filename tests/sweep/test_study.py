"""A sweep trains each request once, also when it is interrupted, killed or shared."""

import os
import re
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from lit_fanions.cli import curves, runner
from lit_fanions.cli.console import Refused
from lit_fanions.sweep import result, storage, study
from lit_fanions.sweep.plan import Choice, grid_requests
from lit_fanions.sweep.study import Sweep
from tests.sweep.fakes import (
    PLAN,
    SIMPLE,
    assert_gone,
    go,
    in_another_process,
    points,
    read,
    search,
    trained,
    wait_for,
)

# Finished trainings are not repeated.


def test_every_setting_is_trained_with_every_seed_once(fake):
    expected = {(1, 0): 1.0, (2, 0): 2.0, (1, 1): 1.01, (2, 1): 2.01}
    assert go(seeds=2) == expected
    assert go(seeds=2) == expected
    assert points() == sorted(expected)


def test_new_values_and_seeds_alone_are_trained(fake):
    go()
    assert len(go(seeds=2, space={"x": Choice(("3", "1.0", "2"))})) == 6  # 1.0 is 1
    assert Counter(points()) == Counter((x, seed) for x in (1, 2, 3) for seed in (0, 1))
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}


def test_all_settings_are_trained_with_one_seed_before_the_next(fake):
    go(seeds=2, jobs=1)
    assert [(x, seed) for x, seed, *_ in trained()] == [(1, 0), (2, 0), (1, 1), (2, 1)]


# Failures.


def test_failure_is_repeated_with_retry_failed_alone(fake, capfd):
    fake("log(x) if x == 1 else sys.exit('error: bad x')")
    assert go() == {(1, 0): 1.0, (2, 0): None}
    assert "001-x=2-seed0: failed: exit status 1: error: bad x" in capfd.readouterr().out
    assert go() == {(1, 0): 1.0, (2, 0): None}
    assert len(trained()) == 2
    fake()
    assert go(retry_failed=True) == {(1, 0): 1.0, (2, 0): 2.0}
    assert points() == [(1, 0), (2, 0), (2, 0)]


def test_killed_training_is_repeated_by_the_next_call(fake, capfd):
    fake("os.kill(os.getpid(), signal.SIGKILL) if x == 2 else log(x)")
    assert go() == {(1, 0): 1.0, (2, 0): None}
    assert "failed: killed by SIGKILL" in capfd.readouterr().out
    fake()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert points() == [(1, 0), (2, 0), (2, 0)]


def test_missing_metric_ends_the_sweep_and_keeps_its_training(fake, monkeypatch):
    fake(f"{SIMPLE}; time.sleep(0 if x == 1 else 60)")

    def read_curves(logs, metrics):
        if metrics == ["typo"]:
            raise Refused("no metric")
        return {metrics[0]: read(logs)}

    monkeypatch.setattr(curves, "read_curves", read_curves)
    with pytest.raises(Refused, match="no metric"):
        go(seeds=2, metric="typo", direction="maximize")
    assert len(trained()) <= 2
    assert_gone(pid for _, _, pid, *_ in trained())
    # A second mistyped name is refused without a training.
    before = len(trained())
    with pytest.raises(Refused, match="no metric"):
        go(jobs=1, metric="typo", direction="maximize")
    assert len(trained()) == before
    # The name is free for a corrected command, as there are no results; then it is not.
    fake()
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert sum(x == 1 and seed == 0 for x, seed, *_ in trained()) == 1
    with pytest.raises(Refused, match="another metric"):
        go(metric="typo")


def test_half_a_note_about_a_missing_metric_repeats_its_training(fake, monkeypatch):
    fake()

    def read_curves(logs, metrics):
        raise Refused("no metric")

    monkeypatch.setattr(curves, "read_curves", read_curves)
    for times in (1, 2):
        with pytest.raises(Refused, match="no metric"):
            go(jobs=1, metric="typo", direction="maximize")
        assert len(trained()) == times
        (note,) = Path().rglob(study.UNREAD)
        note.write_text(note.read_text()[:-1])


# Interruptions.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_all_trainings_and_the_next_call_continues(number, fake):
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


def test_sweep_killed_before_a_training_began_is_resumed(fake, monkeypatch):
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


def test_killed_process_is_replaced_by_one_that_still_works(fake):
    fake(f"time.sleep(60 if len(trained()) == 1 else 0.5); {SIMPLE}")
    killed = in_another_process(lambda: go(jobs=1))
    wait_for(lambda: len(trained()) == 1)
    other = in_another_process(lambda: go(jobs=1))
    wait_for(lambda: len(trained()) == 2)
    killed.kill()
    killed.join()
    other.join(30)
    assert other.exitcode == 0
    assert points() == [(1, 0), (1, 0), (2, 0)]
    os.kill(trained()[0][2], signal.SIGKILL)  # the real child process sees that its parent ended


def test_interrupted_training_is_taken_over_by_another_process(fake):
    fake(f"time.sleep(60 if len(trained()) == 1 else 0.5); {SIMPLE}")
    interrupted = in_another_process(lambda: go(jobs=1))
    wait_for(lambda: len(trained()) == 1)
    other = in_another_process(lambda: go(jobs=1))
    wait_for(lambda: len(trained()) == 2)
    os.kill(interrupted.pid, signal.SIGINT)
    interrupted.join(30)
    other.join(30)
    assert (interrupted.exitcode, other.exitcode) == (1, 0)
    assert points() == [(1, 0), (1, 0), (2, 0)]
    assert go() == {(1, 0): 1.0, (2, 0): 2.0}
    assert len(trained()) == 3


def test_two_commands_share_the_work(fake):
    fake(f"time.sleep(0.05); {SIMPLE}")
    space = {"x": Choice(tuple(map(str, range(8))))}
    other = in_another_process(lambda: go(space=space))
    assert len(go(space=space)) == 8
    other.join()
    assert other.exitcode == 0
    assert points() == [(x, 0) for x in range(8)]


# Searches.


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


def test_repeated_proposal_is_not_trained_again(fake):
    sweep, requests = search(6, space={"x": Choice(("0.25", "0.5"))})
    assert len(trained()) == len({x for x, *_ in trained()}) == 2
    (table,) = result.summarize(sweep, requests)[0].tables
    assert [row[-1] for row in table.rows] == [1, 1]


def test_processes_that_search_together_propose_different_settings(fake):
    search(3)
    with storage.register_worker(Path("other/workers")):
        search(3, out=Path("other"))
    assert len({x for x, *_ in trained()}) == 6
    search(3, out=Path("third"))
    assert [x for x, *_ in trained()[6:]] == [x for x, *_ in trained()[:3]]


def test_failed_setting_of_a_search_is_repeated(fake):
    fake("sys.exit(1)")
    search(2)
    fake()
    search(2, retry_failed=True)
    xs = [x for x, *_ in trained()]
    assert xs[:2] == xs[2:]


# Progress.


def test_work_is_announced_and_the_remaining_time_estimated(fake, capfd):
    go(jobs=1)
    go(seeds=2, jobs=1)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "2 trainings in out/runs: 2 to train, 1 at a time on this machine"
    assert re.fullmatch(r"\[1/2\] 000-x=1-seed0: val/loss 1; about \d+ s left", lines[1])
    assert lines[2] == "[2/2] 001-x=2-seed0: val/loss 2"
    assert lines[3].endswith("2 to train, 1 at a time on this machine; finished before: 2")
    assert lines[4].startswith("[3/4] 002-x=1-seed1: val/loss 1.01; about ")


def test_work_on_gpus_is_announced(fake, capfd):
    go(devices=("0", "3"))
    assert ": 2 to train, 2 at a time on GPU 0, 3\n" in capfd.readouterr().out

"""Child processes that stand for trainings, and a plan for them."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from lit_fanions.cli import runner
from lit_fanions.sweep import result
from lit_fanions.sweep.plan import Choice, Plan, Range, Request, grid_requests
from lit_fanions.sweep.study import Sweep

# The code of a child process: it writes down what it trains, then `log` adds to its curve.
TRAINING = """
import json, os, pathlib, signal, sys, time
folder, args = pathlib.Path(sys.argv[1]), dict(a[2:].split("=") for a in sys.argv[2:] if "=" in a)
x, seed = float(args.get("x", 0)), int(args["seed_everything"])
environment = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
def trained():
    return open("trained").readlines()
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
    """Train a grid; return values by settings and seed, None for failures."""
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
    """Return what was trained, in the order in which the processes began."""
    path = Path("trained")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def points():
    return sorted((x, seed) for x, seed, *_ in trained())


def assert_gone(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def in_another_process(target):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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

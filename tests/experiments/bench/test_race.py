"""Competitors take turns, and the search for the cheapest setting keeps to its budget."""

import importlib
import itertools
import statistics
import time

import pytest
import torch

from experiments.bench import polar, race, report, topk
from lit_fanions.cli import console


@pytest.mark.parametrize("name", ["topk_outcome", "polar_outcome", "step_outcome"])
def test_races_report_their_conditions(name, request):
    found = request.getfixturevalue(name)
    repeats = 3 if name == "topk_outcome" else 2
    assert found.result["repeats"] == repeats
    assert found.result["dtype"] == "float32"
    assert found.result["device"] == "cpu"
    assert found.result["machine"]["processor"] == console.processor()
    assert f"in turns, median of {repeats}" in found.printed
    multiplied = ", ".join(
        f"in {dtype} by {what}" for what, dtype in found.result["products"].items()
    )
    assert f"float32 matrices, multiplied {multiplied}\n" in found.printed
    assert report.machine_line(torch.device("cpu")) in found.printed
    assert all(
        len(entry["seconds"]) == repeats
        and entry["median_seconds"] == statistics.median(entry["seconds"])
        for entry in found.result["results"]
        if entry.get("reached", True)
    )
    assert found.plot.startswith(b"\x89PNG")


@pytest.mark.parametrize("has_bf16", [False, True])
def test_races_report_the_dtype_of_products(has_bf16, monkeypatch):
    module = importlib.import_module("lit_fanions.lmo.newton_schulz")
    monkeypatch.setattr(module, "_has_bf16", lambda device_type: has_bf16)
    cpu = torch.device("cpu")
    assert polar.products(cpu)[polar.TORCH] == "bfloat16"  # whatever the hardware
    assert polar.products(cpu)["our Newton-Schulz"].startswith("bfloat16") == has_bf16
    rank_k = topk._products(cpu, ["gaussian"])
    assert ("bfloat16" in rank_k.values()) == has_bf16
    assert rank_k["the solvers of rank k"] == "float32"
    assert topk._products(cpu, ["momentum"])[polar.TORCH] == "bfloat16"


def test_competitors_take_turns():
    turns, rounds, watched = [], [], []
    competitors = {n: lambda turn, n=n: turns.append((turn, n)) or f"{n}{turn}" for n in "abc"}
    seconds = race.take_turns(
        competitors,
        repeats=4,
        device=torch.device("cpu"),
        before=rounds.append,
        watch=lambda name, result: watched.append((name, result)),
    )
    assert rounds == [0, 0, 1, 2, 3]
    assert [turn for turn, _ in turns] == [r for r in rounds for _ in range(3)]
    orders = [tuple(n for _, n in turns[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1
    assert watched == [(n, f"{n}{turn}") for turn, n in turns]
    assert list(seconds) == ["a", "b", "c"]
    assert all(len(taken) == 4 for taken in seconds.values())


def test_slow_competitors_are_not_run_again(monkeypatch):
    seconds = {"fast": iter((9.0, 1.0, 2.0)), "slow": iter((11.0, 1.0, 2.0))}
    calls = []

    def timed(turn, device):
        name = turn()
        calls.append(name)
        return next(seconds[name]), name

    monkeypatch.setattr(race, "timed", timed)
    taken = race.take_turns(
        {name: lambda turn, name=name: name for name in seconds},
        repeats=2,
        device=torch.device("cpu"),
        longest=10.0,
    )
    assert taken == {"fast": [1.0, 2.0], "slow": [11.0]}
    assert (calls.count("fast"), calls.count("slow")) == (3, 1)


def test_first_round_only_warms_up():
    calls = itertools.count()
    seconds = race.take_turns(
        {"a": lambda turn: next(calls) or time.sleep(0.05)},
        repeats=2,
        device=torch.device("cpu"),
    )
    assert max(seconds["a"]) < 0.05


def test_time_is_measured():
    seconds, result = race.timed(lambda: time.sleep(0.05) or 7, torch.device("cpu"))
    assert result == 7
    assert 0.05 <= seconds < 1


def levels(*errors):
    """Levels whose error depends on the seed, and what was tried."""
    tried = []

    def level(i):
        return race.Level(f"level {i}", lambda seed: tried.append((i, seed)) or errors[i][seed])

    return [level(i) for i in range(len(errors))], tried


def test_cheapest_level_holds_on_every_seed():
    options = {"goal": 0.1, "seeds": 3, "budget": 60.0, "device": torch.device("cpu")}
    some, tried = levels([0.2, 0, 0], [0.05, 0.05, 0.3], [0.02, 0.1, 0.01], [0, 0, 0])
    trial = race.cheapest(some, lambda error: error, **options)
    assert (trial.level.setting, trial.error, trial.reached) == ("level 2", 0.1, True)
    assert tried == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]

    some, _ = levels([0.5, 0.5, 0.5], [0.2, 0.2, 0.2], [0.4, 0.4, 0.4])
    trial = race.cheapest(some, lambda error: error, **options)
    assert (trial.level.setting, trial.error, trial.reached) == ("level 1", 0.2, False)


def test_ordered_levels_are_bisected():
    options = {"goal": 0.1, "seeds": 2, "budget": 60.0, "device": torch.device("cpu")}
    some, tried = levels(*[[1.0, 1.0]] * 5, [0.1, 0.2], *[[0.1, 0.1]] * 4)
    trial = race.cheapest(some, lambda error: error, ordered=True, **options)
    assert (trial.level.setting, trial.reached, trial.seeds) == ("level 6", True, 2)
    # The middle first; level 5 holds on the first seed alone, level 6 was tried on that before.
    assert tried == [(4, 0), (7, 0), (5, 0), (5, 1), (6, 0), (6, 1)]

    some, tried = levels(*[[1.0, 1.0]] * 10)
    assert not race.cheapest(some, lambda error: error, ordered=True, **options).reached
    assert len(tried) == 4


def test_costly_levels_are_not_started(monkeypatch):
    some, tried = levels(*[[1.0]] * 6)

    def timed(turn, device):
        error = turn()
        return 4.0 ** tried[-1][0], error

    monkeypatch.setattr(race, "timed", timed)
    some = [level._replace(cost=4.0**i) for i, level in enumerate(some)]
    options = {"goal": 0.1, "seeds": 2, "budget": 100.0, "device": torch.device("cpu")}
    assert not race.cheapest(some, lambda error: error, ordered=True, **options).reached
    # From below: 1 s, 16 s; level 4 would take 256 s, level 3 takes 64 s.
    assert tried == [(0, 0), (2, 0), (3, 0)]


def test_cheapest_level_keeps_to_the_budget():
    def solve(seed):
        time.sleep(0.02)
        return 1.0

    some = [race.Level(str(i), solve) for i in range(100)]
    start = time.perf_counter()
    trial = race.cheapest(
        some, lambda e: e, goal=0.1, seeds=3, budget=0.1, device=torch.device("cpu")
    )
    assert not trial.reached
    assert trial.seconds >= 0.02
    assert time.perf_counter() - start < 1


def test_trial_solves_from_tried_seeds_only(monkeypatch):
    monkeypatch.setattr(race, "timed", lambda turn, device: (1.0, turn()))  # a second each
    # A goal that holds on the first three seeds alone.
    (some,), tried = levels([0.05, 0.05, 0.05, 0.3, 0.3, 0.3, 0.3])
    trial = race.cheapest(
        [some], lambda e: e, goal=0.1, seeds=5, budget=3.5, device=torch.device("cpu")
    )
    assert (trial.reached, trial.seeds, trial.error) == (True, 3, 0.05)
    assert max(trial.turn(turn) for turn in range(7)) == 0.05
    assert {seed for _, seed in tried} == {0, 1, 2}

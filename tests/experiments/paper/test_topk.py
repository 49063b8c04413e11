"""Table 2: verdicts of races on the paper's claims."""

import csv
import json
from types import SimpleNamespace

import pytest

from experiments.bench import race
from experiments.bench import topk as bench
from experiments.paper.__main__ import main
from experiments.paper.statements import STATEMENTS
from experiments.paper.topk import claims, measure

pytest.importorskip("scipy")


def test_quick_run_saves_everything(tmp_path, capfd):
    args = ["topk", "--quick", "--repeats", "1", "--k", "1", "3", "--device", "cpu"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "Table 2 of the paper: error at most 0.01" in printed
    pca = next(line for line in printed.splitlines() if line.startswith("1  torch pca_lowrank"))
    assert pca.split()[-2:] == ["1.15", "6.389"]  # the paper's seconds and ratio
    saved = json.loads((tmp_path / "topk.json").read_text())
    assert saved["claims"] == []  # a quick run proves nothing
    assert saved["settings"]["seeds"] == [0, 1, 2]
    with (tmp_path / "topk.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["k"], row["solver"]) for row in rows} == {
        (k, solver) for k in "13" for solver in measure.SOLVERS if solver != bench.CUPY
    }
    chosen = {(e["k"], e["solver"]): e for e in saved["settings"]["solvers"]}
    for row in rows:
        if row["setting"] == chosen[int(row["k"]), row["solver"]]["setting"]:
            assert float(row["error"]) <= 0.01
    sizes = {(d["size"], d["direction"]) for d in saved["settings"]["directions"]}
    assert sizes == {
        (size, name) for size in (32, 64, 96) for name in ("rank 1", "rank 3", "Newton-Schulz 5")
    }
    assert (tmp_path / "topk.png").read_bytes().startswith(b"\x89PNG")


def entry(solver, seconds, *, k=1, reached=True, tried=()):
    return {
        "k": k,
        "solver": solver,
        "setting": "s",
        "reached": reached,
        "seconds": list(seconds),
        "tried": [
            {"setting": setting, "seed": 0, "seconds": t, "error": error, "sigma_error": sigma}
            for setting, t, error, sigma in tried
        ],
    }


@pytest.mark.parametrize(
    ("lanczos", "rival", "reached", "verdict"),
    [
        ([1.0, 1.2], [2.5, 3.0], True, "confirmed"),
        ([1.0, 1.4], [2.5, 3.0], True, "not testable here"),  # one turn says otherwise
        ([1.0, 1.2], [1.3, 1.9], True, "refuted"),  # faster, not much
        ([1.0, 1.2], [0.5], True, "refuted"),
        ([1.0, 1.2], [9.0], False, "confirmed"),  # 5 s do not suffice
        ([3.0, 3.0], [9.0], False, "not testable here"),
    ],
)
def test_much_faster_holds_for_every_turn(lanczos, rival, reached, verdict):
    entries = [
        entry(bench.LANCZOS, lanczos),
        entry(bench.PCA, rival, reached=reached, tried=[("s", 5.0, 0.5, 0.1)]),
        entry(bench.POWER, [9.0, 9.0]),
    ]
    claim = claims.judge_race(entries, "data")
    assert claim.verdict == verdict
    assert ("torch pca_lowrank > 5 s" in claim.found) == (not reached)
    assert claim.n == 2


@pytest.mark.parametrize(("reached", "verdict"), [(True, "refuted"), (False, "not testable here")])
def test_lanczos_that_does_not_reach_the_error_is_not_faster(reached, verdict):
    entries = [
        entry(bench.LANCZOS, [1.0], reached=False),
        entry(bench.PCA, [2.0], reached=reached, tried=[("s", 2.0, 0.5, 0.1)]),
    ]
    claim = claims.judge_race(entries, "data")
    assert claim.verdict == verdict
    assert "Lanczos not in time" in claim.found


def solved(monkeypatch, errors):
    """Replace solvers: the errors of a setting by (solver, setting), one a seed from 2 on."""
    solvers = {
        name: bench.Solver(
            [
                race.Level(setting, lambda seed, values=values: values[seed - 2])
                for (solver, setting), values in errors.items()
                if solver == name
            ]
        )
        for name, _ in errors
    }
    monkeypatch.setattr(bench, "solvers", lambda case, k: solvers)
    chosen = {name: lambda x, exact, k, i=i: x[i] for i, name in enumerate(measure.ERRORS)}
    monkeypatch.setattr(measure, "ERRORS", chosen)


@pytest.mark.parametrize(
    ("matrix", "sigma", "verdict"),
    [
        ([0.5, 0.4], [1e-6, 1e-5], "confirmed"),
        ([0.5, 0.4], [1e-2, 1e-2], "refuted"),
        ([1e-4, 1e-4], [1e-6, 1e-6], "refuted"),
        ([0.5, 0.4], [1e-6, 1.5e-4], "not testable here"),  # among Lanczos's
    ],
)
def test_errors_are_compared_at_equal_time(matrix, sigma, verdict, monkeypatch):
    entries = [
        entry(bench.LANCZOS, [1.0], tried=[("s", 1.0, 0.009, 1e-4), ("other", 9.0, 1.0, 1.0)]),
        # "m" has the better matrix, "s" the better singular values; "t" takes too long.
        entry(
            bench.PCA,
            [2.0],
            tried=[("m", 0.9, 0.1, 0.9), ("s", 0.9, 0.9, 0.1), ("t", 1.1, 1e-9, 1e-9)],
        ),
    ]
    errors = {
        (bench.LANCZOS, "s"): [(0.008, 1e-4), (0.009, 2e-4)],
        (bench.PCA, "m"): [(value, 7.0) for value in matrix],
        (bench.PCA, "s"): [(7.0, value) for value in sigma],
    }
    solved(monkeypatch, errors)
    equal = measure.errors_at_equal_time(None, None, 1, entries, SimpleNamespace(seeds=2))
    assert (equal["n"], equal["seconds"]) == (2, 1.0)
    assert equal["lanczos"] == {"error": (0.008, 0.009), "sigma_error": (1e-4, 2e-4)}
    assert equal["rsvd"]["error"] == (min(matrix), max(matrix))
    assert equal["rsvd"]["sigma_error"] == (min(sigma), max(sigma))
    assert claims.judge_errors([equal], "data").verdict == verdict


def test_no_rsvd_in_time_decides_nothing():
    slow = entry(bench.PCA, [2.0], tried=[("s", 1.1, 1e-9, 1e-9)])
    fast = entry(bench.PCA, [2.0], tried=[("s", 0.9, 1e-9, 1e-9)])
    lanczos = {"tried": [("s", 1.0, 0.009, 1e-4)]}
    for other, reached in ((slow, True), (fast, False)):
        entries = [entry(bench.LANCZOS, [1.0], reached=reached, **lanczos), other]
        found = measure.errors_at_equal_time(None, None, 1, entries, SimpleNamespace(seeds=2))
        assert found is None
    assert claims.judge_errors([], "data").verdict == "not testable here"


def test_crossover_is_where_lanczos_stays_faster():
    newton_schulz, rank = measure.NEWTON_SCHULZ, "rank 1"
    ratios = {32: 0.9, 64: 1.5, 96: 0.5, 128: 0.1}
    directions = [
        {"size": size, "direction": name, "seconds": [seconds] * 3, "ratio": seconds}
        for size, ratio in ratios.items()
        for name, seconds in ((rank, ratio), (newton_schulz, 1.0))
    ]
    claim = claims.judge_newton_schulz(directions, "data")
    assert (claim.verdict, claim.n) == ("confirmed", 3)
    assert claim.found == "rank 1: 0.1 of the time; faster from 96 rows on"
    for seconds, verdict in (([0.1, 0.9, 0.1], "not testable here"), ([0.6] * 3, "refuted")):
        directions[-2]["seconds"] = seconds
        assert claims.judge_newton_schulz(directions, "data").verdict == verdict
    assert claims.judge_newton_schulz(directions[1::2], "data").verdict == "not testable here"


def test_growth_is_fitted_to_the_largest_sizes():
    sizes = (10, 100, 200, 400)
    directions = [
        {"size": size, "direction": name, "seconds": [c * size**power for c in (1.0, 1.1, 1.2)]}
        for name, power in (("rank 1", 2.0), (measure.NEWTON_SCHULZ, 3.0))
        for size in sizes
    ]
    directions[0]["seconds"] = [1e9] * 3  # left out
    claim = claims.judge_growth(directions, "data")
    assert (claim.verdict, claim.n) == ("confirmed", 3)
    assert "+1.0000 ± 0.0000" in claim.found and claim.found.endswith("rank 1: 2.00")
    swapped = {"rank 1": measure.NEWTON_SCHULZ, measure.NEWTON_SCHULZ: "rank 1"}
    other = [{**d, "direction": swapped[d["direction"]]} for d in directions[1:]]
    assert claims.judge_growth(other, "data").verdict == "refuted"
    assert claims.judge_growth(directions[-1:], "data").verdict == "not testable here"


def test_every_claim_of_the_command_is_judged():
    entries = [entry(bench.LANCZOS, [1.0]), entry(bench.PCA, [3.0])]
    directions = [
        {"size": 8, "direction": name, "seconds": [1.0], "ratio": 1.0}
        for name in ("rank 1", measure.NEWTON_SCHULZ)
    ]
    judged = claims.judge_all(entries, [], directions, "data")
    assert {claim.id for claim in judged} == {s.id for s in STATEMENTS if s.command == "topk"}
    assert all("{" not in claim.rule for claim in judged)

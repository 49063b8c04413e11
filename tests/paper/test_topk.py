"""Table 2: what the races say about the paper's claims."""

import csv
import json

import pytest

from lit_fanions.bench import topk as bench
from lit_fanions.paper import topk
from lit_fanions.paper.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


def test_quick_run_leaves_everything(tmp_path, capfd):
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
        (k, solver) for k in "13" for solver in topk.SOLVERS if solver != bench.CUPY
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
        ([1.0, 1.2], [1.3, 2.0], True, "confirmed"),
        ([1.0, 1.4], [1.3, 2.0], True, "refuted"),  # within the spread
        ([1.0, 1.2], [5.0], False, "confirmed"),  # 5 s do not suffice
        ([6.0, 6.0], [5.0], False, "not testable here"),
    ],
)
def test_faster_allows_for_the_spread(lanczos, rival, reached, verdict):
    entries = [
        entry(bench.LANCZOS, lanczos),
        entry(bench.PCA, rival, reached=reached, tried=[("s", 5.0, 0.5, 0.1)]),
        entry(bench.POWER, [9.0, 9.0]),
    ]
    claim = topk._faster(entries, "data")
    assert claim.verdict == verdict
    assert ("torch pca_lowrank > 5 s" in claim.found) == (not reached)
    assert claim.n == 2


@pytest.mark.parametrize(("reached", "verdict"), [(True, "refuted"), (False, "not testable here")])
def test_lanczos_that_does_not_reach_the_error_is_not_faster(reached, verdict):
    entries = [
        entry(bench.LANCZOS, [1.0], reached=False),
        entry(bench.PCA, [2.0], reached=reached, tried=[("s", 2.0, 0.5, 0.1)]),
    ]
    claim = topk._faster(entries, "data")
    assert claim.verdict == verdict
    assert "Lanczos not in time" in claim.found


@pytest.mark.parametrize(
    ("sigma", "matrix", "verdict"),
    [
        (1e-6, 0.5, "confirmed"),
        (1e-2, 0.5, "refuted"),
        (1e-6, 1e-4, "refuted"),
        (1.5e-4, 0.5, "not testable here"),  # among Lanczos's
    ],
)
def test_errors_are_compared_at_equal_time(sigma, matrix, verdict):
    entries = [
        entry(
            bench.LANCZOS,
            [1.0],
            tried=[("s", 0.8, 0.008, 2e-4), ("s", 1.0, 0.009, 1e-4), ("other", 0.1, 1.0, 1.0)],
        ),
        # The second takes longer than Lanczos.
        entry(bench.PCA, [2.0], tried=[("s", 0.9, matrix, sigma), ("t", 1.1, 1e-9, 1e-9)]),
    ]
    (equal,) = topk._at_equal_time(entries)
    assert equal["lanczos"] == {"error": (0.008, 0.009), "sigma_error": (1e-4, 2e-4)}
    assert equal["rsvd"] == {"error": (matrix, matrix), "sigma_error": (sigma, sigma)}
    assert topk._better([equal], "data").verdict == verdict


def test_the_worst_seed_of_a_setting_counts():
    lucky = [("s", 0.5, 1e-6, 1e-6), ("s", 0.5, 0.5, 0.5)]
    entries = [
        entry(bench.LANCZOS, [1.0], tried=[("s", 1.0, 0.009, 1e-4)]),
        entry(bench.PCA, [2.0], tried=[*lucky, ("t", 0.5, 0.1, 0.1)]),
    ]
    (equal,) = topk._at_equal_time(entries)
    assert equal["rsvd"] == {"error": (0.1, 0.1), "sigma_error": (0.1, 0.1)}


def test_nothing_to_compare_at_equal_time():
    entries = [
        entry(bench.LANCZOS, [1.0], tried=[("s", 1.0, 0.009, 1e-4)]),
        entry(bench.PCA, [2.0], tried=[("s", 1.1, 1e-9, 1e-9)]),
    ]
    assert list(topk._at_equal_time(entries)) == []
    assert topk._better([], "data").verdict == "not testable here"


def test_crossover_is_where_lanczos_stays_faster():
    newton_schulz, rank = topk.NEWTON_SCHULZ, "rank 1"
    ratios = {32: 0.9, 64: 1.5, 96: 0.5, 128: 0.1}
    directions = [
        {"size": size, "direction": name, "seconds": [seconds] * 3, "ratio": seconds}
        for size, ratio in ratios.items()
        for name, seconds in ((rank, ratio), (newton_schulz, 1.0))
    ]
    claim = topk._beats_newton_schulz(directions, "data")
    assert (claim.verdict, claim.n) == ("confirmed", 3)
    assert claim.found == "rank 1: 0.1 of the time; faster from 96 rows on"
    directions[-2]["seconds"] = [0.1, 1.1, 0.1]
    assert topk._beats_newton_schulz(directions, "data").verdict == "refuted"
    assert topk._beats_newton_schulz(directions[1::2], "data").verdict == "not testable here"


def test_growth_is_fitted_to_the_largest_sizes():
    sizes = (10, 100, 200, 400)
    directions = [
        {"size": size, "direction": name, "seconds": [c * size**power for c in (1.0, 1.1, 1.2)]}
        for name, power in (("rank 1", 2.0), (topk.NEWTON_SCHULZ, 3.0))
        for size in sizes
    ]
    directions[0]["seconds"] = [1e9] * 3  # left out
    claim = topk._cheaper(directions, "data")
    assert (claim.verdict, claim.n) == ("confirmed", 3)
    assert "+1.0000 ± 0.0000" in claim.found and claim.found.endswith("rank 1: 2.00")
    swapped = {"rank 1": topk.NEWTON_SCHULZ, topk.NEWTON_SCHULZ: "rank 1"}
    other = [{**d, "direction": swapped[d["direction"]]} for d in directions[1:]]
    assert topk._cheaper(other, "data").verdict == "refuted"
    assert topk._cheaper(directions[-1:], "data").verdict == "not testable here"

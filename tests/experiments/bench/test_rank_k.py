"""Rank-k solvers are judged by the right errors and raced at settings that reach the goal."""

import argparse
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from experiments.bench import polar, race, rank_k, topk
from lit_fanions import lmo
from tests.experiments.bench.outcomes import outcome


def quick_cases(*args):
    parser = argparse.ArgumentParser()
    topk.add_arguments(parser)
    options = parser.parse_args(["--quick", "--device", "cpu", *args])
    return topk.cases(options, topk.CASES)


def dense_error(found, m, k):
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    difference = found.U.double() @ found.Vh.double() - u[:, :k] @ vh[:k]
    return float(torch.linalg.matrix_norm(difference)) / math.sqrt(k)


def test_raced_settings_reach_the_error(topk_outcome):
    goal = topk_outcome.result["goal"]
    assert goal == 0.01
    entries = topk_outcome.result["results"]
    assert {(e["case"], e["k"]) for e in entries} == {
        (case, k) for case in ("gaussian", "power_law") for k in (1, 4)
    }
    for case in quick_cases():
        for k in case.ranks:
            solvers = topk.solvers(case, k)
            raced = [e for e in entries if (e["case"], e["k"]) == (case.name, k) and e["reached"]]
            assert {topk.ARPACK, rank_k.FULL, rank_k.AUTO, "ours: exact"} <= {
                e["solver"] for e in raced
            }
            for entry in raced:
                (level,) = (
                    level
                    for level in solvers[entry["solver"]].levels
                    if level.setting == entry["setting"]
                )
                seeds = range(entry["seeds"])
                errors = [dense_error(level.solve(seed), case.matrix, k) for seed in seeds]
                assert len(seeds) == (5 if solvers[entry["solver"]].random else 1)
                assert entry["error"] <= goal
                assert entry["error"] == pytest.approx(max(errors), rel=0.05, abs=1e-5)


def test_race_uses_the_seeds_of_the_trial(tmp_path, monkeypatch):
    seeds = []

    def solvers(case, k):
        def solve(seed):
            seeds.append(seed)
            return lmo.top_singular(case.matrix, k, solver="exact")

        return {topk.ARPACK: rank_k.Solver([race.Level("some", solve)])}

    monkeypatch.setattr(rank_k, "solvers", solvers)
    args = ["topk", "--cases", "gaussian", "--k", "2", "--repeats", "12"]
    found = outcome(tmp_path, *args)
    assert seeds == [*range(5), 0, *(turn % 5 for turn in range(12))]
    assert found.rows("k  solver")[0][2] == "some"
    # A budget that ends after a single seed.
    seeds.clear()
    found = outcome(tmp_path, *args, "--budget", "1e-9")
    assert set(seeds) == {0}
    assert found.rows("k  solver")[0][2] == "some (seeds tried: 1 of 5)"


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_exact_triplets_of_a_large_matrix_are_those_of_the_svd(shape, monkeypatch):
    m = polar.gaussian(shape)
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    monkeypatch.setattr(rank_k, "_EXACT_SIZE", 8)  # a large matrix is larger than this
    found = topk.exact(m, 5)
    torch.testing.assert_close(found.S, s[:5], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.U @ found.Vh, u[:, :5] @ vh[:5], rtol=0, atol=1e-10)


def test_sigma_error_is_the_largest_in_any_order():
    exact = lmo.Triplets(torch.eye(3), torch.tensor([4.0, 2.0, 1.0]).double(), torch.eye(3))
    found = lmo.Triplets(torch.eye(2), torch.tensor([2.2, 4.0]), torch.eye(2))
    assert topk.sigma_error(found, exact, 2) == pytest.approx(0.1)
    broken = found._replace(S=torch.tensor([math.nan, 4.0]))
    assert topk.sigma_error(broken, exact, 2) == math.inf


def test_rank_k_error_is_that_of_the_matrices():
    m = polar.gaussian((30, 20))
    exact = lmo.Triplets(*torch.linalg.svd(m.double(), full_matrices=False))
    torch.manual_seed(3)
    # Far away, close, and with vectors that are not orthonormal.
    u, _, v = torch.svd_lowrank(m, q=3, niter=1)
    for found in (
        lmo.Triplets(u, torch.zeros(3), v.mT),
        lmo.Triplets(1.1 * u, torch.zeros(3), v.mT + 0.1),
        lmo.top_singular(m, 3, tol=1e-2),
    ):
        error = topk.rank_k_error(found, exact, 3)
        assert error == pytest.approx(dense_error(found, m, 3), rel=1e-6, abs=1e-7)
    assert topk.rank_k_error(exact._replace(U=exact.U[:, :3], Vh=exact.Vh[:3]), exact, 3) < 1e-7
    assert topk.rank_k_error(lmo.Triplets(u * math.nan, u, v.mT), exact, 3) == math.inf


@pytest.mark.parametrize(("size", "races"), [(3000, False), (900, True)])
def test_full_svd_of_a_large_matrix_stays_off_the_gpu(size, races, monkeypatch):
    monkeypatch.setattr(rank_k.gpu_peers, "available", lambda: False)
    case = rank_k.gaussian(16, [2], torch.device("cpu"))
    # Building the competitors only looks at shape and device.
    matrix = SimpleNamespace(shape=(size, size), device=torch.device("cuda"))
    competitors = rank_k.solvers(dataclasses.replace(case, matrix=matrix), 2)
    assert (rank_k.FULL in competitors) == races
    assert rank_k.ARPACK not in competitors

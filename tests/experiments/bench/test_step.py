"""Optimizer steps are timed on the same parameters, and their memory is measured."""

import itertools

import pytest
import torch

from experiments.bench import polar, step
from lit_fanions import lmo
from tests.experiments.bench.outcomes import refused


def test_step_table(step_outcome):
    result = step_outcome.result
    own = {e["optimizer"]: e for e in result["results"]}
    assert list(own) == [
        "torch.optim.Muon", "muon", "muon, fast", "f_muon", "s_muon", "neon",
        "fanion, rank 8", "fanion, rank 32", "dion, rank 32", "nsgd", "signum",
    ]  # fmt: skip
    for entry in own.values():
        median = entry["median_seconds"]
        for name, ratio in (("torch.optim.Muon", "ratio_to_torch"), ("muon", "ratio_to_muon")):
            assert entry[ratio] == pytest.approx(median / own[name]["median_seconds"])
        assert entry["peak_in_stacks"] == pytest.approx(entry["peak_bytes"] / result["stack_bytes"])
        # The Nesterov momentum alone is as large as the parameter.
        assert entry["peak_bytes"] >= 4 * 64 * 256
    rows = step_outcome.rows("optimizer")
    for entry, row in zip(own.values(), rows, strict=True):
        assert row[0] == entry["optimizer"]
        assert float(row[2]) == pytest.approx(entry["ratio_to_torch"], rel=1e-3)
        assert float(row[-1]) == pytest.approx(entry["peak_in_stacks"], rel=1e-3)
    assert "6 matrices, 0.0492 million entries" in step_outcome.printed


def test_quality_is_that_of_the_directions(step_outcome):
    judged = step_outcome.result["quality"]
    assert {tuple(e["shape"]) for e in judged} == {(64, 64), (64, 256), (256, 64)}
    for entry in judged:
        m = polar.spectra(tuple(entry["shape"]))[entry["spectrum"]]
        s = torch.linalg.svdvals(m.double()).sum()
        ours = float((m.double() * lmo.direction(m).double()).sum() / s)
        assert entry["muon"] == pytest.approx(ours, rel=1e-6)
        assert 0.7 < entry["torch.optim.Muon"] < entry["muon"]


def test_competitors_step_the_same_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(40, 40))]
    optimizers = step.optimizers(parameters)
    parameters[0].grad = torch.eye(40)
    for name, optimizer in optimizers.items():
        with torch.no_grad():
            parameters[0].zero_()
        optimizer.step()
        assert float(parameters[0].detach().norm()) > 0, name


def test_gradients_depend_on_round_and_parameter():
    parameters = [torch.nn.Parameter(torch.zeros(3, 3)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.empty_like(p)
    drawn = []
    for seed in (0, 1, 0):
        step.fill_gradients(parameters, seed)
        drawn += [p.grad.clone() for p in parameters]
    assert torch.equal(drawn[0], drawn[4])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn[:4], 2))


def test_largest_stack_is_bounded():
    parameters = [torch.nn.Parameter(torch.zeros(4, 8)) for _ in range(5)]
    parameters += [torch.nn.Parameter(torch.zeros(10, 10))]
    optimizer = torch.optim.SGD(parameters)
    for limit, entries in ((1, 100), (96, 100), (128, 128), (10**6, 160)):
        optimizer.param_groups[0]["stack_entries"] = limit
        assert step.largest_stack(parameters, optimizer) == 4 * entries


def test_peak_memory_of_known_allocations():
    kept = torch.zeros(500_000)

    def work():
        nonlocal kept
        a = torch.empty(1000, 1000)  # 4 MB
        b = torch.empty(500, 1000)  # 6 MB in all
        del a
        kept = torch.empty(0)  # frees 2 MB of what there was before
        return [b, torch.empty(250, 1000)]  # 1 MB

    assert step.peak_bytes(work, torch.device("cpu")) == 6_000_000
    assert step.peak_bytes(lambda: torch.empty(10), torch.device("cpu")) == 40
    x = torch.zeros(1000)
    assert step.peak_bytes(lambda: x.mul_(2), torch.device("cpu")) < 100


def test_peak_memory_counts_what_an_operation_needs_inside():
    m = torch.randn(64, 64)
    peak = step.peak_bytes(lambda: torch.linalg.svd(m), torch.device("cpu"))
    assert peak > 4 * (2 * 64 * 64 + 64)  # u, vh and s, and LAPACK's workspace


def test_zero_layers_are_refused(capfd):
    line = refused(capfd, "step", "--quick", "--layers", "0")
    assert "--layers: '0' is no whole number of at least 1" in line

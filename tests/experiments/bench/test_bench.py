"""The timings: that the two sides of a comparison do the same, and that reports are readable."""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import re
import statistics
import sys
import time

import pytest
import torch

from experiments.bench import (
    gpu_peers,
    monitor,
    overhead,
    polar,
    race,
    rank_k,
    recorded,
    step,
    topk,
)
from experiments.bench.__main__ import main
from lit_fanions import Fanion, lmo
from lit_fanions.cli import console

RECIPE = ["--config", "recipe.yaml", "--epochs", "2"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.gradient_clip_val=0.1"],
        ["--trainer.gradient_clip_val=0.1", "--trainer.gradient_clip_algorithm=value"],
        ["--trainer.accumulate_grad_batches=3"],
        ["--trainer.limit_train_batches=5"],
    ],
    ids=" ".join,
)
def test_fit_and_bare_loop_take_the_same_steps(options, project, capfd):
    assert main(["overhead", *RECIPE, *options, "--json", "out.json"]) == 0
    printed = capfd.readouterr().out
    assert "weights after the same steps: equal" in printed
    assert "2 paired epochs of" in printed
    result = json.loads((project / "out.json").read_text())
    assert len(result["fit_seconds"]) == len(result["bare_seconds"]) == 2
    assert all(s > 0 for epoch in result["fit_seconds"] + result["bare_seconds"] for s in epoch)
    assert result["machine"]["torch"] == torch.__version__


def test_overhead_leaves_no_logs(project, capfd):
    main(["overhead", *RECIPE])
    assert not (project / "lightning_logs").exists()


def test_overhead_repeats(project, capfd):
    main(["overhead", *RECIPE, "--repeats", "2"])
    assert "4 paired epochs" in capfd.readouterr().out


def test_overhead_names_a_mistake(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["overhead", *RECIPE, "--trainer.max_epoch", "3"])
    assert stop.value.code == 2
    assert "did you mean --trainer.max_epochs?" in capfd.readouterr().err


def test_monitor_tells_steps_with_a_look_from_others(project, monkeypatch, capfd):
    look, seconds = monitor.SpectralMonitor._look, 0.05
    monkeypatch.setattr(
        monitor.SpectralMonitor, "_look", lambda self, seen: (time.sleep(seconds), look(self, seen))
    )
    options = ["--steps", "10", "--every", "20", "--json", "out.json"]
    assert main(["monitor", "--config", "recipe.yaml", *options]) == 0
    result = json.loads((project / "out.json").read_text())
    assert result["matrices"] == 1
    assert len(result["plain_seconds"]) == len(result["looking_seconds"]) == 5
    assert statistics.median(result["looking_seconds"]) > seconds
    assert result["overhead"] > seconds / (20 * statistics.median(result["plain_seconds"])) / 2
    assert "20 steps: " in capfd.readouterr().out
    assert not (project / "lightning_logs").exists()


def test_table_aligns_columns():
    assert console.table(["name", "value"], [["a", 1.5], ["long name", 10]]).splitlines() == [
        "name       value",
        "---------  -----",
        "a            1.5",
        "long name     10",
    ]


def test_typical_epoch_forgets_a_burst():
    assert overhead.typical_epoch([[1.0, 2.0], [1.0, 2.0], [50.0, 2.0]]) == 3.0


def test_machine_is_named():
    line = console.machine_line(torch.device("cpu"))
    assert console.processor() in line
    assert "threads" in line
    assert torch.__version__ in line


@dataclasses.dataclass
class Outcome:
    """What a command printed and wrote."""

    printed: str
    result: dict
    plot: bytes

    def rows(self, first: str) -> list[list[str]]:
        """The cells of the table whose heading starts so."""
        lines = self.printed.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(first))
        body = itertools.takewhile(bool, lines[start + 2 :])
        return [re.split(r" {2,}", line) for line in body]


def outcome(folder, *args):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        files = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
        assert main([*args, "--quick", "--device", "cpu", *files]) == 0
    result = json.loads((folder / "out.json").read_text())
    return Outcome(printed.getvalue(), result, (folder / "out.png").read_bytes())


@pytest.fixture(scope="module")
def topk_outcome(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("topk"), "topk", "--repeats", "3")


@pytest.fixture(scope="module")
def polar_outcome(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("polar"), "polar", "--repeats", "2")


@pytest.fixture(scope="module")
def step_outcome(tmp_path_factory):
    return outcome(tmp_path_factory.mktemp("step"), "step", "--repeats", "2")


@pytest.mark.parametrize("name", ["topk_outcome", "polar_outcome", "step_outcome"])
def test_race_says_how_it_was_timed(name, request):
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
    assert console.machine_line(torch.device("cpu")) in found.printed
    assert all(
        len(entry["seconds"]) == repeats
        and entry["median_seconds"] == statistics.median(entry["seconds"])
        for entry in found.result["results"]
        if entry.get("reached", True)
    )
    assert found.plot.startswith(b"\x89PNG")


@pytest.mark.parametrize("has_bf16", [False, True])
def test_races_say_what_matrices_are_multiplied_in(has_bf16, monkeypatch):
    module = importlib.import_module("lit_fanions.lmo.newton_schulz")
    monkeypatch.setattr(module, "_has_bf16", lambda device_type: has_bf16)
    cpu = torch.device("cpu")
    assert polar.products(cpu)[polar.TORCH] == "bfloat16"  # whatever the hardware
    assert polar.products(cpu)["our Newton-Schulz"].startswith("bfloat16") == has_bf16
    rank_k = topk._products(cpu, ["gaussian"])
    assert ("bfloat16" in rank_k.values()) == has_bf16
    assert rank_k["the solvers of rank k"] == "float32"
    assert topk._products(cpu, ["momentum"])[polar.TORCH] == "bfloat16"


# Rank k.


def quick_cases(*args):
    parser = argparse.ArgumentParser()
    topk.add_arguments(parser)
    options = parser.parse_args(["--quick", "--device", "cpu", *args])
    return topk.cases(options, topk.CASES)


def dense_error(found, m, k):
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    difference = found.U.double() @ found.Vh.double() - u[:, :k] @ vh[:k]
    return float(torch.linalg.matrix_norm(difference)) / math.sqrt(k)


def test_topk_races_what_reaches_the_error(topk_outcome):
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


def test_topk_ratios_are_quotients_of_medians(topk_outcome):
    for name, k in (("gaussian", 1), ("gaussian", 4), ("power_law", 1), ("power_law", 4)):
        entries = [e for e in topk_outcome.result["results"] if (e["case"], e["k"]) == (name, k)]
        medians = {e["solver"]: e["median_seconds"] for e in entries if e["reached"]}
        theirs = [topk.ARPACK]
        if name == "power_law":
            theirs += [rank_k.FULL, rank_k.LOW_RANK]
        reference = min(medians[solver] for solver in theirs)
        best = min(
            median
            for solver, median in medians.items()
            if solver.startswith("ours: ") and solver != rank_k.AUTO
        )
        for entry in entries:
            ratio, ours = entry["ratio_to_reference"], entry["ratio_to_best_of_ours"]
            if not entry["reached"]:
                assert ratio is None and ours is None
                continue
            assert ratio == pytest.approx(entry["median_seconds"] / reference)
            if entry["solver"].startswith("ours: "):
                assert ours == pytest.approx(entry["median_seconds"] / best)
            else:
                assert ours is None


def test_topk_prints_what_it_saves(topk_outcome):
    entries = [e for e in topk_outcome.result["results"] if e["case"] == "gaussian"]
    rows = topk_outcome.rows("k  solver")
    for entry, row in zip(entries, rows, strict=True):
        assert row[:2] == [str(entry["k"]), entry["solver"]]
        assert f"{1e3 * entry['median_seconds']:.4g}" in row
        assert f"{entry['error']:.4g}" in row
        if entry["reached"]:
            assert f"{entry['ratio_to_reference']:.4g}" in row
    # Beside ours the paper's seconds, and their ratio to its fastest.
    assert rows[0][-2:] == ["0.18", "1"]
    assert next(row for row in rows if row[1] == topk.PCA)[-2:] == ["1.15", "6.389"]
    assert "recorded momentum: left out" in topk_outcome.printed
    for name in ("scipy", "numpy"):
        version = importlib.metadata.version(name)
        assert topk_outcome.result["versions"][name] == version
        assert f"{name} {version}" in topk_outcome.printed
    condition, choice = lmo.rules()[-1]
    assert topk_outcome.printed.splitlines()[-1].split("  ")[0] == condition
    assert topk_outcome.printed.rstrip().endswith(choice)


def test_topk_lists_what_does_not_reach_the_error(tmp_path):
    args = ["topk", "--cases", "gaussian", "--k", "2", "--repeats", "1", "--error", "1e-7"]
    found = outcome(tmp_path, *args)
    entries = {e["solver"]: e for e in found.result["results"]}
    lanczos = entries["ours: lanczos"]
    assert not lanczos["reached"]
    assert lanczos["error"] > 1e-7
    assert lanczos["median_seconds"] > 0
    assert lanczos["ratio_to_reference"] is None
    (row,) = (row for row in found.rows("k  solver") if row[1] == "ours: lanczos")
    assert "not reached" in row


def test_topk_compares_auto_with_the_best_of_the_others(tmp_path, monkeypatch):
    canned = {rank_k.AUTO: 1.0, "ours: lanczos": 2.0, "ours: exact": 4.0}

    def take_turns(competitors, **options):
        return {name: [canned.get(name, 8.0)] for name in competitors}

    monkeypatch.setattr(race, "take_turns", take_turns)
    found = outcome(tmp_path, "topk", "--cases", "gaussian", "--k", "1", "--repeats", "1")
    ratios = {e["solver"]: e["ratio_to_best_of_ours"] for e in found.result["results"]}
    assert [ratios[name] for name in canned] == [0.5, 1, 2]
    assert ratios[topk.ARPACK] is None


def test_topk_races_on_the_seeds_that_a_setting_was_chosen_on(tmp_path, monkeypatch):
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


def test_topk_says_what_was_tried(topk_outcome):
    entry = next(e for e in topk_outcome.result["results"] if e["solver"] == topk.PCA)
    assert [t["seed"] for t in entry["tried"] if t["setting"] == entry["setting"]] == list(range(5))
    assert max(t["error"] for t in entry["tried"] if t["setting"] == entry["setting"]) <= 0.01
    assert entry["tried"][0]["setting"] != entry["setting"]
    assert entry["tried"][0]["error"] > 0.01


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_reference_of_a_large_matrix_is_that_of_the_svd(shape, monkeypatch):
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


# Recorded momentum.


def checkpoints(folder, steps=5, algorithm="muon", width=24, nesterov=True):
    """Files in Lightning's layout, of consecutive steps of Fanion on a small module.

    Beside what Lightning has in them the gradients, and the momentum's factors of the step.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Linear(width, 3 * width))
    optimizer = Fanion(
        [
            {
                "params": [("0.weight", net[0].weight)],
                "algorithm": algorithm,
                "lr": 0.02,
                "nesterov": nesterov,
            },
            {
                "params": [("1.weight", net[1].weight)],
                "algorithm": algorithm,
                "lr": 0.02,
                "splits": 3,
                "name": "fused",
                "nesterov": nesterov,
            },
            {
                "params": [("0.bias", net[0].bias), ("1.bias", net[1].bias)],
                "algorithm": "adamw",
                "lr": 1e-3,
            },
        ]
    )
    data, files = torch.randn(64, 16), []
    for i in range(steps):
        optimizer.zero_grad()
        net(data).square().mean().backward()
        mus = [group["momentum"] for group in optimizer.param_groups]
        optimizer.step()
        for group in optimizer.param_groups:
            group["momentum"] -= 0.01  # as a schedule does before Lightning saves
        files.append(folder / f"step={i}.ckpt")
        contents = {
            "global_step": i + 1,
            "state_dict": net.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "gradients": [p.grad for p in (net[0].weight, net[1].weight)],
            "mus": mus,
        }
        torch.save(contents, files[-1])
    return files[::-1]


def test_recorded_momenta_are_the_matrices_in_order(tmp_path):
    files = checkpoints(tmp_path, nesterov=False)
    momenta = recorded.momenta(files)
    assert {name: tuple(ms[0].shape) for name, ms in momenta.items()} == {
        "0.weight": (24, 16),
        **{f"1.weight[{i}]": (24, 24) for i in range(3)},
    }
    for i, file in enumerate(sorted(files)):
        state = torch.load(file, weights_only=True)["optimizer_states"][0]["state"]
        assert torch.equal(momenta["0.weight"][i], state[0]["momentum"])
        assert torch.equal(momenta["1.weight[2]"][i], state[1]["momentum"][48:])


def test_recorded_nesterov_momenta_are_what_directions_were_taken_of(tmp_path):
    files = checkpoints(tmp_path)
    momenta = recorded.momenta(files)
    assert {len(ms) for ms in momenta.values()} == {len(files) - 1}
    for i, file in enumerate(sorted(files)[1:]):
        contents = torch.load(file, weights_only=True)
        state = contents["optimizer_states"][0]["state"]
        a, b = (
            g.lerp(state[j]["momentum"], mu)
            for j, (g, mu) in enumerate(zip(contents["gradients"], contents["mus"], strict=False))
        )
        for got, expected in (
            (momenta["0.weight"][i], a),
            (momenta["1.weight[2]"][i], b[48:]),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_recorded_momenta_of_some_nesterov_groups_end_together(tmp_path):
    files = checkpoints(tmp_path)
    for file in files:
        contents = torch.load(file, weights_only=True)
        contents["optimizer_states"][0]["param_groups"][1]["nesterov"] = False
        torch.save(contents, file)
    momenta = recorded.momenta(files)
    assert {name: len(ms) for name, ms in momenta.items()} == {
        "0.weight": 4,
        **{f"1.weight[{i}]": 4 for i in range(3)},
    }
    last = torch.load(max(files), weights_only=True)["optimizer_states"][0]["state"]
    assert torch.equal(momenta["1.weight[0]"][-1], last[1]["momentum"][:24])


def test_topk_of_recorded_momentum(tmp_path):
    files = [str(file) for file in checkpoints(tmp_path)]
    args = ["topk", "--cases", "momentum", "--repeats", "3", "--k", "2", "5", "--checkpoints"]
    found = outcome(tmp_path, *args, *files)
    momenta = recorded.momenta([tmp_path / file for file in files])
    entries = found.result["momentum"]
    # One matrix of each shape, the middle one.
    assert list(dict.fromkeys(e["matrix"] for e in entries)) == ["1.weight[1]", "0.weight"]
    for name in ("1.weight[1]", "0.weight"):
        own = {e["direction"]: e for e in entries if e["matrix"] == name}
        assert list(own) == [
            polar.TORCH, "subspace, k = 2", "auto, k = 2", "subspace, k = 5", "auto, k = 5"
        ]  # fmt: skip
        for entry in own.values():
            assert entry["steps"] == len(entry["quality"]) == 3
            assert entry["median_seconds"] == statistics.median(entry["seconds"])
            assert entry["ratio_to_newton_schulz"] == pytest.approx(
                entry["median_seconds"] / own[polar.TORCH]["median_seconds"]
            )
        newton_schulz = own[polar.TORCH]["quality"]
        for m, quality in zip(momenta[name][1:], newton_schulz, strict=True):
            d = polar.torch_newton_schulz(m).double()
            norm = torch.linalg.matrix_norm(m.double(), "nuc")
            assert quality == pytest.approx(float((m * d).sum() / norm), abs=1e-3)
        # 13 columns of 16 or 24, from step to step: nearly the best direction of rank 2 and 5.
        for label in ("subspace, k = 2", "subspace, k = 5"):
            assert min(own[label]["quality"]) > 0.97
            assert max(own[label]["quality"]) < 1 + 1e-5
    rows = found.rows("matrix")
    for entry, row in zip(entries, rows, strict=True):
        assert row[:3] == [entry["matrix"], "x".join(map(str, entry["shape"])), entry["direction"]]
        assert float(row[-1]) == pytest.approx(min(entry["quality"]), rel=1e-3)
    assert "left out" not in found.printed


def test_recorded_momentum_is_warm_started_from_the_step_before(tmp_path):
    # From one matrix without gaps to another, so that the first start is of no use in the end.
    a, b = polar.gaussian((64, 48), 1), polar.gaussian((64, 48), 2)
    turn = torch.linspace(0, math.pi / 2, 100)
    steps = [t.cos() * a + t.sin() * b for t in turn]
    options = argparse.Namespace(repeats=1, device=torch.device("cpu"))
    entries = recorded.race_all({"m": steps}, [4], options)
    (quality,) = (e["quality"] for e in entries if e["direction"] == "subspace, k = 4")
    s = torch.linalg.svdvals(b.double())[:4].sum()
    cold = lmo.start_block((64, 48), 4, device=b.device)
    for start in (cold, lmo.warmed(a, cold)):
        found = lmo.top_singular(b, 4, solver="subspace", warm_start=start)
        assert polar.quality(b, found.U @ found.Vh, s) < 0.95
    assert quality[-1] > 0.98


def broken_checkpoint(name, folder):
    file = folder / "broken.ckpt"
    if name == "text":
        file.write_text("not a checkpoint")
    elif name == "no optimizer":
        torch.save({"state_dict": {}}, file)
    elif name == "no momentum":
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3, 3))])
        torch.save({"optimizer_states": [optimizer.state_dict()]}, file)
    elif name in ("one step", "one plain step"):
        (file,) = checkpoints(folder, steps=1, nesterov=name == "one step")
    elif name == "two steps":
        return checkpoints(folder, steps=2)
    elif name == "a step left out":
        files = checkpoints(folder)
        return [*files[:2], *files[3:]]
    elif name == "too small":
        return checkpoints(folder, width=5)
    elif name == "another model":
        (folder / "other").mkdir()
        other = checkpoints(folder / "other", steps=2, width=20)
        return [*checkpoints(folder, steps=1), other[0]]
    return [file]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "is no readable Lightning checkpoint: FileNotFoundError"),
        ("text", "is no readable Lightning checkpoint: "),
        ("no optimizer", "is no readable Lightning checkpoint: KeyError: 'optimizer_states'"),
        ("no momentum", "has no momentum of matrices that Fanion steps"),
        ("one plain step", "needs the checkpoints of at least two steps"),
        ("one step", "and with Nesterov momentum of three, got 1"),
        ("two steps", "and with Nesterov momentum of three, got 2"),
        ("a step left out", "Nesterov momentum needs every step, and after 2 comes 4: record"),
        ("too small", "the checkpoints have no matrix of at least 8x8"),
        ("another model", "the checkpoints are of different models"),
    ],
)
def test_topk_names_what_is_wrong_with_a_checkpoint(name, message, tmp_path, capfd):
    files = [str(file) for file in broken_checkpoint(name, tmp_path)]
    line = refused(capfd, "topk", "--quick", "--checkpoints", *files)
    assert message in line


# Full rank.


def test_polar_table(polar_outcome):
    entries = polar_outcome.result["results"]
    assert {(tuple(e["shape"]), e["batch"]) for e in entries} == {
        (shape, batch) for shape in polar.QUICK_SHAPES for batch in (1, 4)
    }
    for shape, batch in itertools.product(polar.QUICK_SHAPES, (1, 4)):
        own = {e["method"]: e for e in entries if (tuple(e["shape"]), e["batch"]) == (shape, batch)}
        assert list(own) == [
            polar.TORCH, "SVD in float64", "jordan 5", "quintic", "polar_express 6", "cans 5",
            "convergent", "exact", "auto",
        ]  # fmt: skip
        for entry in own.values():
            assert entry["ratio_to_torch"] == pytest.approx(
                entry["median_seconds"] / own[polar.TORCH]["median_seconds"]
            )
        for method in ("exact", "SVD in float64"):
            assert list(own[method]["quality"].values()) == pytest.approx([1] * 3, abs=1e-5)
            assert own[method]["largest_singular_value"] == pytest.approx(1, abs=1e-5)
    for entry, row in zip(entries, polar_outcome.rows("shape"), strict=True):
        assert row[:3] == ["x".join(map(str, entry["shape"])), str(entry["batch"]), entry["method"]]
        assert float(row[-2]) == pytest.approx(min(entry["quality"].values()), rel=1e-3)
        assert float(row[-3]) == pytest.approx(entry["ratio_to_torch"], rel=1e-3)


def test_polar_judges_directions(polar_outcome):
    entries = [e for e in polar_outcome.result["results"] if e["batch"] == 1]
    for entry in entries:
        shape = tuple(entry["shape"])
        if entry["method"] == "jordan 5":
            directions = {n: lmo.polar(m, method="jordan") for n, m in polar.spectra(shape).items()}
        elif entry["method"] == polar.TORCH:
            directions = {n: polar.torch_newton_schulz(m) for n, m in polar.spectra(shape).items()}
        else:
            continue
        largest = max(torch.linalg.svdvals(d.double())[0] for d in directions.values())
        assert entry["largest_singular_value"] == pytest.approx(float(largest), rel=1e-4)
        for name, m in polar.spectra(shape).items():
            s = torch.linalg.svdvals(m.double())
            value = float((m.double() * directions[name].double()).sum() / s.sum())
            assert entry["quality"][name] == pytest.approx(value, rel=1e-6)


def test_spectra_are_as_named():
    power_law, condition = list(polar.spectra((20, 50)).values())[1:]
    expected = torch.arange(1, 21).double() ** -0.7
    torch.testing.assert_close(
        torch.linalg.svdvals(power_law.double()), expected, rtol=0, atol=1e-6
    )
    s = torch.linalg.svdvals(condition.double())
    assert float(s[0] / s[-1]) == pytest.approx(1e3, rel=1e-3)
    assert torch.allclose(s[1:] / s[:-1], s[1] / s[0], rtol=1e-3)


# A step.


def test_step_table(step_outcome):
    result = step_outcome.result
    own = {e["optimizer"]: e for e in result["results"]}
    assert list(own) == [
        "torch.optim.Muon", "muon", "muon, 4 steps", "f_muon", "s_muon", "neon",
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


def test_step_judges_directions(step_outcome):
    judged = step_outcome.result["quality"]
    assert {tuple(e["shape"]) for e in judged} == {(64, 64), (64, 256), (256, 64)}
    for entry in judged:
        m = polar.spectra(tuple(entry["shape"]))[entry["spectrum"]]
        s = torch.linalg.svdvals(m.double()).sum()
        ours = float((m.double() * lmo.direction(m).double()).sum() / s)
        assert entry["muon"] == pytest.approx(ours, rel=1e-6)
        assert 0.7 < entry["torch.optim.Muon"] < entry["muon"]


def test_step_optimizers_step_the_same_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(40, 40))]
    optimizers = step.optimizers(parameters)
    parameters[0].grad = torch.eye(40)
    for name, optimizer in optimizers.items():
        with torch.no_grad():
            parameters[0].zero_()
        optimizer.step()
        assert float(parameters[0].detach().norm()) > 0, name


def test_fresh_gradients_in_every_round():
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


# What races share.


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


def test_costly_levels_are_not_begun(monkeypatch):
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


def test_the_race_is_run_on_the_seeds_that_the_budget_let_be_tried(monkeypatch):
    monkeypatch.setattr(race, "timed", lambda turn, device: (1.0, turn()))  # a second each
    # A goal that holds on the first three seeds alone.
    (some,), tried = levels([0.05, 0.05, 0.05, 0.3, 0.3, 0.3, 0.3])
    trial = race.cheapest(
        [some], lambda e: e, goal=0.1, seeds=5, budget=3.5, device=torch.device("cpu")
    )
    assert (trial.reached, trial.seeds, trial.error) == (True, 3, 0.05)
    assert max(trial.turn(turn) for turn in range(7)) == 0.05
    assert {seed for _, seed in tried} == {0, 1, 2}


@pytest.mark.parametrize("xp", [torch, pytest.param(None, id="numpy")])
def test_algorithms_shared_with_cupy(xp):
    # CuPy answers as NumPy does; what is written for both must do on these two.
    m, start = polar.power_law((40, 30)), lmo.start_block((40, 30), 4, device=torch.device("cpu"))
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    if xp is None:
        xp = pytest.importorskip("numpy")
        args = xp, m.numpy(), start.numpy()
    else:
        args = xp, m, start
    results = {
        name: [torch.as_tensor(part) for part in algorithm(*args)]
        for name, algorithm in gpu_peers.ALGORITHMS.items()
    }
    for name, k in (("full SVD", 30), ("randomized SVD", 4), ("power iteration", 1)):
        found = lmo.Triplets(*results[name])
        torch.testing.assert_close(found.S[:k], s[:k], rtol=1e-3, atol=1e-4)
        d = found.U[:, :k] @ found.Vh[:k]
        torch.testing.assert_close(d, u[:, :k] @ vh[:k], rtol=0, atol=0.02)
    d = torch.stack(results["Newton-Schulz"])
    assert polar.quality(m, d, s.sum()) == pytest.approx(1, abs=0.25)


# Mistakes.


def refused(capfd, *args):
    """The one line that the command line ends with."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    usage, _, message = err.partition(f"python -m experiments.bench {args[0]}: error: ")
    assert "usage: " in usage
    assert message.count("\n") == 1
    return message.rstrip()


@pytest.mark.parametrize("command", ["topk", "polar", "step"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "-1"], "--repeats: '-1' is no whole number of at least 1"),
        (["--repeats", "0"], "--repeats: '0' is no whole number of at least 1"),
        (["--repeats", "two"], "--repeats: 'two' is no whole number of at least 1"),
        (["--device", "tpu"], "--device: 'tpu' is none of auto, cpu, cuda"),
        (["--json", "nowhere/out.json"], "'nowhere/out.json' is no file in an existing folder"),
        (["--plot", "nowhere/out.png"], "'nowhere/out.png' is no file in an existing folder"),
        (["--plot", "out.xyz"], "'out.xyz' does not end in .png, .pdf or .svg"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_race_names_a_mistake(command, options, message, capfd, project):
    assert message in refused(capfd, command, "--quick", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0"], "--size: '0' is no whole number of at least 1"),
        (["--k", "0"], "--k: '0' is no whole number of at least 1"),
        (["--k", "all"], "--k: 'all' is no whole number of at least 1"),
        (["--k", "4", "96"], "k = 96 is too large for Gaussian 96x96"),
        (["--size", "3"], "k = 4 is too large for Gaussian 3x3, as in Table 2 of the paper: give"),
        (["--cases", "paper"], "invalid choice: 'paper'"),
        (["--cases", "momentum"], "--cases momentum needs --checkpoints"),
        (["--error", "nan"], "--error: 'nan' is no number above 0"),
        (["--budget", "-1"], "--budget: '-1' is no number above 0"),
    ],
)
def test_topk_names_a_mistake(options, message, capfd):
    assert message in refused(capfd, "topk", "--quick", *options)


def test_step_names_a_mistake(capfd):
    line = refused(capfd, "step", "--quick", "--layers", "0")
    assert "--layers: '0' is no whole number of at least 1" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_race_needs_the_gpu_it_was_asked_for(capfd):
    line = refused(capfd, "polar", "--quick", "--device", "cuda")
    assert "torch finds no GPU for 'cuda'" in line


def test_race_names_a_missing_package(capfd, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(capfd, "step", "--quick", "--plot", str(tmp_path / "out.png"))
    assert line == "--plot needs matplotlib: pip install matplotlib"
    monkeypatch.setitem(sys.modules, "scipy", None)
    line = refused(capfd, "topk", "--quick")
    assert line == "this race needs scipy: pip install scipy"


@pytest.mark.parametrize("command", ["polar", "step"])
def test_race_needs_the_muon_of_torch(command, capfd, monkeypatch):
    monkeypatch.delattr(torch.optim, "_muon")
    monkeypatch.setitem(sys.modules, "torch.optim._muon", None)
    line = refused(capfd, command, "--quick")
    assert "needs torch.optim.Muon of torch 2.9 or later" in line


def test_report_shows_all_tables():
    more = [console.Table("second", ["name"], [["x"]])]
    shown = str(console.Report("first", ["n"], [[123456.0]], ["a note"], {}, more=more))
    assert shown.splitlines() == [
        "first", "", "     n", "------", "123456", "", "second", "", "name", "----", "x", "",
        "a note",
    ]  # fmt: skip

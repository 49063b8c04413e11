"""Recorded momenta are read from checkpoints, and directions of them are warm-started."""

import argparse
import math
import statistics

import pytest
import torch

from experiments.bench import polar, recorded
from lit_fanions import Fanion, lmo
from tests.experiments.bench.outcomes import outcome, refused


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


def test_momenta_are_in_the_order_of_the_steps(tmp_path):
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


def test_nesterov_momenta_are_the_inputs_of_directions(tmp_path):
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


def test_momenta_of_all_groups_are_of_the_same_steps(tmp_path):
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


def test_directions_are_warm_started_from_the_step_before(tmp_path):
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
def test_unusable_checkpoints_are_refused(name, message, tmp_path, capfd):
    files = [str(file) for file in broken_checkpoint(name, tmp_path)]
    line = refused(capfd, "topk", "--quick", "--checkpoints", *files)
    assert message in line

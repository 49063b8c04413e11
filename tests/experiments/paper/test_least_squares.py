"""Least squares: which runs are asked for, what is read from them, and when a claim holds."""

import csv
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.paper import least_squares
from experiments.paper.__main__ import main
from experiments.paper.bounds import ALGORITHMS, PRINTED
from experiments.paper.least_squares import (
    FIVE,
    QUANTITIES,
    SMALL,
    THEORY,
    Trace,
    _at_loss,
)
from lit_fanions import bounds
from tests.conftest import TESTS

pytest.importorskip("matplotlib")

STEPS = [0, 1, 10, 100, 1000, 5000]
L = 2.0


def falling(rate, floor=0.0):
    """Loss and norms that fall together: the norms with the root of the loss."""
    loss = [max(100 * math.exp(-rate * step), floor) for step in STEPS]
    return {q: loss if q == "loss" else [value**0.5 for value in loss] for q in QUANTITIES}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Replace trainings by `values(setting, recipe, problem)`: by quantity a list, None: failed.

    Returns a function that sets it, and returns the list of all runs that were asked for.
    """
    monkeypatch.chdir(tmp_path)
    asked = []

    def replace(values, steps=STEPS, draw=False):
        if not draw:  # it takes seconds
            monkeypatch.setattr(least_squares, "_draw", lambda figure, traces, problems: None)

        def execute(given, folder, metrics, jobs):
            curves = {}
            for run in given:
                asked.append(run)
                setting, recipe = run.name.split("-")
                curves[run.name] = made = {"train/loss": [(step, 1.0) for step in steps]}
                for tag in metrics[1:]:
                    problem, quantity = re.fullmatch(r"problem(\d+)/(\w+)", tag).groups()
                    found = values(setting, recipe, int(problem))
                    if found is None:
                        curves.pop(run.name, None)
                        break
                    found = {**found, "smoothness": [L + int(problem)]}[quantity]
                    made[tag] = list(zip(steps, found, strict=False))
            return curves

        monkeypatch.setattr(least_squares, "execute", execute)
        monkeypatch.setattr(least_squares.runs, "check", lambda args: None)
        return asked

    Path("configs/least_squares").mkdir(parents=True)
    for path in (*(f"configs/least_squares/{name}.yaml" for name in FIVE), SMALL):
        lr = 0.001 if path == SMALL else 0.01
        content = {"model": {"init_args": {"optimizer": {"matrix": {"lr": lr}}}}}
        Path(path).write_text(yaml.safe_dump(content))
    return replace


RATES = {"neon": 1e-4, "f_neon": 2e-4, "nsgd": 5e-4, "f_muon": 4e-3, "muon": 6e-3}


def usual(setting, recipe, problem):
    return falling(RATES[recipe] * (1 + 0.01 * problem), floor={"muon": 2e-3}.get(recipe, 1e-3))


def solve(*args):
    return main(["least_squares", "--out", "out", *args])


def outcome():
    return json.loads(Path("out/least_squares.json").read_text())


# The runs.


def test_every_setting_has_its_runs(trained):
    asked = trained(usual)
    assert solve("--seeds", "3", "--trainer.accelerator=cpu") == 0
    args = {run.name: run.args for run in asked}
    assert len(args) == len(asked) == 5 + 5 + 5 + 3 + 3
    sizes = [
        "--seed_everything=0",
        *(f"--model.init_args.{side}" for side in ("problems=3", "rows=50", "cols=50")),
        *(f"--data.init_args.{side}" for side in ("problems=3", "rows=50", "cols=50")),
    ]
    recipe = "--config=configs/least_squares/muon.yaml"
    assert args["article-muon"] == (recipe, "--trainer.accelerator=cpu", *sizes)
    lr = "--model.init_args.optimizer.matrix.lr="
    steps = "--trainer.max_steps=23838"
    accelerator = "--trainer.accelerator=cpu"  # what tells runs apart comes after, and wins
    assert args["printed-muon"][:4] == (recipe, accelerator, f"{lr}0.000233", steps)
    small = f"--config={SMALL}"
    assert args["text-muon"][:2] == (recipe, small)  # whose sign_scale suits the size
    assert {f"{lr}0.01", "--trainer.max_steps=5000"} < {*args["text-muon"]}
    assert args["text-muon"][-1] == "--data.init_args.cols=10"
    assert args["draft-muon"][:2] == (recipe, f"--config={SMALL}")
    assert args["draft-muon"][-1] == "--data.init_args.cols=10"
    # Lemma 7 for the problem that asks for most.
    plan = bounds.plan(L + 2, 100.0, 25.0)
    assert args["lemma7-muon"][2:4] == (f"{lr}{plan.lr:.6g}", f"--trainer.max_steps={plan.steps}")
    assert plan.steps == math.ceil(2 * (L + 2) * 100 / 25**2)


def test_what_is_left(trained, capfd):
    trained(usual)
    assert solve("--seeds", "2") == 0
    printed = capfd.readouterr().out
    assert "50 × 50, lr 0.01, after 5,000 steps: median (least – largest) of problems" in printed
    assert "10 × 10, lr 0.001, after 5,000 steps" in printed
    with Path("out/least_squares.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21 * 2 * len(STEPS)
    (row,) = (
        row
        for row in rows
        if (row["setting"], row["recipe"], row["problem"], row["step"])
        == ("draft", "nsgd", "1", "100")
    )
    expected = usual("draft", "nsgd", 1)
    assert float(row["lr"]) == 0.001
    for quantity in QUANTITIES:
        assert float(row[quantity]) == expected[quantity][STEPS.index(100)]
    # Two problems prove nothing.
    assert {claim["verdict"] for claim in outcome()["claims"]} == {"not testable here"}


def test_a_failure_leaves_the_rest(trained, capfd):
    trained(lambda s, r, p: None if r == "neon" else usual(s, r, p))
    assert solve("--seeds", "5") == 1
    assert "failed runs: 4; see out/runs/*/output.txt" in capfd.readouterr().out
    assert "Neon" not in str(outcome()["claims"])


def test_nothing_but_failures(trained, capfd):
    trained(lambda s, r, p: None)
    with pytest.raises(SystemExit):
        solve()
    assert "every run failed: see out/runs" in capfd.readouterr().err


def test_what_diverges_breaks_nothing(trained):
    def values(setting, recipe, problem):
        found = usual(setting, recipe, problem)
        if recipe == "nsgd":
            found = {q: [v[0], v[1], *[math.inf] * 4] for q, v in found.items()}
        return found

    trained(values, draw=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve("--seeds", "5") == 0
    assert Path("out/least_squares.png").read_bytes().startswith(b"\x89PNG")
    assert claims("article", "neon-loss")[0]["verdict"] == "refuted"  # nsgd is worse
    json.loads(Path("out/least_squares.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "option",
    ["--model.rows", "--data.init_args.cols", "--model.problems", "--model.optimizer.matrix.lr"],
)
def test_reserved_options(option, trained, capfd):
    asked = trained(usual)
    with pytest.raises(SystemExit) as stop:
        solve(f"{option}=3")
    assert stop.value.code == 2
    assert f"error: {option} is set for every run by this command: " in capfd.readouterr().err
    assert not asked


# The claims.


def leading(recipe, quantity, setting="article"):
    """As usual, but of a recipe one quantity is the smallest in a setting."""

    def values(s, r, problem):
        found = usual(s, r, problem)
        if (s, r) == (setting, recipe):
            found[quantity] = [value / 1e6 for value in found[quantity]]
        return found

    return values


DATA = {
    "article": "50 × 50, lr 0.01,",
    "text": "10 × 10, lr 0.01,",
    "draft": "10 × 10, lr 0.001,",
}


def claims(setting, id):
    found = [claim for claim in outcome()["claims"] if claim["id"] == id]
    return [claim for claim in found if DATA[setting] in claim["data"]]


def test_neon_worst_and_no_leader(trained):
    trained(usual)
    assert solve() == 0
    for place in DATA:
        (worst,), (leader,) = claims(place, "neon-loss"), claims(place, "neon-gradient")
        assert (worst["verdict"], leader["verdict"]) == ("confirmed", "refuted")
        assert (worst["n"], leader["n"]) == (10, 10)
        start = "smallest of the 5 in so many of 10 problems: spectral norm, last: 0"
        assert leader["found"].startswith(start)
    (robust,) = claims("article", "f-muon-robust")
    assert robust["verdict"] == "confirmed"
    assert (
        "loss 10, spectral 10, frobenius 10, nuclear 10; loss over Muon's: 0.5" in robust["found"]
    )
    assert "Muon with 0.71 of its lr" in robust["why"]


@pytest.mark.parametrize("quantity", ["spectral", "best_nuclear"])
@pytest.mark.parametrize("setting", ["draft", "text"])
def test_neon_a_leader(quantity, setting, trained):
    trained(leading("neon", quantity, setting))
    assert solve() == 0
    (article,) = claims("article", "neon-gradient")
    (draft,) = claims(setting, "neon-gradient")
    assert (article["verdict"], draft["verdict"]) == ("refuted", "confirmed")
    name = quantity.replace("best_", "") + " norm, "
    assert f"{name}{'smallest so far' if 'best' in quantity else 'last'}: 10" in draft["found"]


def test_the_own_norm_alone_makes_no_leader(trained):
    trained(leading("neon", "dual"))
    assert solve() == 0
    (leader,) = claims("article", "neon-gradient")
    assert leader["verdict"] == "refuted"
    assert "it holds under: own dual norm, last (10 of 10)." in leader["why"]


def test_others_worse_than_neon_and_muon_more_robust(trained):
    rates = {**RATES, "nsgd": 1e-5}
    trained(lambda s, r, p: falling(rates[r], {"f_muon": 2e-3}.get(r, 1e-3)))
    assert solve() == 0
    assert claims("article", "neon-loss")[0]["verdict"] == "refuted"
    assert claims("article", "f-muon-robust")[0]["verdict"] == "refuted"


def test_own_recipes_and_arguments(trained):
    trained(usual)
    assert solve("--data.target=uniform") == 0
    assert all(claim["data"].endswith(", --data.target=uniform") for claim in outcome()["claims"])
    own = [f"configs/least_squares/{name}.yaml" for name in FIVE]
    assert solve("--config", *own) == 0
    assert outcome()["claims"] == []


def test_theory_is_not_judged_from_too_few_steps(trained):
    trained(lambda s, r, p: falling(0.0))  # the last step that is tried is 5,000
    assert solve() == 0
    (claim,) = (c for c in outcome()["claims"] if c["id"] == "theory-practice")
    assert claim["verdict"] == "not testable here"


@pytest.mark.parametrize(("factor", "verdict"), [(1, "refuted"), (5, "confirmed")])
def test_theory(factor, verdict, trained):
    """The precisions are reached after `factor` times the printed iterations."""
    steps = sorted({0, 1, *(factor * PRINTED[name].steps for name in THEORY.values())})

    def values(setting, recipe, problem):
        name = THEORY.get(recipe, "Muon")
        needed, precision = factor * PRINTED[name].steps, ALGORITHMS[name].precision(50)
        column = [precision / 2 if step >= needed else 2 * precision for step in steps]
        return dict.fromkeys(QUANTITIES, column)

    trained(values, steps)
    assert solve() == 0
    (claim,) = (c for c in outcome()["claims"] if c["id"] == "theory-practice")
    assert claim["verdict"] == verdict
    needed = f"{factor * 323:,}"
    assert f"nsgd, printed: lr 0.0175, 323 iterations, needed {needed};" in claim["found"]


# Small parts.


def trace(loss, **values):
    columns = {name: np.array([column]).T for name, column in {"loss": loss, **values}.items()}
    return Trace(0.1, list(range(len(loss))), columns, np.array([1.0]))


def test_at_equal_loss_is_interpolated():
    found = trace([100.0, 1.0, 0.5, 0.7], spectral=[8.0, 2.0, 1.0, 9.0])
    assert _at_loss(found, "spectral", np.array([10.0])) == pytest.approx([4.0])
    assert _at_loss(found, "spectral", np.array([0.5])) == pytest.approx([1.0])
    assert _at_loss(found, "spectral", np.array([100.0])) == pytest.approx([8.0])


def test_reached():
    found = trace([5.0, 3.0, 1.0, 2.0])
    assert found.reached("loss", 3.0) == [1]
    assert found.reached("loss", 0.5) == [math.inf]


# The whole, with real trainings.


@pytest.mark.slow
@pytest.mark.parametrize("command", ["least_squares", "logistic_regression"])
def test_quick(command, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(TESTS.parent)
    assert main([command, "--quick", "--out", str(tmp_path)]) == 0, capfd.readouterr()
    found = json.loads((tmp_path / f"{command}.json").read_text())
    assert found["rows"] and not found["claims"]
    assert (tmp_path / f"{command}.png").is_file()

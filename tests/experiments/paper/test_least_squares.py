"""Least squares: its runs, what is read from them, and the verdicts that follow."""

import csv
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.paper.__main__ import CHECKOUT, main
from experiments.paper.bounds.article import ALGORITHMS, PRINTED
from experiments.paper.least_squares import figure, trainings
from experiments.paper.least_squares.traces import (
    FIVE,
    QUANTITIES,
    THEORY,
    Trace,
    value_at_loss,
)
from experiments.paper.least_squares.trainings import SMALL
from experiments.paper.statements import STATEMENTS
from lit_fanions import bounds
from tests.conftest import TESTS

STEPS = [0, 1, 10, 100, 1000, 5000]
L = 2.0


def falling(rate, floor=0.0):
    """Loss and norms that fall together: the norms with the root of the loss."""
    loss = [max(100 * math.exp(-rate * step), floor) for step in STEPS]
    return {q: loss if q == "loss" else [value**0.5 for value in loss] for q in QUANTITIES}


@pytest.fixture
def trained(unchecked, monkeypatch, tmp_path):
    """Replace trainings: `values(setting, recipe, problem)` are lists by quantity, None a failure.

    Returns a function that sets `values` and returns the list of all runs that were asked for.
    """
    monkeypatch.chdir(tmp_path)
    asked = []

    def replace(values, steps=STEPS, draw=False):
        if not draw:  # drawing takes seconds
            monkeypatch.setattr(figure, "draw", lambda canvas, traces, problems: None)

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

        monkeypatch.setattr(trainings, "execute", execute)
        return asked

    for folder in (*CHECKOUT, "configs/least_squares"):
        Path(folder).mkdir()
    for path in (*(f"configs/least_squares/{name}.yaml" for name in FIVE), SMALL):
        write_recipe(path, 0.001 if path == SMALL else 0.01)
    return replace


def write_recipe(path, lr):
    content = {"model": {"init_args": {"optimizer": {"matrix": {"lr": lr}}}}}
    Path(path).write_text(yaml.safe_dump(content))


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
    accelerator = "--trainer.accelerator=cpu"  # the setting's own options come later, to win
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


def test_outcome_has_tables_and_all_numbers(trained, capfd):
    trained(usual)
    assert solve("--seeds", "2") == 0
    printed = capfd.readouterr().out
    assert (
        "50 × 50, lr 0.01, after 5,000 steps: median (least – largest) over the problems" in printed
    )
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
    expected = {s.id for s in STATEMENTS if s.command == "least_squares"} - {"final-convex"}
    assert {claim["id"] for claim in outcome()["claims"]} == expected


def test_failed_recipe_leaves_the_others(trained, capfd):
    trained(lambda s, r, p: None if r == "neon" else usual(s, r, p))
    assert solve("--seeds", "5") == 1
    assert "failed runs: 4; see out/runs/*/output.txt" in capfd.readouterr().out
    assert "Neon" not in str(outcome()["claims"])


def test_failure_of_all_runs_is_refused(trained, capfd):
    trained(lambda s, r, p: None)
    with pytest.raises(SystemExit):
        solve()
    assert "every run failed: see out/runs" in capfd.readouterr().err


def test_diverged_runs_are_drawn_and_saved(trained):
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
def test_options_that_settings_differ_in_are_reserved(option, trained, capfd):
    asked = trained(usual)
    with pytest.raises(SystemExit) as stop:
        solve(f"{option}=3")
    assert stop.value.code == 2
    assert f"error: {option} " in capfd.readouterr().err
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


def test_neon_has_the_largest_loss_and_no_lead(trained):
    trained(usual)
    assert solve() == 0
    for place in DATA:
        (worst,), (leader,) = claims(place, "neon-loss"), claims(place, "neon-gradient")
        assert (worst["verdict"], leader["verdict"]) == ("confirmed", "refuted")
        assert (worst["n"], leader["n"]) == (10, 10)
        start = (
            "smallest gradient of the 5 recipes, in how many of 10 problems: spectral norm, last: 0"
        )
        assert leader["found"].startswith(start)
    (robust,) = claims("article", "f-muon-robust")
    assert robust["verdict"] == "confirmed"
    assert (
        "loss 10, spectral 10, frobenius 10, nuclear 10; loss over Muon's: 0.5" in robust["found"]
    )
    assert "Muon with 0.71 of its lr" in robust["remark"]


@pytest.mark.parametrize(("floor", "verdict"), [(1e-3, "confirmed"), (3e-3, "refuted")])
def test_both_blends_must_end_below_muon(floor, verdict, trained):
    write_recipe("configs/least_squares/s_muon.yaml", 0.01)
    rates = {**RATES, "s_muon": RATES["f_muon"]}
    floors = {"muon": 2e-3, "s_muon": floor}
    trained(lambda s, r, p: falling(rates[r], floors.get(r, 1e-3)))
    assert solve() == 0
    (claim,) = claims("article", "final-convex")
    assert (claim["verdict"], claim["n"]) == (verdict, 10)
    assert f"f_muon 10, s_muon {10 if verdict == 'confirmed' else 0}" in claim["found"]


@pytest.mark.parametrize("quantity", ["spectral", "best_nuclear"])
@pytest.mark.parametrize("setting", ["draft", "text"])
def test_neon_leads_by_one_reading(quantity, setting, trained):
    trained(leading("neon", quantity, setting))
    assert solve() == 0
    (article,) = claims("article", "neon-gradient")
    (draft,) = claims(setting, "neon-gradient")
    assert (article["verdict"], draft["verdict"]) == ("refuted", "confirmed")
    name = quantity.replace("best_", "") + " norm, "
    assert f"{name}{'smallest so far' if 'best' in quantity else 'last'}: 10" in draft["found"]


@pytest.mark.parametrize(("problems", "verdict"), [(9, "not testable here"), (10, "confirmed")])
def test_lead_by_one_of_six_readings_is_corrected(problems, verdict, trained):
    def values(setting, recipe, problem):
        found = usual(setting, recipe, problem)
        if recipe == "neon" and problem < problems:
            found["best_nuclear"] = [value / 1e6 for value in found["best_nuclear"]]
        return found

    trained(values)
    assert solve() == 0
    (claim,) = claims("article", "neon-gradient")
    assert claim["verdict"] == verdict
    holding = "nuclear norm, smallest so far (10 of 10)" if problems == 10 else "none"
    assert claim["remark"].endswith(f"it holds for: {holding}.")


def test_lead_in_the_own_dual_norm_does_not_count(trained):
    trained(leading("neon", "dual"))
    assert solve() == 0
    (leader,) = claims("article", "neon-gradient")
    assert leader["verdict"] == "refuted"
    assert leader["remark"].endswith("it holds for: own dual norm, last (10 of 10).")


def test_other_order_of_losses_refutes(trained):
    rates = {**RATES, "nsgd": 1e-5}
    trained(lambda s, r, p: falling(rates[r], {"f_muon": 2e-3}.get(r, 1e-3)))
    assert solve() == 0
    assert claims("article", "neon-loss")[0]["verdict"] == "refuted"
    assert claims("article", "f-muon-robust")[0]["verdict"] == "refuted"


def test_own_arguments_are_named_and_own_recipes_give_no_verdicts(trained, tmp_path):
    trained(usual)
    assert solve("--data.target=uniform") == 0
    assert all(claim["data"].endswith(", --data.target=uniform") for claim in outcome()["claims"])
    some = [f"configs/least_squares/{name}.yaml" for name in ("muon", "f_muon")]
    assert solve("--config", *some) == 0
    assert {claim["id"] for claim in outcome()["claims"]} == {"f-muon-robust"}
    own = [shutil.copy(path, tmp_path) for path in some]
    assert solve("--config", *own) == 0
    assert outcome()["claims"] == []


def test_too_few_steps_do_not_judge_theory(trained):
    trained(lambda s, r, p: falling(0.0))  # the last step that is tried is 5,000
    assert solve() == 0
    (claim,) = (c for c in outcome()["claims"] if c["id"] == "theory-practice")
    assert claim["verdict"] == "not testable here"


@pytest.mark.parametrize(("factor", "verdict"), [(1, "refuted"), (5, "confirmed")])
def test_promised_iterations_are_compared_with_needed_ones(factor, verdict, trained):
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


def test_value_at_equal_loss_is_interpolated():
    found = trace([100.0, 1.0, 0.5, 0.7], spectral=[8.0, 2.0, 1.0, 9.0])
    assert value_at_loss(found, "spectral", np.array([10.0])) == pytest.approx([4.0])
    assert value_at_loss(found, "spectral", np.array([0.5])) == pytest.approx([1.0])
    assert value_at_loss(found, "spectral", np.array([100.0])) == pytest.approx([8.0])


def test_first_step_below_a_target():
    found = trace([5.0, 3.0, 1.0, 2.0])
    assert found.first_step_below("loss", 3.0) == [1]
    assert found.first_step_below("loss", 0.5) == [math.inf]


# The whole, with real trainings.


@pytest.mark.slow
@pytest.mark.parametrize("command", ["least_squares", "logistic_regression"])
def test_quick_run_trains(command, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(TESTS.parent)
    assert main([command, "--quick", "--out", str(tmp_path)]) == 0, capfd.readouterr()
    found = json.loads((tmp_path / f"{command}.json").read_text())
    assert found["rows"] and not found["claims"]
    assert (tmp_path / f"{command}.png").is_file()

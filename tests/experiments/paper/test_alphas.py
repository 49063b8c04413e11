"""The commands over alpha: their runs, and the verdicts that follow."""

import csv
import json
import re
from pathlib import Path

import pytest

from experiments.paper import airbench, execution, nanogpt_alpha
from experiments.paper.__main__ import CHECKOUT, main
from experiments.paper.statements import STATEMENTS

STUDIES = {"airbench": airbench.STUDY, "nanogpt_alpha": nanogpt_alpha.STUDY}


@pytest.fixture
def trained(unchecked, monkeypatch, tmp_path):
    """Replace trainings: `value(recipe, alpha, seed)` is their last value, None a failure.

    Returns a function that sets `value` and returns the list of all runs that were asked for.
    """
    monkeypatch.chdir(tmp_path)
    for folder in CHECKOUT:
        Path(folder).mkdir()
    for study in STUDIES.values():
        for path in [*study.recipes, *study.full_recipes, *filter(None, [study.overlay])]:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text("")
    asked = []

    def replace(value):
        def execute(given, folder, metrics, jobs):
            curves = {}
            for run in given:
                asked.append(run)
                name, alpha, seed = re.fullmatch(r"(\w+)-alpha(.+)-seed(\d)", run.name).groups()
                last = value(name, float(alpha), int(seed))
                if last is not None:
                    curves[run.name] = {metrics[0]: [(0, 9.0), (4, last)]}
            return curves

        monkeypatch.setattr(execution, "execute", execute)
        return asked

    return replace


def contents(command):
    return json.loads(Path("out", f"{command}.json").read_text())


@pytest.mark.parametrize("command", STUDIES)
def test_every_recipe_is_trained_with_every_alpha_and_seed(command, trained, capfd):
    asked = trained(lambda name, alpha, seed: alpha + 0.01 * seed)
    assert main([command, "--out", "out"]) == 0
    alphas = STUDIES[command].alphas
    assert len(asked) == len(set(asked)) == 2 * 3 * len(alphas)
    first, last = asked[0], asked[-1]
    assert first.args[0] == f"--config={STUDIES[command].recipes[0]}"
    end = ("--model.init_args.optimizer.matrix.alpha=-0.1", "--seed_everything=0")
    assert first.args[-2:] == end
    assert last.args[-1] == "--seed_everything=2"
    assert any("--model.init_args.optimizer.matrix.alpha=1.0" in run.args for run in asked)
    small = "--config=configs/airbench/small.yaml"
    assert all((small in run.args) == (command == "airbench") for run in asked)
    with Path("out", f"{command}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(asked)
    assert Path("out", f"{command}.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r" 0\.3 +0\.3100 ± 0\.0100 +3$", capfd.readouterr().out, re.M)
    judged = {claim["id"] for claim in contents(command)["claims"]}
    assert judged == {s.id for s in STATEMENTS if s.command == command}


@pytest.mark.parametrize("command", STUDIES)
def test_full_trains_the_full_recipes_without_overlay(command, trained):
    asked = trained(lambda name, alpha, seed: 1.0)
    assert main([command, "--full", "--alphas", "1", "1", "0.5", "--seeds", "1", "--out", "o"]) == 0
    expected = [f"--config={path}" for path in STUDIES[command].full_recipes] * 2
    assert [run.args[0] for run in asked] == expected
    assert not any("small" in arg for run in asked for arg in run.args)


def values_by_recipe(study, value):
    """Last values by recipe, alpha and seed."""
    return {
        Path(path).stem: {
            alpha: {seed: value(Path(path).stem, alpha, seed) for seed in range(3)}
            for alpha in study.alphas
        }
        for path in study.recipes
    }


def test_verdicts_of_airbench():
    def verdicts(value):
        judged = airbench.judge_all(values_by_recipe(airbench.STUDY, value), "CIFAR-10", False)
        return [claim.verdict for claim in judged]

    def good(name, alpha, seed):
        return min(0.94, 0.8 + 0.3 * abs(alpha)) + 0.001 * seed

    # Equal, not ahead; alpha .1 not far above 0; alpha above 1 as good, below 0 not.
    assert verdicts(good) == ["confirmed", "refuted", "refuted", "confirmed", "refuted"]
    ahead = verdicts(lambda *key: good(*key) + 0.05 * (key[:2] == ("f_muon", 0.5)))
    assert ahead[:2] == ["refuted", "confirmed"]


def test_margin_of_airbench_is_smaller_with_the_whole_recipe():
    values = values_by_recipe(
        airbench.STUDY, lambda name, alpha, seed: 0.9 + 0.005 * (alpha == 0.5)
    )
    for full, verdict, margin in ((False, "confirmed", "0.01"), (True, "refuted", "0.002")):
        equal, *_ = airbench.judge_all(values, "CIFAR-10", full)
        assert equal.verdict == verdict
        assert f"± {margin};" in equal.rule


@pytest.mark.parametrize(
    ("slope", "expected"),
    [(-0.1, ["refuted", "refuted", "confirmed"]), (0.1, ["confirmed", "confirmed", "refuted"])],
)
def test_verdicts_of_nanogpt_alpha_by_both_readings(slope, expected):
    values = values_by_recipe(
        nanogpt_alpha.STUDY, lambda name, alpha, seed: 3.3 + slope * alpha + 0.001 * seed
    )
    judged = nanogpt_alpha.judge_all(values, "web text", False)
    assert [claim.verdict for claim in judged] == expected
    assert f"Above alpha 1 at the same lr: alpha -0.1 {-1.1 * slope:+.4f}" in judged[1].remark


def test_two_alphas_judge_one_reading(trained):
    trained(lambda name, alpha, seed: 3.3 + 0.001 * seed)
    assert main(["nanogpt_alpha", "--alphas", "0.7", "1.1", "--out", "out"]) == 0
    (claim,) = contents("nanogpt_alpha")["claims"]
    assert (claim["id"], claim["verdict"]) == ("nanogpt-negative-blend", "confirmed")


def test_other_alphas_give_no_verdicts(trained):
    trained(lambda name, alpha, seed: 1.0)
    main(["airbench", "--alphas", "0", "1", "--out", "out"])
    assert contents("airbench")["claims"] == []


def test_failed_runs_are_counted(trained, capfd):
    trained(lambda name, alpha, seed: None if alpha > 1 else 0.9)
    assert main(["airbench", "--out", "out"]) == 1
    assert "failed runs: 6; see out/runs/*/output.txt" in capfd.readouterr().out
    assert [row[1] for row in contents("airbench")["rows"] if row[2] == 0][-1] == 1
    trained(lambda name, alpha, seed: None)
    with pytest.raises(SystemExit):
        main(["airbench", "--out", "out"])
    assert "error: every run failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--alphas", "nan"], "--alphas: give finite numbers"),
        (["--seeds", "0"], "at least 1"),
        (["--model.optimizer.matrix.alpha=1"], "use --alphas"),
        (["--config", "a/x.yaml", "b/x.yaml"], "a/x.yaml, b/x.yaml have a file name in common"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line(args, message, trained, capfd):
    asked = trained(lambda *key: 1.0)
    with pytest.raises(SystemExit) as stop:
        main(["airbench", "--out", "out", *args])
    assert stop.value.code == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert asked == []

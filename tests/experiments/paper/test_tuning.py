"""Comparisons at the best lr (by the command nanogpt): their runs, and what is concluded."""

import csv
import dataclasses
import functools
import json
import math
import re
import signal
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from experiments.paper import nanogpt, tuning
from experiments.paper.__main__ import main
from experiments.paper.tuning import figure
from lit_fanions.cli import runner
from tests.conftest import TESTS, toy_recipe

INF = math.inf
SEED = "--seed_everything="
LR = "--model.init_args.optimizer.matrix.lr="


def recipe_file(path, lr):
    content = {"model": {"init_args": {"optimizer": {"matrix": {"lr": lr}}}}}
    Path(path).write_text(yaml.safe_dump(content))


@pytest.fixture
def trained(unchecked, monkeypatch, tmp_path):
    """Replace trainings: `loss(name, lr, seed)` is their last loss, None a failure.

    Returns a function that sets `loss` and returns the list of all runs that were asked for.
    """
    monkeypatch.chdir(tmp_path)
    asked = []

    def replace(loss):
        def execute(given, folder, metrics, jobs):
            curves = {}
            for run in given:
                asked.append(run)
                name, lr, seed = re.fullmatch(r"(\w+)-lr(.+)-seed(\d)", run.name).groups()
                last = loss(name, float(lr), int(seed))
                if last is not None:
                    curves[run.name] = {metrics[0]: [(0, 5.0), (4, last)]}
            return curves

        monkeypatch.setattr(tuning, "execute", execute)
        return asked

    recipe_file("a.yaml", 0.1)
    recipe_file("b.yaml", 1.0)
    return replace


def bowl(center):
    return lambda name, lr, seed: 1 + math.log2(lr / center) ** 2 + 0.01 * seed


def compare(*args, configs=("a.yaml",)):
    """Compare recipes on the grid .5, 1, 2 without refinements, unless others are given."""
    search = ["--factors", "0.5", "1", "2"] * ("--factors" not in args)
    search += ["--refinements", "0"] * ("--refinements" not in args)
    return main(["nanogpt", "--config", *configs, "--out", "out", *search, *args])


def refused(capfd, *args, configs=("a.yaml",)):
    with pytest.raises(SystemExit) as stop:
        compare(*args, configs=configs)
    assert stop.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    return line.partition("error: ")[2]


def names(asked):
    return [run.name for run in asked]


# The runs.


def test_three_lrs_then_more_seeds_at_the_best(trained, capfd):
    asked = trained(bowl(0.1))
    assert compare() == 0
    lrs = ["a-lr0.05-seed0", "a-lr0.1-seed0", "a-lr0.2-seed0"]
    assert names(asked) == [*lrs, "a-lr0.1-seed1", "a-lr0.1-seed2"]
    printed = capfd.readouterr().out
    assert re.search(
        r"^a +0\.1 +1\.0100 ± 0\.0100 +3  0\.05: 2\.0000  0\.1: 1\.0000", printed, re.M
    )
    assert "Seed 0 also chose the lr: a small bias" in printed
    assert "edge" not in printed


@pytest.mark.parametrize(("center", "last"), [(0.0125, "0.00625"), (0.8, "1.6")])
def test_range_of_lrs_is_extended_beyond_the_best(center, last, trained, capfd):
    asked = trained(bowl(center))
    assert compare("--seeds", "1") == 0
    assert len(asked) == 6
    assert names(asked)[-1] == f"a-lr{last}-seed0"
    assert "edge" not in capfd.readouterr().out
    assert json.loads(Path("out/nanogpt.json").read_text())["settings"]["best_lr"] == {"a": center}


def test_narrow_optimum_far_from_the_stated_lr_is_found(trained):
    def two_bowls(name, lr, seed):
        return min(bowl(0.1)("a", lr, seed) + 1, bowl(0.004)("a", lr, seed))

    asked = trained(two_bowls)
    factors = [f"{factor:g}" for factor in tuning.FACTORS]
    args = ["--factors", *factors, "--refinements", str(tuning.REFINEMENTS), "--seeds", "1"]
    assert compare(*args) == 0
    best = json.loads(Path("out/nanogpt.json").read_text())["settings"]["best_lr"]["a"]
    assert 0.004 / 1.1 < best < 0.004 * 1.1
    assert len(asked) == len(set(names(asked))) == len(factors) + 2 * tuning.REFINEMENTS


def test_only_the_variants_that_are_named_are_trained(trained, capfd):
    asked = trained(bowl(1.0))
    assert compare("--only", "b", configs=("a.yaml", "b.yaml")) == 0
    assert {run.name[0] for run in asked} == {"b"}
    assert "no variant c; give some of a, b" in refused(
        capfd, "--only", "c", configs=("a.yaml", "b.yaml")
    )


def test_variants_are_compared_at_equal_seeds(trained, capfd, monkeypatch):
    def loss(name, lr, seed):
        stated, behind = {"a": (0.1, 0.0), "b": (1.0, 0.1 + 0.02 * seed)}[name]
        return bowl(stated)(name, lr, seed) + behind

    trained(loss)
    pairs = dataclasses.replace(nanogpt.COMPARISON, beside={"b": "a", "c": "a"})
    monkeypatch.setattr(nanogpt, "run", functools.partial(tuning.run, comparison=pairs))
    assert compare(configs=("a.yaml", "b.yaml")) == 0
    assert re.search(r"^b +a +\+0\.1200 ± 0\.0497 \(95 %\)", capfd.readouterr().out, re.M)


def test_some_of_the_default_recipes_test_some_claims(trained):
    trained(bowl(1.0))
    Path("configs/nanogpt").mkdir(parents=True)
    recipes = [f"configs/nanogpt/{name}_cpu.yaml" for name in ("muon", "f_muon", "s_muon")]
    for path in recipes:
        recipe_file(path, 1.0)
    for configs, claims in ((recipes, {"final-match"}), (recipes[:2], set()), (["b.yaml"], set())):
        assert compare(configs=configs) == 0
        outcome = json.loads(Path("out/nanogpt.json").read_text())
        assert {claim["id"] for claim in outcome["claims"]} == claims


def test_diverged_training_is_never_the_best(trained):
    trained(lambda name, lr, seed: math.nan if lr < 0.1 else lr)
    compare("--seeds", "1")
    assert json.loads(Path("out/nanogpt.json").read_text())["settings"]["best_lr"] == {"a": 0.1}


def test_negative_refinements_are_refused(capfd, trained):
    assert refused(capfd, "--refinements", "-1") == "--refinements: give 0 or more, not -1"


def test_best_at_the_edge_is_marked(trained, capfd):
    asked = trained(lambda name, lr, seed: 1 / lr)
    assert compare("--seeds", "1", "--factors", "1", "2", "2") == 0
    assert names(asked) == [f"a-lr{0.1 * 2**n:g}-seed0" for n in range(8)]
    printed = capfd.readouterr().out
    assert "12.8 (at the edge)" in printed
    assert "at the edge: no lr beyond it was tried with success" in printed
    assert json.loads(Path("out/nanogpt.json").read_text())["settings"]["best_lr_at_the_edge"] == [
        "a"
    ]


def test_failed_runs_are_tried_and_counted_once(trained, capfd):
    asked = trained(lambda name, lr, seed: None if name == "b" and lr > 1 else lr)
    assert compare("--seeds", "1", configs=["a.yaml", "b.yaml"]) == 1
    assert len(names(asked)) == len(set(names(asked)))
    assert "b-lr2-seed0" in names(asked)
    printed = capfd.readouterr().out
    assert "\nfailed runs: 1; see out/runs/*/output.txt" in printed


def test_best_beside_a_failure_is_at_the_edge(trained, capfd):
    trained(lambda name, lr, seed: None if lr > 0.1 else 1 / lr)
    assert compare("--seeds", "1") == 1
    assert "0.1 (at the edge)" in capfd.readouterr().out


def test_failure_of_all_runs_is_refused(trained, capfd):
    asked = trained(lambda name, lr, seed: None)
    assert refused(capfd) == "every run failed: see out/runs/*/output.txt"
    assert len(asked) == 3


def test_seed_and_lr_come_after_the_users_options(trained):
    asked = trained(bowl(0.1))
    compare("--seeds", "1", "--trainer.max_steps", "3", "--model.init_args.optimizer.matrix={}")
    given = ("--trainer.max_steps", "3", "--model.init_args.optimizer.matrix={}")
    assert asked[0].args == ("--config=a.yaml", *given, f"{SEED}0", f"{LR}0.05")


def test_configs_of_several_options_add_up(trained):
    asked = trained(bowl(0.1))
    compare("--seeds", "1", "--config", "b.yaml")
    assert {run.args[0] for run in asked} == {"--config=a.yaml", "--config=b.yaml"}


# Diverged runs.


def test_diverged_runs_are_counted_and_drawn(trained, capfd):
    trained(lambda name, lr, seed: INF if lr > 0.1 or (name, seed) == ("b", 1) else 1 / lr)
    recipe_file("b.yaml", 0.05)
    recipe_file("c.yaml", 100.0)  # none of its runs ends well
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(configs=["a.yaml", "b.yaml", "c.yaml"]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"^a +0\.1 +10\.0000 ± 0\.0000", printed, re.M)
    assert re.search(r"^b +0\.1 +diverged: 1 of 3 +3", printed, re.M)
    c = r"^c +0\.78125 \(at the edge\) +diverged: 3 of 3 +3 .* 200: inf$"
    assert re.search(c, printed, re.M)
    assert printed.splitlines()[4].startswith("a ")  # the lowest loss
    contents = Path("out/nanogpt.json").read_text()
    json.loads(contents, parse_constant=pytest.fail)
    assert "null" in contents
    with Path("out/nanogpt.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["val/loss"] for row in rows if row["recipe"] == "c"} == {"5.0", "inf"}
    assert Path("out/nanogpt.png").read_bytes().startswith(b"\x89PNG")


# Bad input.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--factors", "nan", "1"], "--factors: give positive numbers, not nan, 1"),
        (["--factors", "inf", "1"], "--factors: give positive numbers, not inf, 1"),
        (["--factors", "0", "1"], "--factors: give positive numbers, not 0, 1"),
        (["--factors", "1", "1"], "--factors: give two or more different ones, not 1, 1"),
        (["--factors", "1"], "--factors: give two or more different ones, not 1"),
        (["--config", "."], "--config: cannot read .: Is a directory"),
        (["--config", "none.yaml"], "--config: cannot read none.yaml: No such file or directory"),
        (["--config", "zero.yaml"], "--config: zero.yaml states the lr 0: it must be positive"),
        (
            ["--config", "text.yaml"],
            "--config: text.yaml states no model.init_args.optimizer.matrix.lr",
        ),
        (
            ["--config", "other/a.yaml"],
            "--config: a.yaml, other/a.yaml have a file name in common: rename one, or leave it "
            "out",
        ),
        (["--out", "text.yaml"], "argument --out: text.yaml cannot be a folder: File exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line(args, message, trained, capfd):
    asked = trained(bowl(0.1))
    Path("other").mkdir()
    recipe_file("other/a.yaml", 1.0)
    recipe_file("zero.yaml", 0)
    Path("text.yaml").write_text("text")
    assert refused(capfd, *args) == message
    assert asked == []


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (["--seed_everything", "3"], "use --seeds N"),
        (["--model.optimizer.matrix.lr=1"], "use --factors for multiples of the recipe's lr"),
        (["--trainer.logger", "false"], "the logs are kept below --out"),
        (["--ckpt_path", "last.ckpt"], "all start from scratch"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_reserved_options_are_refused_with_advice(args, advice, trained, capfd):
    asked = trained(bowl(0.1))
    message = refused(capfd, *args)
    assert message.startswith(args[0].partition("=")[0])
    assert message.endswith(f": {advice}")
    assert asked == []


# With real trainings.


def test_real_trainings_are_read_and_not_repeated(project, monkeypatch, capfd):
    Path("toy_lm.py").write_text(
        "from torch.nn.functional import cross_entropy\n"
        "from toy_zoo import ToyNet\n\n"
        "class ToyLM(ToyNet):\n"
        "    def validation_step(self, batch, index):\n"
        "        self.log('val/loss', cross_entropy(self.net(batch[0]), batch[1]))\n"
    )
    recipe = toy_recipe()
    recipe["model"]["class_path"] = "toy_lm.ToyLM"
    del recipe["test_after_fit"]
    Path("toy.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    monkeypatch.setattr(tuning, "EXTENSIONS", 0)
    args = ["--factors", "1", "2", "--seeds", "1", "--jobs", "2", "--trainer.max_epochs", "3"]
    assert compare(*args, configs=["toy.yaml"]) == 0, capfd.readouterr()
    printed = capfd.readouterr()
    assert "[2/2] toy-lr0." in printed.out
    assert not printed.err
    rows = json.loads(Path("out/nanogpt.json").read_text())["rows"]
    keys = [("toy", lr, 0, step) for lr in (0.02, 0.04) for step in (7, 15, 23)]
    assert [tuple(row[:-1]) for row in rows] == keys
    assert [row[-1] for row in rows[:3]] != [row[-1] for row in rows[3:]]
    used = yaml.safe_load(Path("out/runs/toy-lr0.04-seed0/config.yaml").read_text())
    assert used["seed_everything"] == 0
    assert used["model"]["init_args"]["optimizer"]["matrix"]["lr"] == 0.04
    # Again: nothing is trained. With another recipe: refused.
    monkeypatch.setattr(runner, "_command", lambda run, folder: pytest.fail("trained again"))
    assert compare(*args, configs=["toy.yaml"]) == 0
    recipe["model"]["init_args"]["width"] = 9
    Path("toy.yaml").write_text(yaml.safe_dump(recipe))
    line = refused(capfd, *args, configs=["toy.yaml"])
    assert line.startswith("out/runs/toy-lr0.02-seed0 holds a run with other settings")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_the_command(
    number, status, hears_signals, unchecked, monkeypatch, tmp_path, capfd
):
    code = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    monkeypatch.setattr(runner, "_command", lambda run, folder: [sys.executable, "-c", code])
    monkeypatch.chdir(tmp_path)
    recipe_file("a.yaml", 0.1)
    assert compare() == status
    assert capfd.readouterr().err.startswith("stopped; the same command continues")


def test_mean_curve_has_only_the_steps_of_all_curves():
    curves = [[(0, 1.0), (2, 4.0), (4, 5.0)], [(0, 3.0), (1, 9.0), (4, math.inf)]]
    assert figure.mean_curve(curves) == ([0, 4], [2.0, math.inf], [2**0.5, 0.0])
    assert figure.mean_curve(curves[:1]) == ([0, 2, 4], [1.0, 4.0, 5.0], [0.0, 0.0, 0.0])
    assert figure.mean_curve([[(0, 1.0)], [(1, 1.0)]]) == ([], [], [])

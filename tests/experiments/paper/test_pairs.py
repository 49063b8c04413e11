"""The command pairs: its variants, differences and verdicts."""

import json
from pathlib import Path

import pytest

from experiments.paper import execution, pairs
from experiments.paper.__main__ import main
from experiments.paper.repetitions import check
from lit_fanions.cli.console import Refused

PATHS = {name: Path(f"configs/airbench/{name}.yaml") for name in ("muon", "f_muon", "s_muon")}
PATHS["quickstart"] = Path("configs/quickstart.yaml")
GAIN = {"muon": 0.8, "f_muon": 0.8, "muon-random-spectrum": 0.75, "muon-sharpness-aware": 0.81}
GAIN |= {"s_muon": 0.79, "nsgd": 0.7, "f_muon-alpha-.1": 0.78}


@pytest.fixture
def runs(monkeypatch):
    """Replace trainings by the accuracies of GAIN, a little more with each seed."""
    asked = []

    def execute(given, folder, metrics, jobs):
        asked.extend(given)
        names = {run.name: run.name.rpartition("-seed") for run in asked}
        return {
            run: {metrics[0]: [(0, 0.1), (4, GAIN[name] + 0.001 * int(seed))]}
            for run, (name, _, seed) in names.items()
        }

    monkeypatch.setattr(execution, "execute", execute)
    return asked


def test_every_variant_is_a_recipe_that_fit_takes():
    variants = pairs.select(PATHS, None)
    assert variants.keys() == pairs.VARIANTS.keys()
    for variant in variants.values():
        overlay = [pairs.STUDY.overlay] if variant.recipe != "quickstart" else []
        check(pairs.arguments(variant, PATHS, overlay, []))


def test_differences_are_at_equal_seeds_and_claims_are_judged(runs, tmp_path, capfd):
    assert main(["pairs", "--seeds", "3", "--out", str(tmp_path)]) == 0
    assert len(runs) == 3 * len(GAIN)
    found = json.loads((tmp_path / "pairs.json").read_text())
    means, differences = (table["rows"] for table in found["tables"])
    assert ["nsgd", "0.7010 ± 0.0010", 3] in means
    assert ["muon-random-spectrum", "muon", "-0.0500 ± 0.0000 (95 %)"] in differences
    verdicts = {claim["id"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts == {
        "airbench-equal": "confirmed",
        "draft-ahead": "refuted",
        "alpha-0.1": "confirmed",
    }
    assert all("--config=configs/airbench/small.yaml" in run.args for run in runs)


def test_full_trains_the_recipes_without_the_overlay(runs, tmp_path, capfd):
    args = ["pairs", "--full", "--only", "muon", "f_muon", "--seeds", "2"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    assert [run.args[:1] for run in runs[:2]] == [
        ("--config=configs/airbench/muon.yaml",),
        ("--config=configs/airbench/f_muon.yaml",),
    ]
    assert not any("small.yaml" in arg for run in runs for arg in run.args)


def test_unknown_names_are_refused():
    with pytest.raises(Refused, match="no variant neon; give some of muon"):
        pairs.select(PATHS, ["neon"])
    with pytest.raises(Refused, match="adamw has no variants; give some of f_muon"):
        pairs.select({"adamw": Path("adamw.yaml")}, None)

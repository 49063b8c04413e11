"""Verdicts on the article's constants, and on others in their place."""

import csv
import json
import math

import pytest
import torch

from experiments.paper.__main__ import main
from experiments.paper.bounds import article, claims, gaussian, smoothness
from experiments.paper.bounds.article import ALGORITHMS, PRINTED, Printed
from experiments.paper.bounds.smoothness import EXACT, FITTED, FORMULA, GAMMA
from experiments.paper.statements import STATEMENTS


def values(size=50, problems=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return smoothness.evaluate(*smoothness.draw_problems(problems, size, generator))


def test_quick_run_saves_the_values(tmp_path, capfd):
    assert main(["bounds", "--quick", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "L on 10 × 10 least squares" in printed
    assert json.loads((tmp_path / "bounds.json").read_text())["claims"] == []
    rows = list(csv.DictReader((tmp_path / "bounds.csv").open()))
    exact = [float(r["value"]) for r in rows if (r["of"], r["quantity"]) == ("NSGD", "L, exact")]
    assert len(exact) == 2
    assert all(0 < value < 1 for value in exact)
    assert (tmp_path / "bounds.png").stat().st_size > 10_000


def test_run_judges_every_claim_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.paper.bounds.SIZES", (8, 16))
    args = ["--problems", "2", "--samples", "2", "--out", str(tmp_path)]
    assert main(["bounds", *args]) == 0
    judged = json.loads((tmp_path / "bounds.json").read_text())["claims"]
    assert {claim["id"] for claim in judged} == {s.id for s in STATEMENTS if s.command == "bounds"}


def test_ways_to_compute_smoothness_are_related():
    found = values()
    for own in found.values():
        assert (own[EXACT] <= own[GAMMA]).all()
    muon, neon = found["Muon"], found["Neon"]
    torch.testing.assert_close(muon[FITTED], muon[FORMULA] * math.sqrt(50))
    torch.testing.assert_close(neon[EXACT], neon[FORMULA] / 50)
    torch.testing.assert_close(neon[EXACT], found["NSGD"][EXACT])


def test_printed_smoothness_is_refuted():
    claim = claims.judge_smoothness(values(), 4)
    assert claim.verdict == "refuted"
    assert "agree with the formulas: NSGD, Neon; " in claim.remark
    assert "with the formulas with 2/sqrt(n): NSGD, Muon, Neon; " in claim.remark
    assert "with the exact L: none." in claim.remark


def test_printed_step_sizes_are_refuted():
    claim = claims.judge_step_sizes()
    assert claim.verdict == "refuted"
    assert "1 / (eps L) for NSGD, Muon, Neon; the printed lr is eps / L for Neon" in claim.found
    assert "one F(0) - F* of 249.6 to 249.9 explains all three" in claim.found


def replace(monkeypatch, change):
    """Replace the printed numbers by what `change(name, numbers)` returns."""
    printed = {name: change(name, numbers) for name, numbers in PRINTED.items()}
    monkeypatch.setattr(article, "PRINTED", printed)


def test_step_sizes_that_follow_from_the_formulas_are_confirmed(monkeypatch):
    def right(name, numbers):
        precision = ALGORITHMS[name].precision(50)
        steps = math.ceil(numbers.smoothness * 250 / precision**2)
        return Printed(numbers.smoothness, float(f"{precision / numbers.smoothness:.3g}"), steps)

    replace(monkeypatch, right)
    assert claims.judge_step_sizes().verdict == "confirmed"


def test_iterations_of_different_gaps_are_refuted(monkeypatch):
    replace(monkeypatch, lambda name, p: p._replace(steps=p.steps * (1 + (name == "Muon"))))
    claim = claims.judge_step_sizes()
    assert claim.verdict == "refuted"
    assert "no single F(0) - F*" in claim.found


def test_exact_formulas_of_smoothness_are_confirmed(monkeypatch):
    found = values()
    for own in found.values():
        own[FORMULA] = own[EXACT]
    replace(monkeypatch, lambda name, p: p._replace(smoothness=found[name][EXACT].mean().item()))
    assert claims.judge_smoothness(found, 4).verdict == "confirmed"


@pytest.fixture(scope="module")
def matrices():
    shapes = [(10, 10), (400, 400), (400, 100), (100, 400)]
    return gaussian.sample_norms(shapes, 4, torch.Generator().manual_seed(0))


def test_only_proportionality_of_gaussian_norms_is_confirmed(matrices):
    formulas, squares, duality, proportionality = claims.judge_asymptotics(matrices)
    assert {c.verdict for c in (formulas, squares, duality)} == {"refuted"}
    assert proportionality.verdict == "confirmed"
    assert formulas.remark.startswith("Right: Frobenius, spectral. ")
    assert squares.remark.startswith("Right: Frobenius / spectral. ")
    assert "within 3% of 1" in formulas.rule


def test_formulas_of_gaussian_norms_that_follow_the_law_are_confirmed(matrices, monkeypatch):
    law = {"nuclear": lambda m, n: gaussian.exact_asymptotic((m, n), "nuclear")}
    monkeypatch.setattr(gaussian, "FORMULAS", gaussian.FORMULAS | law)
    assert claims.judge_asymptotics(matrices)[0].verdict == "confirmed"


@pytest.mark.parametrize(
    ("first", "last", "converges"),
    [
        ([0.9, 0.9], [0.98, 0.98], True),
        ([0.99, 0.99], [0.98, 0.98], False),  # moves away
        ([0.96, 1.02], [0.97, 0.99], True),  # moves away by less than the noise
        ([0.8, 0.8], [0.85, 0.85], False),  # is still far away
    ],
)
def test_ratios_converge_to_one(first, last, converges):
    assert gaussian.converges_to_one(first, last) is converges

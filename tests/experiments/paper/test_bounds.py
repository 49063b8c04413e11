"""The article's constants: what the command makes of them, and of others."""

import csv
import json
import math

import pytest
import torch

from experiments.paper import bounds
from experiments.paper.__main__ import main
from experiments.paper.bounds import Printed

pytest.importorskip("matplotlib")


def values(size=50, problems=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return bounds._values(*bounds._problems(problems, size, generator))


def test_quick(tmp_path, capfd):
    assert main(["bounds", "--quick", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "L on 10 × 10 least squares" in printed
    assert json.loads((tmp_path / "bounds.json").read_text())["claims"] == []
    rows = list(csv.DictReader((tmp_path / "bounds.csv").open()))
    exact = [float(r["value"]) for r in rows if (r["of"], r["quantity"]) == ("NSGD", "L, exact")]
    assert len(exact) == 2
    assert all(0 < value < 1 for value in exact)
    assert (tmp_path / "bounds.png").stat().st_size > 10_000


def test_sources_of_smoothness():
    found = values()
    for of in found.values():
        assert (of[bounds.EXACT] <= of[bounds.GAMMA]).all()
    muon, neon = found["Muon"], found["Neon"]
    torch.testing.assert_close(muon[bounds.FITTED], muon[bounds.FORMULA] * math.sqrt(50))
    torch.testing.assert_close(neon[bounds.EXACT], neon[bounds.FORMULA] / 50)
    torch.testing.assert_close(neon[bounds.EXACT], found["NSGD"][bounds.EXACT])


def test_printed_numbers_do_not_follow():
    smoothness = bounds._smoothness_claim(values(), 4)
    assert smoothness.verdict == "refuted"
    assert "of the formulas NSGD, Neon, of those with 2/sqrt(n) NSGD, Muon, Neon" in smoothness.why
    assert "of the exact L none" in smoothness.why
    steps = bounds._step_sizes_claim()
    assert steps.verdict == "refuted"
    assert "1 / (eps L) for NSGD, Muon, Neon; the printed lr is eps / L for Neon" in steps.found
    assert "one F(0) - F* of 249.6 to 249.9 explains all three" in steps.found


def replace(monkeypatch, change):
    printed = {name: change(name, numbers) for name, numbers in bounds.PRINTED.items()}
    monkeypatch.setattr(bounds, "PRINTED", printed)


def test_numbers_that_would_follow(monkeypatch):
    def right(name, numbers):
        precision = bounds.ALGORITHMS[name].precision(50)
        smoothness = numbers.smoothness
        steps = math.ceil(smoothness * 250 / precision**2)
        return Printed(smoothness, float(f"{precision / smoothness:.3g}"), steps)

    replace(monkeypatch, right)
    assert bounds._step_sizes_claim().verdict == "confirmed"
    replace(monkeypatch, lambda name, p: p._replace(steps=p.steps * (1 + (name == "Muon"))))
    claim = bounds._step_sizes_claim()
    assert claim.verdict == "refuted"
    assert "no single F(0) - F*" in claim.found


def test_formulas_that_would_be_exact(monkeypatch):
    found = values()
    for of in found.values():
        of[bounds.FORMULA] = of[bounds.EXACT]
    replace(
        monkeypatch,
        lambda name, p: p._replace(smoothness=found[name][bounds.EXACT].mean().item()),
    )
    assert bounds._smoothness_claim(found, 4).verdict == "confirmed"


def test_claims_about_gaussian_matrices(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 10), (400, 400), (400, 100), (100, 400)]
    gaussian = {shape: bounds._norms(shape, 4, generator) for shape in shapes}
    norms, squares, duals, proportional = bounds._asymptotics_claims(gaussian)
    assert [c.verdict for c in (norms, squares, duals, proportional)] == [
        *["refuted"] * 3,
        "confirmed",
    ]
    assert "Right: Frobenius, spectral." in norms.why
    assert "Right: Frobenius / spectral." in squares.why
    right = {
        **bounds.FORMULAS,
        "nuclear": lambda m, n: bounds._law((m, n), "nuclear"),
    }
    monkeypatch.setattr(bounds, "FORMULAS", right)
    assert bounds._asymptotics_claims(gaussian)[0].verdict == "confirmed"


@pytest.mark.parametrize(
    ("first", "last", "holds"),
    [
        ([0.9, 0.9], [0.98, 0.98], True),
        ([0.99, 0.99], [0.98, 0.98], False),  # goes the wrong way
        ([0.96, 1.02], [0.97, 0.99], True),  # but for noise
        ([0.8, 0.8], [0.85, 0.85], False),
    ],
)
def test_what_counts_as_an_asymptotic(first, last, holds):
    assert bounds._converges(first, last) is holds

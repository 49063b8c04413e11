"""Table 1: what the command says follows from the steps, also where they are wrong."""

import csv
import json

import pytest

from experiments.paper import norms
from experiments.paper.__main__ import main
from lit_fanions import norms as library

pytest.importorskip("matplotlib")

METHODS = {method.name: method for method in norms.METHODS}


def test_quick(tmp_path, capfd):
    assert main(["norms", "--quick", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    for method in norms.METHODS:
        assert printed.count(f"\n{method.name} ") == 2
    assert json.loads((tmp_path / "norms.json").read_text())["claims"] == []
    rows = list(csv.DictReader((tmp_path / "norms.csv").open()))
    assert len(rows) == len(norms.METHODS) * len(norms.QUICK_SHAPES) * 2 * 4
    for row in rows:
        value = float(row["value"])
        if row["quantity"] == "fast":
            assert 0.97 <= value <= 1 + 1e-6
        else:
            assert abs(value) < (1e-6 if row["method"].startswith("S-") else norms.EXACT)


@pytest.mark.parametrize(
    ("norm", "on_rows", "on_diagonals"),
    [
        (library.Spectral(), "NSGD", "SignSGD"),
        (library.Nuclear(), "NSGD", "Gauss-Southwell"),
        (library.Frobenius(), "NSGD", "NSGD"),
        (library.KyFanDual(2), "NSGD", "–"),
        (library.Blend(library.Spectral(), 0.5, "sign"), "a mixture", "SignSGD"),
    ],
    ids=repr,
)
def test_analogues(norm, on_rows, on_diagonals):
    assert norms._analogues(norm) == (on_rows, on_diagonals)


def lemmas(method):
    found = {method.name: {(4, 3): norms._check(method, (4, 3), 2)}}
    return norms._steps_claim("lemmas", found, "", 2)


def test_momentum_counts():
    claim = lemmas(METHODS["momentum NSGD"])
    assert claim.verdict == "confirmed"


@pytest.mark.parametrize(
    "wrong", [library.Nuclear(), library.KyFanDual(2), library.Blend(library.Spectral(), 0.9)]
)
def test_steps_of_another_norm_refute(wrong):
    claim = lemmas(METHODS["Muon"]._replace(norm=wrong))
    assert claim.verdict == "refuted"


def test_other_claims(monkeypatch):
    claims = [norms._ky_fan_dual(3), norms._ends(3), norms._lemma_9(3), norms._minima(3)]
    assert [claim.verdict for claim in claims] == ["confirmed"] * 4
    # Another norm in the place of the Ky Fan norm, and of the spectral one.
    monkeypatch.setattr(library, "KyFan", lambda k: library.KyFanDual(k))
    assert norms._ky_fan_dual(3).verdict == "refuted"
    monkeypatch.setattr(norms, "_SPECTRAL", library.Frobenius())
    assert norms._ends(3).verdict == "refuted"


def test_split_that_is_none_refutes(monkeypatch):
    monkeypatch.setattr(library.Blend, "split", lambda self, x: 0.5 * x)
    assert norms._lemma_9(3).verdict == "refuted"
    assert norms._minima(3).verdict == "refuted"

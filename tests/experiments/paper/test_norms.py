"""Table 1: verdicts follow from the steps, also where these are wrong."""

import csv
import json

import pytest

from experiments.paper import norms
from experiments.paper.__main__ import main
from experiments.paper.norms import claims, methods, steps
from experiments.paper.statements import STATEMENTS
from lit_fanions import norms as library

METHODS = {method.name: method for method in methods.METHODS}


def test_quick_run_saves_the_errors_of_every_method(tmp_path, capfd, recwarn):
    assert main(["norms", "--quick", "--out", str(tmp_path)]) == 0
    assert not [w for w in recwarn if "no effect" in str(w.message)]
    printed = capfd.readouterr().out
    for method in methods.METHODS:
        assert printed.count(f"\n{method.name} ") == 2
    assert json.loads((tmp_path / "norms.json").read_text())["claims"] == []
    rows = list(csv.DictReader((tmp_path / "norms.csv").open()))
    assert len(rows) == len(methods.METHODS) * len(norms.QUICK_SHAPES) * 2 * 4
    for row in rows:
        value = float(row["value"])
        if row["quantity"] == "fast":
            assert 0.97 <= value <= 1 + 1e-6
        else:
            assert abs(value) < (1e-6 if row["method"].startswith("S-") else claims.EXACT)


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
def test_method_for_vectors_is_found(norm, on_rows, on_diagonals):
    assert methods.vector_methods(norm) == (on_rows, on_diagonals)


def judge_method(method):
    checks = {method.name: {(4, 3): steps.check_method(method, (4, 3), 2)}}
    return claims.judge_steps("lemmas", checks, "", 2)


def test_steps_follow_the_momentum():
    claim = judge_method(METHODS["momentum NSGD"])
    assert claim.verdict == "confirmed"
    assert claim.rule == "Confirmed if no error is above 1e-10."


@pytest.mark.parametrize(
    "wrong", [library.Nuclear(), library.KyFanDual(2), library.Blend(library.Spectral(), 0.9)]
)
def test_steps_of_another_norm_refute(wrong):
    claim = judge_method(METHODS["Muon"]._replace(norm=wrong))
    assert claim.verdict == "refuted"


def test_run_judges_every_claim_of_the_command(tmp_path):
    assert main(["norms", "--seeds", "1", "--out", str(tmp_path)]) == 0
    judged = json.loads((tmp_path / "norms.json").read_text())["claims"]
    assert {claim["id"] for claim in judged} == {s.id for s in STATEMENTS if s.command == "norms"}
    assert {claim["verdict"] for claim in judged} == {"confirmed"}


def test_another_norm_in_place_of_the_ky_fan_norm_refutes(monkeypatch):
    monkeypatch.setattr(library, "KyFan", lambda k: library.KyFanDual(k))
    assert claims.judge_ky_fan_dual(3).verdict == "refuted"


def test_another_norm_in_place_of_the_spectral_norm_refutes(monkeypatch):
    monkeypatch.setattr(methods, "SPECTRAL", library.Frobenius())
    assert claims.judge_ends(3).verdict == "refuted"


def test_wrong_split_of_a_blend_refutes(monkeypatch):
    monkeypatch.setattr(library.Blend, "split", lambda self, x: 0.5 * x)
    assert claims.judge_lemma_9(3).verdict == "refuted"
    assert claims.judge_minima(3).verdict == "refuted"

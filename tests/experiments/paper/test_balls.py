"""Figures 3 to 5: what is drawn is what the norms say."""

import csv
import json

import pytest
import torch

from experiments.paper.__main__ import main
from experiments.paper.balls import claims, geometry
from experiments.paper.statements import STATEMENTS
from lit_fanions import norms

POINTS = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KY_FAN = geometry.polyhedron(norms.KyFan(2), norms.KyFanDual(2), POINTS)
DUAL = geometry.polyhedron(norms.KyFanDual(2), norms.KyFan(2), POINTS)


def rows(points):
    return {tuple(row) for row in points.round(decimals=6).tolist()}


def test_ky_fan_2_ball_is_a_rhombic_dodecahedron():
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    assert rows(KY_FAN.vertices) == rows(torch.cat([axes, signs]))
    assert [len(face) for face in KY_FAN.faces] == [4] * 12


def test_dual_of_ky_fan_2_ball_is_a_cuboctahedron():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
    assert rows(DUAL.vertices) == rows(signs[(signs == 0).sum(-1) == 1])
    assert sorted(len(face) for face in DUAL.faces) == [3] * 8 + [4] * 6


@pytest.mark.parametrize(("solid", "norm"), [(KY_FAN, norms.KyFan(2)), (DUAL, norms.KyFanDual(2))])
def test_faces_lie_on_the_ball_and_close_it(solid, norm):
    for face in solid.faces:
        # The middles of edges too: the order is one around the face, not across it.
        middles = (face + face.roll(1, 0)) / 2
        ones = torch.ones(len(face), dtype=torch.float64)
        torch.testing.assert_close(geometry.diagonal_norm(norm, face), ones)
        torch.testing.assert_close(geometry.diagonal_norm(norm, middles), ones)
    edges = sum(len(face) for face in solid.faces) // 2
    assert len(solid.vertices) - edges + len(solid.faces) == 2


def test_quick_run_saves_points_of_the_balls(tmp_path, capfd):
    assert main(["balls", "--quick", "--out", str(tmp_path)]) == 0
    assert "dual of F2  1                        1              0.7071" in capfd.readouterr().out
    assert (tmp_path / "balls.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "balls.json").read_text())["claims"] == []
    found = list(csv.DictReader((tmp_path / "balls.csv").open()))
    for row in found:
        if row["ball"] == "dual of F*":
            norm = norms.Blend(norms.Spectral(), float(row["alpha"]))
            point = torch.tensor([float(row["x"]), float(row["y"])], dtype=torch.float64)
            assert geometry.diagonal_norm(norm, point).item() == pytest.approx(1)
    assert {row["figure"] for row in found} == {"3", "4", "5"}


def test_run_judges_every_claim_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.paper.balls.DIRECTIONS", 96)
    monkeypatch.setattr("experiments.paper.balls.SAMPLES", 300)
    assert main(["balls", "--out", str(tmp_path)]) == 0
    judged = json.loads((tmp_path / "balls.json").read_text())["claims"]
    assert {claim["id"] for claim in judged} == {s.id for s in STATEMENTS if s.command == "balls"}


CIRCLE = geometry.circle_of_directions(96)


def test_printed_sum_of_balls_is_refuted_until_the_balls_are_swapped(monkeypatch):
    drawn = geometry.ball_outlines(CIRCLE)
    assert claims.judge_blend_balls(drawn, CIRCLE).verdict == "refuted"
    swapped = dict(zip(geometry.DUALS, reversed(geometry.DUALS.values()), strict=True))
    monkeypatch.setattr(geometry, "DUALS", swapped)
    drawn = geometry.ball_outlines(CIRCLE)
    assert claims.judge_blend_balls(drawn, CIRCLE).verdict == "confirmed"


def test_printed_ky_fan_balls_are_refuted_by_the_radius():
    claim = claims.judge_ky_fan_balls(POINTS)
    assert claim.verdict == "refuted"
    assert "of the three l1-balls (of two coordinates each) 100.0%" in claim.found
    assert "of radius 2 100.0%" in claim.found


def test_alpha_inside_the_unit_interval_has_a_ball(monkeypatch):
    assert claims.judge_outside(CIRCLE).verdict == "confirmed"
    monkeypatch.setattr(geometry, "OUTSIDE", (0.2, 1.1))
    assert claims.judge_outside(CIRCLE).verdict == "refuted"

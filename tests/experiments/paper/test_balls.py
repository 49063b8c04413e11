"""Figures 3 to 5: what is drawn is what the norms say."""

import csv
import json

import pytest
import torch

from experiments.paper import balls
from experiments.paper.__main__ import main
from lit_fanions import norms

pytest.importorskip("matplotlib")

POINTS = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KY_FAN = balls.polyhedron(norms.KyFan(2), norms.KyFanDual(2), POINTS)
DUAL = balls.polyhedron(norms.KyFanDual(2), norms.KyFan(2), POINTS)


def rows(points):
    return {tuple(row) for row in points.round(decimals=6).tolist()}


def test_ky_fan_2_ball_is_a_rhombic_dodecahedron():
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    assert rows(KY_FAN.vertices) == rows(torch.cat([axes, signs]))
    assert [len(face) for face in KY_FAN.faces] == [4] * 12


def test_its_dual_is_a_cuboctahedron():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
    assert rows(DUAL.vertices) == rows(signs[(signs == 0).sum(-1) == 1])
    assert sorted(len(face) for face in DUAL.faces) == [3] * 8 + [4] * 6


@pytest.mark.parametrize(("solid", "norm"), [(KY_FAN, norms.KyFan(2)), (DUAL, norms.KyFanDual(2))])
def test_faces_lie_on_the_ball_and_close_it(solid, norm):
    for face in solid.faces:
        # The middles of edges too: the order is one around the face, not across it.
        middles = (face + face.roll(1, 0)) / 2
        ones = torch.ones(len(face), dtype=torch.float64)
        torch.testing.assert_close(balls.value(norm, face), ones)
        torch.testing.assert_close(balls.value(norm, middles), ones)
    edges = sum(len(face) for face in solid.faces) // 2
    assert len(solid.vertices) - edges + len(solid.faces) == 2


def test_quick(tmp_path, capfd):
    assert main(["balls", "--quick", "--out", str(tmp_path)]) == 0
    assert "dual of F2  1                        1              0.7071" in capfd.readouterr().out
    assert (tmp_path / "balls.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "balls.json").read_text())["claims"] == []
    found = list(csv.DictReader((tmp_path / "balls.csv").open()))
    for row in found:
        if row["ball"] == "dual of F*":
            norm = norms.Blend(norms.Spectral(), float(row["alpha"]))
            point = torch.tensor([float(row["x"]), float(row["y"])], dtype=torch.float64)
            assert balls.value(norm, point).item() == pytest.approx(1)
    assert {row["figure"] for row in found} == {"3", "4", "5"}


def test_claims(monkeypatch):
    circle = balls._circle(96)

    def curves(swapped):
        found = {}
        parts = [*balls.DUALS.values()]
        for dual, norm in zip(balls.DUALS, parts[::-1] if swapped else parts, strict=True):
            for alpha in balls.ALPHAS:
                values = balls.value(norms.Blend(norm, alpha), circle)
                found[dual, alpha] = circle / values.unsqueeze(-1)
        return found

    assert balls._sums(curves(False), circle).verdict == "refuted"
    assert balls._sums(curves(True), circle).verdict == "confirmed"
    ky_fan = balls._ky_fan(POINTS)
    assert ky_fan.verdict == "refuted"
    assert "100.0% on the right side" in ky_fan.found
    assert "of radius 2 100.0%" in ky_fan.found
    assert balls._outside(circle).verdict == "confirmed"
    monkeypatch.setattr(balls, "OUTSIDE", (0.2, 1.1))
    assert balls._outside(circle).verdict == "refuted"

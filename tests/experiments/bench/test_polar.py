"""Polar factors are judged on matrices with the spectra that the table names."""

import itertools

import pytest
import torch

from experiments.bench import polar
from lit_fanions import lmo


def test_polar_table(polar_outcome):
    entries = polar_outcome.result["results"]
    assert {(tuple(e["shape"]), e["batch"]) for e in entries} == {
        (shape, batch) for shape in polar.QUICK_SHAPES for batch in (1, 4)
    }
    for shape, batch in itertools.product(polar.QUICK_SHAPES, (1, 4)):
        own = {e["method"]: e for e in entries if (tuple(e["shape"]), e["batch"]) == (shape, batch)}
        assert list(own) == [
            polar.TORCH, "SVD in float64", "jordan 5", "quintic", "polar_express 6", "cans 5",
            "fast", "convergent", "exact", "auto",
        ]  # fmt: skip
        for entry in own.values():
            assert entry["ratio_to_torch"] == pytest.approx(
                entry["median_seconds"] / own[polar.TORCH]["median_seconds"]
            )
        for method in ("exact", "SVD in float64"):
            assert list(own[method]["quality"].values()) == pytest.approx([1] * 3, abs=1e-5)
            assert own[method]["largest_singular_value"] == pytest.approx(1, abs=1e-5)
    for entry, row in zip(entries, polar_outcome.rows("shape"), strict=True):
        assert row[:3] == ["x".join(map(str, entry["shape"])), str(entry["batch"]), entry["method"]]
        assert float(row[-2]) == pytest.approx(min(entry["quality"].values()), rel=1e-3)
        assert float(row[-3]) == pytest.approx(entry["ratio_to_torch"], rel=1e-3)


def test_quality_is_that_of_the_directions(polar_outcome):
    entries = [e for e in polar_outcome.result["results"] if e["batch"] == 1]
    for entry in entries:
        shape = tuple(entry["shape"])
        if entry["method"] == "jordan 5":
            directions = {n: lmo.polar(m, method="jordan") for n, m in polar.spectra(shape).items()}
        elif entry["method"] == polar.TORCH:
            directions = {n: polar.torch_newton_schulz(m) for n, m in polar.spectra(shape).items()}
        else:
            continue
        largest = max(torch.linalg.svdvals(d.double())[0] for d in directions.values())
        assert entry["largest_singular_value"] == pytest.approx(float(largest), rel=1e-4)
        for name, m in polar.spectra(shape).items():
            s = torch.linalg.svdvals(m.double())
            value = float((m.double() * directions[name].double()).sum() / s.sum())
            assert entry["quality"][name] == pytest.approx(value, rel=1e-6)


def test_spectra_are_as_named():
    power_law, condition = list(polar.spectra((20, 50)).values())[1:]
    expected = torch.arange(1, 21).double() ** -0.7
    torch.testing.assert_close(
        torch.linalg.svdvals(power_law.double()), expected, rtol=0, atol=1e-6
    )
    s = torch.linalg.svdvals(condition.double())
    assert float(s[0] / s[-1]) == pytest.approx(1e3, rel=1e-3)
    assert torch.allclose(s[1:] / s[:-1], s[1] / s[0], rtol=1e-3)

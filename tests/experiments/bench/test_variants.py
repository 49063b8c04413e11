"""Variants of the Newton-Schulz iteration are judged by their own directions."""

import argparse

import torch

from experiments.bench import variants
from lit_fanions import lmo
from lit_fanions.lmo.presets import polynomials
from tests.matrices import gaussian


def test_every_variant_is_judged_on_every_spectrum():
    found = variants.run(argparse.Namespace(quick=True, device=torch.device("cpu")))
    results = found.data["results"]
    names = {entry["variant"] for entry in results}
    assert {"polar_express 6, AOL", "the same, Gram form of 3 steps"} <= names
    assert len(found.rows) == len(results)
    plain = [entry["quality"] for entry in results if entry["variant"] == "polar_express 6"]
    assert min(plain) > 0.99


def test_without_rounding_the_forms_agree_with_the_preset():
    m = gaussian(20, 40)
    x, rows = m / m.norm(), polynomials("polar_express")
    wanted = lmo.polar(m)
    torch.testing.assert_close(variants.direct(x, rows, lambda t: t), wanted, rtol=0, atol=1e-4)
    for restart in (1, 2, 3):
        d = variants.gram_form(x, rows, lambda t: t, restart)
        torch.testing.assert_close(d, wanted, rtol=0, atol=1e-4)


def test_preconditioned_matrices_have_singular_values_up_to_1():
    for m in (gaussian(20, 40), torch.ones(5, 6)):
        assert torch.linalg.matrix_norm(variants.precondition(m), 2) <= 1 + 1e-5

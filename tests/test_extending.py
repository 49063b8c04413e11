"""The worked example of docs/extending.md runs as it is written."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_fanions import lmo, norms
from lit_fanions.lmo import spectrum as spectra
from lit_fanions.optim import algorithms
from lit_fanions.optim.options import default_options
from tests.matrices import gaussian

DOCS = Path(__file__).parents[1] / "docs/extending.md"


@pytest.fixture
def example() -> Iterator[dict]:
    """The names of the page's code; the tables are restored afterwards."""
    tables = [(table, dict(table)) for table in (lmo.BALLS, algorithms.ALGORITHMS)]
    torch.manual_seed(0)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, names)
    yield names
    for table, before in tables:
        table.clear()
        table.update(before)


def test_a_norm_takes_three_edits(example):
    group = {**default_options("row_sum"), "algorithm": "row_sum"}
    m = gaussian(2, 8, 6).double()
    oracle = algorithms.oracle(group, 8, 6)
    d = oracle.solve(m).direction
    norm = oracle.norm()
    torch.testing.assert_close(d, norm.lmo(m))
    torch.testing.assert_close((m * d).sum((-2, -1)), norm.dual(m))
    torch.testing.assert_close(oracle.dual(spectra.measure(m, exact=True), m), norm.dual(m))
    assert (norm.value(d) <= 1).all()
    assert float(d[0].norm()) == pytest.approx(oracle.length(8, 6))


def test_a_blend_partner_takes_no_edit(example):
    m = gaussian(8, 6)
    d = lmo.direction(m, alpha=0.7, blend="row_sum", polar="exact")
    exact = norms.Blend(norms.Spectral(), 0.7, example["MaxRowSum"]())
    torch.testing.assert_close(d.double(), exact.lmo(m), rtol=0, atol=1e-5)
    group = {**default_options("f_row_sum"), "algorithm": "f_row_sum"}
    blended = algorithms.oracle(group, 8, 6).solve(m).direction
    exact = norms.Blend(example["MaxRowSum"](), 0.5)
    torch.testing.assert_close(blended.double(), exact.lmo(m), rtol=0, atol=1e-5)
    assert example["optimizer"].state[example["weight"]]["momentum"].any()


def test_tables_are_as_they_were():
    assert "row_sum" not in lmo.BALLS
    assert "row_sum" not in algorithms.ALGORITHMS

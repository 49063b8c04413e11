"""The worked example of docs/extending.md runs as it is written."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_fanions import Fanion, lmo, norms
from lit_fanions.optim import algorithms
from lit_fanions.optim.options import default_options
from tests.matrices import gaussian
from tests.optim import test_contract

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
    weight = torch.nn.Parameter(gaussian(8, 6))
    before = weight.detach().clone()
    optimizer = Fanion([weight], lr=0.1, algorithm="row_sum", momentum=0.0, nesterov=False)
    weight.grad = gaussian(8, 6, seed=1)
    optimizer.step()
    step = 0.1 * math.sqrt(8 / 6) * example["MaxRowSum"]().lmo(weight.grad)
    torch.testing.assert_close((before - weight.detach()).double(), step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["row_sum", "f_row_sum"])
def test_the_contract_runs_over_the_example(example, name):
    for shape in test_contract.SHAPES:
        test_contract.test_oracle_attains_its_dual_norm(name, shape)
        test_contract.test_direction_lies_in_the_ball_of_the_exact_norm(name, shape)
    test_contract.test_direction_has_the_length_that_the_table_says(name)
    test_contract.test_zero_matrices_have_no_direction_and_broken_ones_nan(name)
    test_contract.test_direction_does_not_depend_on_the_scale(name, 1e-20)
    test_contract.test_resume_is_bit_equal(name)
    test_contract.test_a_skipped_step_leaves_no_trace(name)
    test_contract.test_observed_direction_is_measured_with_its_own_dual(name)


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

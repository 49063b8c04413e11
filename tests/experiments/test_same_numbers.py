"""The comparison of two checkouts finds weights that differ, and only these."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from experiments import same_numbers, same_numbers_trainings

CHECKOUT = Path(same_numbers.__file__).parents[1]
# Appended to the optimizer of a copy: each step moves one weight by one rounding more.
NUDGE = """
_step = Fanion.step


def _nudged_step(self, closure=None):
    loss = _step(self, closure)
    p = self.param_groups[0]["params"][0].data.view(-1)
    p[0] = torch.nextafter(p[0], p[0] + 1)
    return loss


Fanion.step = _nudged_step
"""


@pytest.fixture
def changed_checkout(tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(CHECKOUT / "lit_fanions", folder / "lit_fanions")
    with (folder / "lit_fanions" / "optim" / "fanion.py").open("a") as file:
        file.write(NUDGE)
    return folder


def test_planted_difference_is_found(changed_checkout, capsys):
    only = ["--only", "algorithms/muon nesterov=False momentum", "--steps", "2"]
    case = "algorithms/muon nesterov=False momentum=0.0"
    assert same_numbers.main(["--before", str(changed_checkout), *only]) == 1
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith(case))
    assert row.endswith("relative in 0.0 (1 of 10 differ)")
    assert "0 of 1 common cases are equal" in printed


def test_training_is_repeatable():
    first, second = (
        same_numbers_trainings.train_algorithm("f_fanion", {"rank": 3}, 3) for _ in range(2)
    )
    assert same_numbers.compare(first, second) == same_numbers.EQUAL


def test_every_algorithm_has_cases(tmp_path):
    cases = same_numbers_trainings.cases(tmp_path, 20)
    for name in same_numbers_trainings.algorithm_names():
        assert f"algorithms/{name}" in cases
    assert {name for name, _ in same_numbers_trainings.VARIANTS} <= {
        *same_numbers_trainings.algorithm_names()
    }


@pytest.mark.parametrize("recipe", same_numbers_trainings.RECIPES)
def test_every_recipe_exists(recipe):
    assert (CHECKOUT / "configs" / f"{recipe}.yaml").is_file()


def test_bits_tell_signs_of_zero_and_equal_nans_apart():
    assert same_numbers.compare({"w": torch.zeros(2)}, {"w": -torch.zeros(2)}) != "equal"
    nan = torch.full((2,), math.nan)
    assert same_numbers.compare({"w": nan}, {"w": nan.clone()}) == "equal"
    assert "inf relative" in same_numbers.compare({"w": nan}, {"w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        (None, {}, same_numbers.ONLY_AFTER),
        ({}, None, same_numbers.ONLY_BEFORE),
        ({}, "KeyError: 'lr'", "failed after: KeyError: 'lr'"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "other tensors: a, b"),
        (
            {"a": torch.ones(1)},
            {"a": torch.ones(1, dtype=torch.float64)},
            "a was float32 (1,) and is float64 (1,)",
        ),
        (
            {"a": torch.tensor([4.0, 2.0]), "b": torch.ones(1)},
            {"a": torch.tensor([4.0, 3.0]), "b": torch.ones(1)},
            "0.25 relative in a (1 of 2 differ)",
        ),
    ],
)
def test_answers(before, after, answer):
    assert same_numbers.compare(before, after) == answer


def test_mistakes_are_named(tmp_path, capsys):
    for args, message in (
        (["--before", str(tmp_path)], f"{tmp_path} holds no lit_fanions"),
        (
            ["--before", str(CHECKOUT), "--only", "algorithms/adam-w"],
            "no case starts with algorithms/adam-w",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            same_numbers.main(args)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

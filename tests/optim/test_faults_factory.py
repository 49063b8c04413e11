"""What the factory and schedules are given by mistake, or as numbers of NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from lit_fanions import configure_optimizers, split_parameters


@pytest.mark.parametrize("total", [0, -1, 1.5, "10", True])
def test_impossible_numbers_of_steps_are_refused(total):
    # -1, and 0, which stood for unknown, would have trained at an lr of 0.
    with pytest.raises(ValueError, match="total_steps must be a whole number of at least 1"):
        configure_optimizers(nn.Linear(3, 3), total_steps=total, schedule={"shape": "linear"})


@pytest.mark.parametrize("given", [nn.Linear(3, 3).parameters(), [torch.ones(3, 3)], None])
def test_parameters_in_place_of_a_module_are_refused_in_words(given):
    for function in (split_parameters, configure_optimizers):
        with pytest.raises(TypeError, match=r"expected a module.* give parameters alone to Fanion"):
            function(given)


def test_schedules_take_numbers_of_numpy():
    def rates(number: type, fraction: type) -> list[float]:
        schedule = {"shape": "linear", "warmup": number(2), "cooldown": fraction(0.5)}
        made = configure_optimizers(nn.Linear(3, 3), total_steps=number(10), schedule=schedule)
        found = []
        for _ in range(10):
            found.append(made["optimizer"].param_groups[0]["lr"])
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        return found

    assert rates(np.int64, np.float32) == rates(int, float)


def test_tensor_lr_of_the_factory_is_scheduled():
    made = configure_optimizers(
        nn.Linear(3, 3, bias=False),
        total_steps=10,
        schedule={"shape": "linear"},
        overrides={"head": {"algorithm": "muon", "lr": torch.tensor(0.1)}},
    )
    (group,) = made["optimizer"].param_groups
    made["optimizer"].step()
    made["lr_scheduler"]["scheduler"].step()
    assert isinstance(group["lr"], torch.Tensor) and group["lr"].item() == pytest.approx(0.09)

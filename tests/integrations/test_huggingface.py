"""The optimizer that transformers' Trainer is given."""

import pytest
import torch

from lit_fanions import Fanion
from lit_fanions.integrations.huggingface import optimizer_factory


def network():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def test_factory_has_the_form_that_the_trainer_expects():
    optimizer = optimizer_factory()(network(), algorithm="f_muon", lr=0.03, other={"lr": 1e-3})
    assert isinstance(optimizer, Fanion)
    lrs = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert lrs == {"f_muon": 0.03, "adamw": 1e-3}


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": {"shape": "linear"}},
        {"overrides": {"vector": {"schedule": {"warmup": 10}}}},
    ],
)
def test_own_schedule_is_refused(options):
    with pytest.raises(ValueError, match="lr_scheduler_type and warmup_ratio"):
        optimizer_factory()(network(), **options)

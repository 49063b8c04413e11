"""A small GPT of each published shape, with random weights."""

import pytest
import torch

from models.gpt import (
    GPT,
)
from tests.models.gpt.reference import SHAPES


@pytest.fixture(params=SHAPES)
def network(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(0)
    network = GPT(SHAPES[request.param])
    for parameter in network.parameters():  # nothing zero, nothing one
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return network

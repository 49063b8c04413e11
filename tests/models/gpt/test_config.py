"""Configurations of a GPT: published sizes, refused values."""

import pytest
import torch

from models.gpt import (
    GPT,
    GPTConfig,
)
from tests.models.gpt.reference import SMALL


@pytest.mark.parametrize(
    ("preset", "count"), [(GPTConfig.track3, 162_354_816), (GPTConfig.speedrun, 275_742_784)]
)
def test_presets_have_the_published_number_of_parameters(preset, count: int) -> None:
    with torch.device("meta"):
        network = GPT(preset())
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 18}, "multiple of 4 heads, 8"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"layers_without_attention": (4,)}, "there is no block 4, choose from 0 to 3"),
        ({"long_window_layers": (-1,)}, "there is no block -1"),
        ({"value_embeddings": 3}, "choose 0 to 2"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"document_mask": True, "bos": 17}, "not in the vocabulary of 17"),
        ({"softcap": "tanh"}, "softcap 'tanh' is none of none, sqrt, sigmoid"),
        ({"softcap_limit": 0.0}, "softcap_limit must be a number above 0"),
        ({"init": "zeros"}, "init 'zeros' is none of normal, uniform"),
        ({"embedding_dtype": "float16"}, "embedding_dtype 'float16' is none of float32, bfloat16"),
    ],
)
def test_config_refuses_invalid_values(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **wrong})

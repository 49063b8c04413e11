"""Learning rates of one width at another, and one dial for the size of NanoGPT."""

from typing import Any

import pytest
import torch

from lit_fanions import FanionConfig
from models import GPTConfig, NanoGPT
from models.gpt import GPT
from models.width_transfer import transfer_learning_rates

CONFIG: dict[str, Any] = {
    "matrix": {"lr": 0.02, "scale": "match_rms_adamw"},
    "other": {"algorithm": "adamw", "lr": 0.03, "weight_decay": 0.1},
    "overrides": {"embedding": {"lr": 0.5}},
}


def groups(**options: Any) -> dict[str, dict[str, Any]]:
    network = {"vocab_size": 17, "layers": 1, "width": 64, "bos": 0}
    module = NanoGPT(CONFIG, network, **options)
    optimizer = module.configure_optimizers()["optimizer"]
    return {group["name"]: group for group in optimizer.param_groups}


def test_head_follows_the_width_and_matrices_their_spectral_norm() -> None:
    given, transferred = groups(), groups(base_width=16)
    assert given.keys() == transferred.keys()
    assert transferred["head"]["lr"] == given["head"]["lr"] / 4
    assert transferred["head"]["weight_decay"] == given["head"]["weight_decay"] * 4
    assert transferred["matrix"]["scale"] == "spectral_unclamped"
    for name in given.keys() - {"head"}:
        assert transferred[name]["lr"] == given[name]["lr"]


def test_hyperparameters_are_those_given() -> None:
    module = NanoGPT(CONFIG, {"vocab_size": 17, "layers": 1, "width": 64, "bos": 0}, base_width=16)
    assert module.hparams["optimizer"] == FanionConfig.from_dict(CONFIG).to_dict()
    assert NanoGPT(**module.hparams).fanion_config == module.fanion_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": {"head": {"algorithm": "muon"}}}, "stepped by muon with lr 0.03"),
        ({"other": {"algorithm": "sgd"}}, "stepped by sgd"),
    ],
)
def test_heads_without_a_known_rule_are_refused(change: dict[str, Any], message: str) -> None:
    config = FanionConfig.from_dict(CONFIG).updated(change)
    with pytest.raises(ValueError, match=message):
        transfer_learning_rates(config, 64, 128)
    with pytest.raises(ValueError, match="with lr None"):
        transfer_learning_rates(FanionConfig(), 64, 128)


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (256, 2), (768, 6)])
def test_width_sets_heads_and_hidden_features(width: int, heads: int) -> None:
    config = GPTConfig(width=width)
    assert (config.head_count, config.hidden_width) == (heads, 4 * width)
    with torch.device("meta"):
        network = GPT(config)
    assert network.blocks[0].mlp.fc.weight.shape == (4 * width, width)
    assert network.blocks[0].attention.heads == heads

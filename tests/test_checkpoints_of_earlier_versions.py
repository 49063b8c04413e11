"""Checkpoints that earlier versions saved load, and their trainings go on to the same weights.

The files and how they were made: ``tests/checkpoints/trainings.py``.
"""

from pathlib import Path

import pytest
import torch

from lit_fanions import FanionConfig
from tests.checkpoints import trainings

FOLDER = Path(trainings.__file__).parent
# The files come from another processor, whose matrix products round otherwise, and torch's kernels
# round sums in an order of their own: the resumed weights may differ by a rounding or two.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-8},
}


def resumed_weights(kind, *, load):
    """Return what three more steps make of the saved weights, and what they should make."""
    saved = torch.load(FOLDER / f"optimizer_{kind}.pt")
    fanion, parameters = trainings.optimizer(kind)
    for p, weight in zip(parameters, saved["weights"], strict=True):
        p.data.copy_(weight)
    if load:
        fanion.load_state_dict(saved["state_dict"])
    return trainings.step(fanion, parameters, saved["gradients"]), saved["after"]


@pytest.mark.parametrize("kind", trainings.KINDS)
def test_optimizer_goes_on_to_the_same_weights(kind):
    weights, expected = resumed_weights(kind, load=True)
    torch.testing.assert_close(weights, expected, **TOLERANCE[expected.dtype])


@pytest.mark.parametrize("kind", trainings.KINDS)
def test_every_group_depends_on_its_saved_state(kind):
    # Without this the test above could pass though nothing was loaded.
    weights, expected = resumed_weights(kind, load=False)
    tolerance = TOLERANCE[expected.dtype]
    for group, weight, right in zip(trainings.GROUPS, weights, expected, strict=True):
        if group["lr"] > tolerance["atol"]:  # smaller steps are lost in the rounding of bfloat16
            assert not torch.allclose(weight, right, **tolerance), group


@pytest.mark.parametrize("kind", trainings.KINDS)
def test_saved_options_and_counters_are_restored(kind):
    saved = torch.load(FOLDER / f"optimizer_{kind}.pt")["state_dict"]
    fanion, parameters = trainings.optimizer(kind)
    for group in fanion.param_groups:
        group["lr"] = 7.0
    fanion.load_state_dict(saved)
    for group, saved_group in zip(fanion.param_groups, saved["param_groups"], strict=True):
        for option in trainings.GROUPS[int(group["name"].removeprefix("group"))]:
            assert group[option] == saved_group[option]
    for i, p in enumerate(parameters):
        assert int(fanion.state[p]["skipped"]) == int(saved["state"][i]["skipped"]) == 1
        if "momentum" in fanion.state[p]:
            assert fanion.state[p]["momentum"].dtype == saved["state"][i]["momentum"].dtype


@pytest.mark.parametrize("name", ["airbench", "nanogpt"])
def test_training_goes_on_to_the_same_weights(name, tmp_path):
    module, data = trainings.airbench() if name == "airbench" else trainings.nanogpt(tmp_path)
    file = FOLDER / f"{name}.ckpt"
    trainer = trainings.trainer(tmp_path)
    trainer.fit(module, data, ckpt_path=file)
    assert trainer.global_step == trainings.LAST
    checkpoint = torch.load(file)
    expected = checkpoint["weights_after"]
    torch.testing.assert_close(trainings.weights(module), expected, rtol=0, atol=1e-5)
    # The three steps moved the weights by much more than that.
    keys = [key for key, _ in module.named_parameters()]
    start = torch.cat([checkpoint["state_dict"][key].flatten() for key in keys])
    assert (start - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["airbench", "nanogpt"])
def test_module_loads_without_its_arguments(name, tmp_path):
    module, _ = trainings.airbench() if name == "airbench" else trainings.nanogpt(tmp_path)
    file = FOLDER / f"{name}.ckpt"
    loaded = type(module).load_from_checkpoint(file)
    saved = torch.load(file)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())
    config, expected = (FanionConfig.from_dict(m.hparams["optimizer"]) for m in (loaded, module))
    assert config == expected

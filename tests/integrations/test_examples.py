"""Every example runs, and does what its text says."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "steps", "least", "most"),
    [
        ("fabric", 50, 0.0, 0.5),
        ("typed", 20, 0.0, 0.97),
        ("lightning_resnet", 3, 0.0, 1.3),
        ("timm_model", 3, 0.0, 1.0),
        ("lora", 3, 0.0, 4.1),
    ],
)
def test_example_learns(name, steps, least, most):
    """The limits are below the first loss, ln 4 for four classes and ln 64 for 64 tokens."""
    pytest.importorskip({"timm_model": "timm", "lora": "peft"}.get(name, "lightning"))
    assert least < load(name).main(steps) < most


def test_transformers_trainer_resumes_with_the_same_weights(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trained, resumed = load("huggingface_trainer").main(str(tmp_path), steps=4)
    states = trained.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in text for path in EXAMPLES.glob("*.py"))

"""Every example runs, and does what its text says."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import subprocess_environment

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


@pytest.mark.parametrize(
    ("arguments", "optimizer"), [([], "Fanion"), (["--trainer.callbacks", "null"], "AdamW")]
)
def test_yaml_alone_changes_the_optimizer_of_a_lightning_cli(arguments, optimizer, tmp_path):
    project = shutil.copytree(EXAMPLES / "lightning_cli", tmp_path / "project")
    done = subprocess.run(
        [sys.executable, "module.py", "fit", "--config", "config.yaml", *arguments],
        cwd=project, env=subprocess_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, loss = re.search(r"^(\w+): loss ([\d.]+)$", done.stdout, re.MULTILINE).groups()
    assert name == optimizer
    assert float(loss) < 1.4  # ln 4 = 1.386 before the first step


def test_every_example_is_tested_and_named():
    texts = [Path(__file__).read_text(), (EXAMPLES.parent / "docs/integrations.md").read_text()]
    names = [path.stem for path in EXAMPLES.iterdir() if path.name != "__pycache__"]
    assert not [name for name in names if not all(name in text for text in texts)]

"""Checkpoints and the configuration: which decides what, and what a resumed run shows."""

from pathlib import Path

import pytest
import yaml

from lit_fanions.cli.app import main
from tests.cli.recipes import FIT


@pytest.fixture
def checkpoint(project) -> str:
    """A checkpoint from the middle of an epoch, trained with lr 0.02."""
    main([*FIT, "--model", "toy_zoo.Interrupted"])
    return "lightning_logs/version_0/checkpoints/interrupted.ckpt"


def test_resuming_says_which_options_the_checkpoint_decides(checkpoint, capfd):
    capfd.readouterr()
    args = ["--ckpt_path", checkpoint, "--model.optimizer.matrix.lr", "0.5"]
    assert main([*FIT, *args]) == 0
    warnings = [a for a in capfd.readouterr().err.splitlines() if a.startswith("warning:")]
    assert warnings
    assert all("lr 0.02 from the checkpoint is used, not the configured 0.5" in a for a in warnings)


def test_resuming_unchanged_is_silent(checkpoint, capfd):
    capfd.readouterr()
    assert main([*FIT, "--ckpt_path", checkpoint]) == 0
    assert "from the checkpoint" not in capfd.readouterr().err


def test_checkpoint_does_not_override_the_configuration(checkpoint, capfd):
    assert main([*FIT, "--ckpt_path", checkpoint, "--model.smoothing", "0.25"]) == 0
    saved = yaml.safe_load(Path("lightning_logs/version_1/config.yaml").read_text())
    assert saved["model"]["init_args"]["smoothing"] == 0.25
    assert "ckpt_path" not in saved

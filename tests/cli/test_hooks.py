"""Checkpoints and the configuration: which decides what, and what a resumed run shows."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_fanions.cli.app import main
from tests.cli.recipes import FIT, edit_recipe


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


def test_last_without_a_checkpoint_is_refused(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--ckpt_path", "last"])
    assert stop.value.code == 2
    assert "--ckpt_path last looks in this run" in capfd.readouterr().err.splitlines()[-1]


def test_last_resumes_where_checkpoints_have_a_folder_of_their_own(project, caplog):
    checkpoints = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    checkpoints["init_args"]["save_last"] = True
    edit_recipe("trainer.callbacks", [checkpoints])
    assert main([*FIT, "--trainer.max_epochs", "1"]) == 0
    assert main([*FIT, "--ckpt_path", "last"]) == 0
    assert "Restored all states from the checkpoint" in caplog.text


def test_progress_bar_of_a_run_resumed_in_the_middle_of_an_epoch_has_a_total(
    checkpoint, monkeypatch
):
    totals = []
    update = TQDMProgressBar.on_train_batch_end

    def record(self, *args):
        totals.append((self.train_progress_bar.total, self.train_progress_bar.desc))
        update(self, *args)

    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", record)
    args = ["--ckpt_path", checkpoint, "--trainer.enable_progress_bar", "true"]
    assert main([*FIT, *args, "--trainer.callbacks+", "TQDMProgressBar"]) == 0
    assert totals[0] == (8, "Epoch 0: ")
    assert {total for total, _ in totals} == {8}

"""Checkpoints and the configuration: which decides what, and what a resumed run shows."""

import pickle
import sys
import threading
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_fanions.cli._hooks import reserve_version
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


def test_another_algorithm_is_refused_with_the_option_that_resumes(checkpoint, capfd):
    capfd.readouterr()
    args = [*FIT, "--ckpt_path", checkpoint, "--model.optimizer.matrix.algorithm", "neon"]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "on_mismatch: keep_momentum" in capfd.readouterr().err.splitlines()[-1]
    with pytest.warns(UserWarning, match=r"muon to neon: 1, adamw to adamw: 3\), 0 start"):
        assert main([*args, "--model.optimizer.on_mismatch", "keep_momentum"]) == 0
    assert "from the checkpoint is used" not in capfd.readouterr().err
    saved = yaml.safe_load(Path("lightning_logs/version_2/config.yaml").read_text())
    assert saved["model"]["init_args"]["optimizer"]["on_mismatch"] == "keep_momentum"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_states": []}, "states of 0 optimizers, the run has 1"),
        ({"loops": None}, "odd.ckpt is damaged (its loops is a NoneType)"),
        ({"loops": {"fit_loop": 5}}, "loops (the steps and epochs done) are damaged"),
        ({"loops": {"fit_loop": {"epoch_loop.batch_progress": {"ready": 1}}}}, "are damaged"),
        ({"callbacks": [1]}, "odd.ckpt is damaged (its callbacks is a list)"),
        ({"pytorch-lightning_version": 5}, "odd.ckpt is damaged"),
        ({"state_dict": [1]}, "odd.ckpt is damaged (its state_dict is a list)"),
        ({"lr_schedulers": [5]}, "no state_dict of a schedule: it is a int"),
        ({"lr_schedulers": []}, ""),
    ],
)
def test_checkpoints_with_odd_parts_are_refused_in_a_line(checkpoint, capfd, changes, message):
    torch.save({**torch.load(checkpoint, weights_only=True), **changes}, "odd.ckpt")
    capfd.readouterr()
    args = [*FIT, "--ckpt_path", "odd.ckpt"]
    if not message:
        assert main(args) == 0
        assert "states of 0 lr schedules, the run has 1" in capfd.readouterr().err
        return
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_checkpoint_without_counts_of_steps_cannot_be_resumed(checkpoint, capfd):
    state = torch.load(checkpoint, weights_only=True)
    del state["loops"]
    torch.save(state, "odd.ckpt")
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--ckpt_path", "odd.ckpt"])
    assert stop.value.code == 2
    assert "the checkpoint has no loops" in capfd.readouterr().err.splitlines()[-1]


def test_last_without_a_checkpoint_is_refused(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--ckpt_path", "last"])
    assert stop.value.code == 2
    assert "--ckpt_path last looks in this run" in capfd.readouterr().err.splitlines()[-1]
    assert not list(Path("lightning_logs").glob("version_*"))


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
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    args = ["--ckpt_path", checkpoint, "--trainer.enable_progress_bar", "true"]
    assert main([*FIT, *args, "--trainer.callbacks+", "TQDMProgressBar"]) == 0
    assert totals[0] == (8, "Epoch 0: ")
    assert {total for total, _ in totals} == {8}


def save_every_step(folder):
    options = {"dirpath": folder, "filename": "{step}", "save_top_k": -1}
    options |= {"every_n_train_steps": 1, "save_last": True}
    edit_recipe("trainer.callbacks", [{"class_path": "ModelCheckpoint", "init_args": options}])


def test_resume_of_a_run_resumed_between_two_epochs_is_bit_equal(project):
    """8 is the last step of the first epoch, 10 is inside the second."""
    fit = [*FIT, "--trainer.max_epochs", "3"]
    for i, start in enumerate((None, 8, 10)):
        save_every_step(f"kept{i}")
        given = ["--ckpt_path", f"kept{i - 1}/step={start}.ckpt"] if start else []
        assert main([*fit, *given]) == 0
    whole, resumed = (torch.load(f"kept{i}/last.ckpt", weights_only=True) for i in (0, 2))
    assert whole["global_step"] == resumed["global_step"] == 24
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_steps_are_bounded_and_no_epoch_is_left_out_after_a_resume(project):
    save_every_step("kept")
    for steps in (8, 12):
        given = ["--ckpt_path", "kept/last.ckpt"] * (steps > 8)
        assert main([*FIT, "--trainer.max_steps", str(steps), *given]) == 0
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 12


# Skipped steps.

DIVERGING = """\
import torch
from toy_zoo import ToyNet


class Net(ToyNet):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * (float("nan") if self.global_step in SKIPPED else 1.0)
"""


@pytest.fixture
def diverging(project, monkeypatch):
    """A function that trains with non-finite gradients in some steps."""
    monkeypatch.delitem(sys.modules, "diverging", raising=False)

    def fit(skipped: str, *args: str) -> int:
        Path("diverging.py").write_text(DIVERGING.replace("SKIPPED", skipped))
        return main([*FIT, "--model", "diverging.Net", *args])

    yield fit
    sys.modules.pop("diverging", None)


def test_diverged_run_is_warned_of_on_the_way_and_at_the_end(diverging, capfd):
    assert diverging("range(3, 99)") == 0
    err = capfd.readouterr().err
    assert err.count("warning: step") == 1
    line = "no finite gradient of 'net.0.weight' and 3 other parameters in 10 steps"
    assert f"warning: step 13: {line}" in err
    assert "warning: 13 of 16 steps skipped, for 'net.0.weight': non-finite gradients" in err


def test_single_skipped_steps_are_reported_at_the_end_only(diverging, capfd):
    assert diverging("range(0, 99, 2)") == 0
    err = capfd.readouterr().err
    assert "warning: step" not in err
    assert "8 of 16 steps skipped" in err


def test_run_without_skipped_steps_is_silent(project, capfd):
    assert main(FIT) == 0
    assert "skipped" not in capfd.readouterr().err


def test_nonfinite_patience_ends_the_run(diverging, capfd):
    assert diverging("range(3, 99)", "--nonfinite_patience", "5") == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert "in 5 steps; the weights are those of step 3;" in line


def test_patience_counts_steps_in_a_row(diverging):
    assert diverging("(1, 2, 4, 5, 7, 8)", "--nonfinite_patience", "3") == 0


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_patience_that_is_no_positive_number_is_refused(value, project, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--nonfinite_patience", value])
    assert stop.value.code == 2


# Version folders.


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_runs_that_start_at_one_moment_get_a_folder_each(logger, project):
    chosen = []
    barrier = threading.Barrier(8)

    def choose() -> None:
        own = getattr(loggers, logger)(save_dir="logs", name="run")
        reserve_version(own, [])
        barrier.wait()
        chosen.append(own.version)

    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chosen) == list(range(8))


def test_chosen_version_is_reserved_before_anything_is_logged(project):
    assert main([*FIT, "--trainer.max_epochs", "1"]) == 0
    other = loggers.TensorBoardLogger(save_dir=".", name="lightning_logs")
    reserve_version(other, [])
    assert other.version == 1
    assert Path("lightning_logs/version_1").is_dir()


def test_file_with_the_name_of_a_version_is_passed_over(project):
    Path("logs").mkdir()
    Path("logs/version_0").touch()
    own = loggers.TensorBoardLogger(save_dir=".", name="logs")
    reserve_version(own, [])
    assert own.version == 1


def test_run_can_be_handed_to_spawned_processes(project, monkeypatch, capfd):
    def start_processes(function, args, **options):
        pickle.dumps([part for part in args if not isinstance(part, SimpleQueue)])
        raise RuntimeError("handed over")

    monkeypatch.setattr(torch.multiprocessing, "start_processes", start_processes)
    assert main([*FIT, "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"]) == 1
    assert "handed over" in capfd.readouterr().err.splitlines()[-1]

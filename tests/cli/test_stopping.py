"""Ctrl-C and SIGTERM: where a fit stops, what it saves, how it is resumed, what it says."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_fanions.cli.app import main
from tests.cli.recipes import FIT
from tests.conftest import subprocess_environment

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A model and data that are sent a signal in a hook: NUMBER, HOOK and WHEN are filled in.
STOPPED = """\
import signal

from toy_zoo import ToyData, ToyNet


class Net(ToyNet):
    def HOOK(self, *args, **kwargs):
        if WHEN:
            signal.raise_signal(NUMBER)
        return super().HOOK(*args, **kwargs)


class Data(ToyData):
    def HOOK(self, *args, **kwargs):
        signal.raise_signal(NUMBER)
"""
NET = ["--model", "stopped.Net"]
IN_EPOCH_0 = "self.current_epoch == 0 and args[1] == 4"
SAVED = "lightning_logs/version_0/checkpoints/interrupted.ckpt"
SAVE_EVERY_3_STEPS = [
    "--trainer.callbacks+",
    "{class_path: ModelCheckpoint, init_args: {save_last: true, every_n_train_steps: 3}}",
]

WORKERS = """\
from toy_zoo import ToyData
from torch.utils.data import DataLoader


class Data(ToyData):
    def train_dataloader(self):
        return DataLoader(self.val_dataloader().dataset, batch_size=8, num_workers=2)
"""


@pytest.fixture
def stopped(project: Path) -> Iterator[Callable[..., None]]:
    """A function that writes the module `stopped`."""

    def write(hook: str, when: str = "True", number: int = signal.SIGTERM) -> None:
        text = STOPPED.replace("HOOK", hook).replace("WHEN", when)
        Path("stopped.py").write_text(text.replace("NUMBER", str(int(number))))
        sys.modules.pop("stopped", None)

    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield write
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    sys.modules.pop("stopped", None)


def start_training(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a training of `toy_zoo.Slow` and wait until it takes steps."""
    run = subprocess.Popen(
        command,
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    deadline = time.monotonic() + 60
    while not Path("training").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    return run


def weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_interrupted_and_resumed_equals_uninterrupted(project, capfd):
    assert main(FIT) == 0
    handler = signal.getsignal(signal.SIGINT)
    assert main([*FIT, "--model", "toy_zoo.Interrupted"]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    captured = capfd.readouterr()
    line = captured.err.splitlines()[-1]
    saved = "lightning_logs/version_1/checkpoints/interrupted.ckpt"
    assert re.match(r"interrupted; resume with: \S*python\S* -m lit_fanions fit", line)
    assert line.endswith(f"--ckpt_path {saved}")
    assert torch.load(saved, weights_only=True)["global_step"] == 5

    assert main([*FIT, "--ckpt_path", saved]) == 0
    first, last = (
        next(project.glob(f"lightning_logs/version_{version}/checkpoints/epoch*.ckpt"))
        for version in (0, 2)
    )
    assert first.name == last.name
    for name, value in weights(first).items():
        assert torch.equal(value, weights(last)[name])


def test_second_interruption_stops_at_once(project, capfd):
    handler = signal.getsignal(signal.SIGINT)
    assert main([*FIT, "--model", "toy_zoo.Interrupted", "--model.times", "2"]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    line = "interrupted; no checkpoint was saved; 4 optimizer steps lost"
    assert capfd.readouterr().err.splitlines()[-1] == line


def assert_resume_is_bit_equal(project: Path, args: Sequence[str]) -> None:
    """Compare a resumed run with one that was not stopped."""
    assert main([*FIT, *args]) == 0
    assert main([*FIT, *args, "--ckpt_path", SAVED]) == 0
    whole, resumed = (
        next(project.glob(f"lightning_logs/version_{version}/checkpoints/epoch*.ckpt"))
        for version in (1, 2)
    )
    assert whole.name == resumed.name
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


@pytest.mark.parametrize(
    ("number", "batches", "steps"),
    [(SIGNALS[0], 1, 5), (SIGNALS[0], 2, 3), (SIGNALS[1], 3, 2), (SIGNALS[1], 5, 1)],
)
def test_stop_under_accumulation_loses_no_gradient(number, batches, steps, stopped, project, capfd):
    stopped("training_step", IN_EPOCH_0, number)
    args = ["--trainer.accumulate_grad_batches", str(batches)]
    assert main([*FIT, *args, *NET]) == 128 + number
    assert "finishing this optimizer step" in capfd.readouterr().err
    assert torch.load(SAVED, weights_only=True)["global_step"] == steps
    assert_resume_is_bit_equal(project, args)


def test_sigterm_saves_and_says_how_to_resume(stopped, project, capfd):
    stopped("training_step", IN_EPOCH_0)
    assert main([*FIT, *NET]) == 143
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.match(r"terminated; resume with: \S*python\S* -m lit_fanions fit", line)
    assert line.endswith(f"--ckpt_path {SAVED}")


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_in_validation_saves_at_once(number, stopped, project, capfd):
    stopped("validation_step", "self.global_step == 8 and args[1] == 4", number)
    assert main([*FIT, *NET]) == 128 + number
    assert "finishing" not in capfd.readouterr().err
    assert torch.load(SAVED, weights_only=True)["global_step"] == 8
    assert_resume_is_bit_equal(project, [])


def test_steps_since_the_last_checkpoint_are_reported_lost(stopped, project, capfd):
    stopped("training_step", f"{IN_EPOCH_0} and not signal.raise_signal(NUMBER)")
    assert main([*FIT, *NET, *SAVE_EVERY_3_STEPS]) == 143
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("terminated; 1 optimizer step since the last checkpoint lost; resume ")
    assert line.endswith("last.ckpt")


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_in_the_final_test_names_the_last_checkpoint(number, stopped, project, capfd):
    stopped("test_step", number=number)
    assert main([*FIT, *NET, *SAVE_EVERY_3_STEPS]) == 128 + number
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"; test with: \S*python\S* -m lit_fanions test --config recipe.yaml", line)
    assert line.endswith("--ckpt_path lightning_logs/version_0/checkpoints/last.ckpt")
    assert "lost" not in line


@pytest.mark.parametrize("hook", ["prepare_data", "setup", "train_dataloader"])
def test_sigterm_before_training_ends_at_once(hook, stopped, project, capfd):
    stopped(hook)
    assert main([*FIT, "--data", "stopped.Data"]) == 143
    assert capfd.readouterr().err.splitlines()[-1] == "terminated; no checkpoint was saved"


def test_sigterm_ends_an_evaluation_at_once(stopped, project, capfd):
    stopped("test_step")
    assert main(["test", *FIT[1:], *NET, "--allow_untrained"]) == 143
    assert capfd.readouterr().err.splitlines()[-1] == "terminated"


def test_error_after_a_signal_is_shown_as_an_error(stopped, project, capfd):
    stopped("training_step", f"{IN_EPOCH_0} and (signal.raise_signal(NUMBER) or len(3))")
    assert main([*FIT, *NET]) == 1
    assert "in training_step: TypeError" in capfd.readouterr().err.splitlines()[-1]


SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fanion"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


def test_signal_of_slurm_saves_between_steps_and_requeues(stopped, project, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    tools = project / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho $* > requeued\n")
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    stopped("training_step", IN_EPOCH_0, signal.SIGUSR1)
    args = ["--trainer.accumulate_grad_batches", "3", "--test_after_fit", "false"]
    assert main([*FIT, *args, *NET]) == 0
    assert Path("requeued").read_text() == "requeue 7\n"
    assert torch.load("hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2  # of 3 batches


TWO_PROCESSES = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def start_two_processes() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_fanions", *FIT, "--model", "toy_zoo.Slow"]
    run = start_training([*command, *TWO_PROCESSES, "--trainer.max_epochs", "1000"])
    assert run.poll() is None, run.communicate()[1]
    return run


def children(run: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the other ranks."""
    return list(map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()))


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the other rank in /proc")
@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
    ],
)
def test_signal_to_one_process_stops_all_after_the_same_step(number, rank, project):
    run = start_two_processes()
    others = children(run)
    os.kill(run.pid if rank == 0 else others[0], number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number, err
    assert not any(Path(f"/proc/{other}").exists() for other in others)
    saved = err.splitlines()[-1].rpartition("--ckpt_path ")[2]
    assert err.count("resume with") == 1
    assert torch.load(saved, weights_only=True)["global_step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the other rank in /proc")
def test_stopped_rank_ends_the_run_within_the_timeout(project):
    strategy = "{class_path: DDPStrategy, init_args: {timeout: '0:00:10'}}"
    command = [sys.executable, "-m", "lit_fanions", *FIT, "--model", "toy_zoo.Slow"]
    options = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    run = start_training([*command, *options, "--trainer.max_epochs", "1000"])
    (other,) = children(run)
    os.kill(other, signal.SIGSTOP)
    start = time.monotonic()
    _, err = run.communicate(timeout=90)
    assert run.returncode == 1, err
    assert time.monotonic() - start < 60
    # Gloo: "Timed out waiting ..." where it waits, "Application timeout ..." where it receives.
    assert re.search("timed ?out|timeout", err.splitlines()[-1], re.IGNORECASE)
    assert not Path(f"/proc/{other}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_to_the_whole_group_spares_the_step_in_progress(number, project):
    Path("workers.py").write_text(WORKERS)
    command = [sys.executable, "-m", "lit_fanions", *FIT, "--model", "toy_zoo.Slow"]
    command += ["--data", "workers.Data", "--trainer.max_epochs", "1000"]
    run = start_training(command, start_new_session=True)
    os.killpg(run.pid, number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number, err
    saved = err.splitlines()[-1].rpartition("--ckpt_path ")[2]
    assert torch.load(saved, weights_only=True)["global_step"] > 0
    assert err.count("finishing this optimizer step") <= 1


def test_ctrl_c_in_a_terminal(project):
    command = [sys.executable, "-m", "lit_fanions", *FIT, "--model", "toy_zoo.Slow"]
    run = start_training([*command, "--trainer.max_epochs", "1000"])
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    assert "accuracy" not in out
    saved = err.splitlines()[-1].rpartition("--ckpt_path ")[2]
    assert Path(saved).exists()
    assert torch.load(saved, weights_only=True)["global_step"] > 0
    (events,) = project.glob("lightning_logs/version_0/events.*")
    assert b"train/loss" in events.read_bytes()

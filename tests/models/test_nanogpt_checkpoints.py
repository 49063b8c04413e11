"""NanoGPT's checkpoints: resume, last step, other networks, killed runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.bench.__main__ import main as bench
from lit_fanions.cli._hooks import SaveLastStep
from lit_fanions.cli.curves import read_curves
from models import NanoGPT
from tests.models.nanogpt_runs import (
    NETWORK,
    SPEEDRUN,
    Losses,
    data,
    model,
    recipe,
    trainer,
    weights,
)

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*many workers:UserWarning"),
]


def test_resume_is_bit_equal(shards: Path, tmp_path: Path) -> None:
    whole, losses = model(network=SPEEDRUN), Losses()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, 8, callbacks=[losses, keep], enable_checkpointing=True).fit(
        whole, datamodule=data(shards, micro_batch_size=4)
    )
    again, rest = model(network=SPEEDRUN), Losses()
    trainer(tmp_path, 8, callbacks=[rest]).fit(
        again,
        datamodule=data(shards, micro_batch_size=4),
        ckpt_path=str(tmp_path / "step=3.ckpt"),
        weights_only=True,
    )
    assert rest.values == losses.values[3:]
    assert torch.equal(weights(again), weights(whole))


def test_last_checkpoint_holds_the_last_step(shards: Path, tmp_path: Path) -> None:
    """A run that ends between two saves has a checkpoint of its last step, and resumes from it."""

    def run(name: str, steps: int, **resume: Any) -> tuple[str, torch.Tensor]:
        module = model(optimizer={})
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_last=True, save_top_k=0)
        fit = trainer(tmp_path, steps, callbacks=[SaveLastStep(), keep], enable_checkpointing=True)
        fit.fit(module, datamodule=data(shards), **resume)
        assert torch.load(keep.last_model_path, weights_only=True)["global_step"] == steps
        return keep.last_model_path, weights(module)

    path, _ = run("cut", 7)
    _, resumed = run("resumed", 10, ckpt_path=path, weights_only=True)
    assert torch.equal(resumed, run("whole", 10)[1])


def test_checkpoints_load_without_a_trainer(shards: Path, tmp_path: Path) -> None:
    module = model(network=SPEEDRUN, sample_tokens=3)
    fit = trainer(tmp_path, 2, limit_val_batches=0)
    fit.fit(module, datamodule=data(shards))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    loaded = NanoGPT.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    assert loaded.network.config == module.network.config
    assert loaded.sample_tokens == 3
    assert torch.equal(weights(loaded), weights(module))


def test_init_from_loads_weights_but_no_progress(shards: Path, tmp_path: Path) -> None:
    module = model()
    fit = trainer(tmp_path, 5)
    fit.fit(module, datamodule=data(shards))
    fit.save_checkpoint(tmp_path / "base.ckpt")
    (before,) = fit.validate(module, datamodule=data(shards), verbose=False)

    tuned, losses = model(init_from=str(tmp_path / "base.ckpt")), Losses()
    second = trainer(tmp_path, 1, callbacks=[losses])
    second.fit(tuned, datamodule=data(shards))
    assert losses.values[0] == pytest.approx(before["val/loss"], abs=0.2)
    assert second.global_step == 1


@pytest.mark.parametrize("case", ["missing", "no checkpoint", "empty", "cut", "another network"])
def test_init_from_names_the_problem(shards: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "base.ckpt"
    if case == "no checkpoint":
        torch.save([1, 2], path)
    if case == "empty":
        path.touch()
    if case in ("another network", "cut"):
        module = model(network={**NETWORK, "width": 24})
        trainer(tmp_path, 1).fit(module, datamodule=data(shards))
        fit = trainer(tmp_path, 1)
        fit.strategy.connect(module)
        fit.save_checkpoint(path)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    expected = {
        "missing": (FileNotFoundError, "init_from: there is no file"),
        "no checkpoint": (ValueError, "damaged or no Lightning checkpoint"),
        "empty": (ValueError, "damaged or no Lightning checkpoint"),
        "cut": (ValueError, "damaged or no Lightning checkpoint"),
        "another network": (ValueError, "of another network: .*size mismatch"),
    }
    error, message = expected[case]
    with pytest.raises(error, match=message):
        trainer(tmp_path, 1).fit(model(init_from=str(path)), datamodule=data(shards))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_plain_loop_takes_the_same_steps(shards: Path, tmp_path: Path, compiled, capsys) -> None:
    args = recipe(tmp_path, "raced", shards, 12, window=300, long_window_layers=[0])
    given = [*args, f"--model.compile={compiled}", "--trainer.limit_train_batches=4"]
    assert bench(["overhead", *given, "--epochs", "2"]) == 0
    assert "weights after the same steps: equal" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_checkpoint(shards: Path, tmp_path: Path) -> None:
    """After SIGKILL at any step, a resumed run has the losses of the uninterrupted run."""

    def config(name: str) -> list[str]:
        fit = [sys.executable, "-m", "lit_fanions", "fit"]
        return [*fit, *recipe(tmp_path, name, shards, 40)]

    root = Path(__file__).parents[2]
    subprocess.run(config("whole"), cwd=root, check=True, capture_output=True)
    expected = dict(read_curves(tmp_path / "whole", ["train/loss"])["train/loss"])
    process = subprocess.Popen(
        config("killed"), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = tmp_path / "killed" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3 * np.random.default_rng().random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(last, weights_only=True)["global_step"]
    assert done < 40
    for events in (tmp_path / "killed").glob("events.*"):
        events.unlink()
    resume = [*config("killed"), "--ckpt_path", str(last)]
    subprocess.run(resume, cwd=root, check=True, capture_output=True)
    resumed = dict(read_curves(tmp_path / "killed", ["train/loss"])["train/loss"])
    assert resumed == {step: loss for step, loss in expected.items() if step >= done}

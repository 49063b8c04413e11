"""Callbacks work with both Lightning packages, and the private attributes they read exist."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_fanions import Fanion
from lit_fanions.callbacks import FanionOptimizer, NormAdvisor, SpectralMonitor
from lit_fanions.callbacks.lightning_interface import (
    MisconfigurationException,
    is_compiled,
    name_without_wrappers,
    optimizer_steps,
    padding,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor draws no figures"),
]
PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
CALLBACKS = [FanionOptimizer, NormAdvisor, SpectralMonitor]


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> Any:
    """One of the two Lightning packages."""
    return pytest.importorskip(request.param)


def module_of(package: Any) -> Any:
    """Return a small module of a package, with a schedule of its own."""

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("val/loss", self.net(batch[0]).square().mean())

        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4)

        val_dataloader = train_dataloader

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    return Module()


def trainer_of(package: Any, path: Path, **options: Any) -> Any:
    settings = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": path, "logger": False,
                "enable_progress_bar": False, "enable_model_summary": False,
                "enable_checkpointing": False, "log_every_n_steps": 1}  # fmt: skip
    return package.Trainer(**{**settings, **options})


@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_are_callbacks_of_both_packages(package, callback):
    assert issubclass(callback, package.Callback)
    exceptions = importlib.import_module(f"{package.__name__}.utilities.exceptions")
    assert issubclass(MisconfigurationException, exceptions.MisconfigurationException)


def test_a_run_logs_everything_and_keeps_the_schedule(package, tmp_path, capsys):
    loggers = importlib.import_module(f"{package.__name__}.loggers")
    board = loggers.TensorBoardLogger(tmp_path, name="", version="")
    config = {"matrix": {"algorithm": "f_muon", "lr": 0.04}}
    callbacks = [FanionOptimizer(config), SpectralMonitor(1), NormAdvisor(2)]
    trainer = trainer_of(package, tmp_path, callbacks=callbacks, logger=board)
    trainer.fit(module_of(package))
    assert isinstance(trainer.optimizers[0], Fanion)
    (matrix,) = [g for g in trainer.optimizers[0].param_groups if g["name"] == "matrix"]
    assert matrix["lr"] == pytest.approx(0.04 / 4)  # halved after each of two epochs
    assert "heuristic" in capsys.readouterr().out
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert "spectral/momentum_nuclear/net.0.weight" in tags["scalars"]
    assert "spectral/momentum_spectrum/net.0.weight" in tags["histograms"]
    assert "custom_scalars__config__" in tags["tensors"]
    assert "spectral/stable_rank" in tags["images"]


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_lightning_cli_reads_the_callbacks_from_yaml(package, tmp_path):
    names = [callback.__name__ for callback in CALLBACKS]
    config = {
        "accelerator": "cpu",
        "logger": False,
        "callbacks": [{"class_path": f"lit_fanions.callbacks.{name}"} for name in names],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": config}))
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    read = cli(type(module_of(package)), run=False, args=["--config", str(path)])
    assert set(CALLBACKS) <= {type(callback) for callback in read.trainer.callbacks}


def test_private_attributes_exist_in_the_installed_versions(package, tmp_path):
    trainer = trainer_of(package, tmp_path, max_epochs=1)
    assert optimizer_steps(trainer) == 0
    trainer.fit(module_of(package))
    assert optimizer_steps(trainer) == trainer.global_step == 3
    net = nn.Sequential(nn.Linear(2, 2))
    assert not is_compiled(net)
    wrapped = torch.compile(net, backend="eager")
    assert is_compiled(wrapped)
    names = [name_without_wrappers(name) for name, _ in wrapped.named_parameters()]
    assert names == ["0.weight", "0.bias"]
    net.compile(backend="eager")
    assert is_compiled(net)
    assert padding(nn.Conv2d(1, 1, (3, 4), padding="same")) == [1, 2, 1, 1]
    assert "SpectralMonitor" in SpectralMonitor().state_key


def test_quantities_and_figures_load_no_callback():
    code = (
        "import sys, lit_fanions.callbacks.quantities, lit_fanions.callbacks.figures; "
        "found = {'pytorch_lightning', 'lit_fanions.callbacks.watching'}; "
        "assert not found & set(sys.modules), found & set(sys.modules); "
        "from lit_fanions.callbacks import *; NormAdvisor, FanionOptimizer, SpectralMonitor; "
        "from lightning_utilities.core import rank_zero; "
        # The second package must not take over the messages of the first one.
        "assert rank_zero.log.name.startswith('lightning.'), rank_zero.log"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_unknown_name_is_an_attribute_error():
    callbacks = importlib.import_module("lit_fanions.callbacks")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        callbacks.Nothing  # noqa: B018
    assert "SpectralMonitor" in dir(callbacks)

"""StepMonitor: the values of Lightning's monitors, without their waits."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger

from lit_fanions.callbacks import StepMonitor, step_monitor
from tests.callbacks.nets import Net, fit


class Values(Logger):
    """Keeps what is logged: value by name and step."""

    name = version = "values"

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, dict[int, float]] = {}

    def log_hyperparams(self, *args: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            assert step not in self.logged.setdefault(name, {}) or name == "epoch"
            self.logged[name][step] = value


class Counting(Net):
    def count_work(self, batch: Any) -> dict[str, float]:
        return {"samples": len(batch[0]), "flops": 1e6}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that training batches and validations set forward."""
    now = [100.0]
    monkeypatch.setattr(step_monitor.time, "perf_counter", lambda: now[0])
    return now


class Slow(Callback):
    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock[0] += 0.5

    def on_validation_batch_start(self, *args: Any) -> None:
        self.clock[0] += 100


SCHEDULED = {"matrix": {"lr": 0.1}, "schedule": {"shape": "linear"}}


@pytest.mark.parametrize("config", [{}, SCHEDULED, "torch"])
def test_settings_are_those_of_the_learning_rate_monitor(tmp_path: Path, config: Any) -> None:
    logged = []
    for callback in (StepMonitor(), LearningRateMonitor("step", log_momentum=True)):
        torch_optimizer = config == "torch"
        net = Net(None if torch_optimizer else config, torch_optimizer=torch_optimizer)
        values = Values()
        fit(tmp_path, net, callback, logger=values, log_every_n_steps=2)
        wanted = {k: v for k, v in values.logged.items() if not k.startswith("throughput")}
        logged.append({name: steps for name, steps in wanted.items() if steps.keys() == {1, 3, 5}})
    assert logged[0] == logged[1]
    assert any("momentum" in name for name in logged[0])


def test_throughput_leaves_validations_out(tmp_path: Path, clock: list[float]) -> None:
    values = Values()
    options = {"log_every_n_steps": 2, "val_check_interval": 3, "max_epochs": 2}
    net = Counting(torch_optimizer=True)
    fit(tmp_path, net, Slow(clock), StepMonitor(), validate=True, logger=values, **options)
    found = {k: v for k, v in values.logged.items() if k.startswith("throughput/")}
    steps = {3, 5, 7, 9, 11}  # the first logged step starts the clock
    assert {name: each.keys() for name, each in found.items()} == dict.fromkeys(
        ("throughput/steps_per_s", "throughput/samples_per_s", "throughput/flops_per_s"), steps
    )
    for name, rate in (("steps", 2.0), ("samples", 8.0), ("flops", 2e6)):
        assert set(found[f"throughput/{name}_per_s"].values()) == {rate}


def test_accumulated_batches_are_one_step(tmp_path: Path, clock: list[float]) -> None:
    values = Values()
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": 3}
    fit(tmp_path, Counting(), Slow(clock), StepMonitor(), logger=values, max_epochs=2, **options)
    assert values.logged["throughput/steps_per_s"] == dict.fromkeys((1, 2, 3), 1 / 1.5)
    assert values.logged["throughput/samples_per_s"] == dict.fromkeys((1, 2, 3), 12 / 1.5)


class Event:
    """A CUDA event; the device has reached the first ``reached`` of those made."""

    made: ClassVar[list[Any]] = []
    reached = 0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.made.append(self)

    def record(self) -> None:
        self.number = len(self.made)

    def query(self) -> bool:
        return self.number <= Event.reached

    def synchronize(self) -> None:
        Event.waits += 1
        Event.reached = len(self.made)

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "the device has not been there yet"
        return 250.0 * (end.number - self.number)


def test_events_of_a_gpu_are_read_once_they_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)

    class OnCuda(StepMonitor):
        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            super().on_train_start(trainer, *args)
            self._on_cuda = True

    class Lag(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            Event.reached = max(0, len(Event.made) - 2)  # the host is two logged steps ahead
            assert Event.waits == 0

    values = Values()
    fit(tmp_path, Counting(torch_optimizer=True), Lag(), OnCuda(), logger=values)
    assert values.logged["throughput/steps_per_s"] == dict.fromkeys((1, 2, 3, 4, 5), 4.0)
    assert Event.waits == 1


def test_nothing_is_logged_without_a_logger(tmp_path: Path) -> None:
    run = fit(tmp_path, Net(), StepMonitor())
    settings = [name for name in run.callback_metrics if name.startswith("lr")]
    assert settings and all(math.isfinite(run.callback_metrics[name]) for name in settings)


def test_csv_logger_takes_late_steps(tmp_path: Path) -> None:
    fit(tmp_path, Net(), StepMonitor(), logger=CSVLogger(tmp_path, name="", version=""))
    assert "throughput/steps_per_s" in (tmp_path / "metrics.csv").read_text()

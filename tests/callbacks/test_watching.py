"""Which steps and matrices callbacks are shown, with any optimizer."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lit_fanions import Fanion
from lit_fanions.callbacks import SpectralMonitor
from tests.callbacks.nets import BATCHES, MATRICES, Net, fit, loader, trainer
from tests.callbacks.recording import BreakOneGradient, LoggedValues, config

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:SpectralMonitor has no logger"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


def test_only_due_steps_are_observed(tmp_path):
    class Watched(Callback):
        steps: list[bool] = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.steps.append(bool(optimizer.observers))

    watched = Watched()
    fit(tmp_path, Net(config()), SpectralMonitor(3), watched)
    assert watched.steps == [True, False, False, True, False, False]


def test_patterns_choose_the_parameters(tmp_path):
    run = fit(tmp_path, Net(config()), SpectralMonitor(1, parameters=["experts", "d*.weight"]))
    shown = {tag.split("/", 2)[2] for tag in run.callback_metrics if "/weight_" in tag}
    assert {n for n in shown if "group" not in n} == {"down.weight", *MATRICES[-3:]}
    with pytest.raises(ValueError, match=r"no parameter's name matches 'nothing\*'"):
        fit(tmp_path, Net(config()), SpectralMonitor(1, parameters=["nothing*"]))


class Manual(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return (
            Fanion([("down.weight", self.down.weight)], lr=0.1),
            torch.optim.SGD([self.conv.weight, self.head.weight], lr=0.1),
        )


def test_manual_optimization_records_every_optimizer(tmp_path):
    values = LoggedValues()
    fit(tmp_path, Manual(), SpectralMonitor(2), values)
    assert {"oracle_quality/down.weight", "update_rms/conv.weight"} <= values.steps[0].keys()
    assert "update_rms/head.weight" not in values.steps[0]
    counters = [step["weight_spectral/down.weight"] for step in values.steps]
    assert len(set(counters)) == BATCHES // 2


class ByTurns(Manual):
    """Two optimizers that take turns, and change what their steps have used."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()[index % 2]
        self.manual_backward(Net.training_step(self, batch, index))
        if index % 2:
            self.used = self.conv.weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        if index % 2:
            self.conv.weight.grad = torch.full_like(self.conv.weight, 100.0)
            with torch.no_grad():
                self.conv.weight.mul_(2)
            self.conv.weight.grad = None


def test_each_optimizers_own_steps_are_counted_and_recorded_before_later_changes(tmp_path):
    values, net = LoggedValues(), ByTurns()
    fit(tmp_path, net, SpectralMonitor(2), values, max_epochs=2)
    steps = [step for step in values.steps if step]
    assert len({step["weight_spectral/down.weight"] for step in steps}) == 3
    seen = [step.get("gradient_frobenius/conv.weight") for step in values.steps]
    assert seen[0] is None and len(set(seen[1:])) == 3  # batches 1, 5 and 9 of 12
    assert seen[-1] < 50  # that of the step, not what came after it
    lr = values.steps[-1]["update_lr/conv.weight"]
    rms = values.steps[-1]["update_rms/conv.weight"] * net.conv.weight.numel() ** 0.5
    assert rms == pytest.approx(lr * seen[-1], rel=1e-4)


def test_steps_of_torch_optimizers_skipped_by_a_scaler_record_nothing(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    values = LoggedValues()
    fit(tmp_path, Net(torch_optimizer=True), BreakOneGradient(), SpectralMonitor(1), values,
        plugins=[plugin])  # fmt: skip
    assert values.steps[2] == values.steps[1]
    assert values.steps[3]["update_rms/down.weight"] > 0


def test_names_have_no_compiled_wrappers(tmp_path):
    net = Net(config())
    net.down = torch.compile(net.down, backend="eager")
    run = fit(tmp_path, net, SpectralMonitor(1, parameters=["down.weight"]))
    assert "spectral/weight_spectral/down.weight" in run.callback_metrics


def test_an_error_in_a_step_detaches_the_observer(tmp_path):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, *args: Any) -> None:
            raise RuntimeError("stop")

    net = Net(config())
    made = trainer(tmp_path, Failing(), SpectralMonitor(1))
    with pytest.raises(RuntimeError, match="stop"):
        made.fit(net, loader())
    assert made.optimizers[0].observers == ()

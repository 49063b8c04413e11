"""SpectralMonitor: unchanged training, every logger, resuming."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_fanions.callbacks import NormAdvisor, SpectralMonitor, spectral_monitor
from tests.callbacks.nets import BATCHES, MATRICES, Net, assert_bit_equal, everything, fit
from tests.callbacks.recording import BreakOneGradient, LoggedValues, config, scalars

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor has no logger"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor draws no figures"),
]


# The same weights.

RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (config("muon"), {}),
    (config("f_muon", scale="match_rms_adamw", renormalize=True), {}),
    (config("fanion", rank=2), {"accumulate_grad_batches": 2}),
    (config("dion"), {"gradient_clip_val": 0.1}),
    (config("neon", error_feedback=True), {}),
    (config("kyfan", stack_entries=100), {"gradient_clip_val": 1e-2,
                                          "gradient_clip_algorithm": "value"}),
    (config("s_neon"), {"precision": "bf16-mixed"}),
    (config("signum"), {"precision": "bf16-true"}),
    (config("adamw", lr=0.01), {}),
]  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("options", "how"), RUNS, ids=str)
def test_training_is_bit_equal_without_the_monitor(tmp_path, options, how, exact):
    plain = fit(tmp_path, Net(options, dropout=0.3), **how)
    monitor = SpectralMonitor(1, exact=exact)
    watched = fit(tmp_path, Net(options, dropout=0.3), monitor, NormAdvisor(1), **how)
    assert_bit_equal(everything(plain), everything(watched))
    assert f"spectral/weight_spectral/{MATRICES[0]}" in watched.callback_metrics
    assert getattr(watched.optimizers[0], "observers", ()) == ()


def fit_with_scaler(path: Path, *callbacks: Callback) -> Trainer:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    return fit(path, Net(config()), BreakOneGradient(), *callbacks, plugins=[plugin])


def test_a_step_skipped_by_the_scaler_logs_nothing(tmp_path):
    values = LoggedValues()
    plain, watched = (
        fit_with_scaler(tmp_path),
        fit_with_scaler(tmp_path, SpectralMonitor(1), values),
    )
    assert_bit_equal(everything(plain), everything(watched))
    # The step was not taken, so it has no values.
    assert values.steps[2] == values.steps[1]
    assert values.steps[3] != values.steps[2]


def test_steps_skipped_by_the_optimizer_are_counted(tmp_path):
    values = LoggedValues()
    run = fit(tmp_path, Net(config()), BreakOneGradient(), SpectralMonitor(1), values)
    name = "down.weight"
    assert [step[f"update_skipped/{name}"] for step in values.steps] == [0, 0, 1, 1, 1, 1]
    assert values.steps[2][f"update_rms/{name}"] == 0
    # A non-finite gradient has no norm, and the metric of the step before stays.
    norm = f"gradient_nuclear/{name}"
    assert values.steps[2][norm] == values.steps[1][norm] != values.steps[3][norm]
    assert run.global_step == BATCHES


class ScaleGradients(Callback):
    """Sets the largest entry of every gradient."""

    def __init__(self, size: float) -> None:
        self.size = size

    def on_after_backward(self, trainer, pl_module) -> None:
        for p in pl_module.parameters():
            p.grad.div_(p.grad.abs().max()).mul_(self.size)


@pytest.mark.parametrize("size", [1e-40, 1e38, 3e38])
def test_gradients_at_the_ends_of_float32_are_logged(tmp_path, size):
    values, board = LoggedValues(), TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [ScaleGradients(size), SpectralMonitor(1), NormAdvisor(2), values]
    fit(tmp_path, Net(config("s_muon")), *callbacks, logger=board, validate=True)
    for step in values.steps:
        assert 1 <= step["gradient_nuclear_rank/down.weight"] <= 10
        assert step["gradient_nuclear/down.weight"] >= 0.99 * size
        if size < 3e38:  # else the step is skipped
            assert 0.8 < step["oracle_quality/down.weight"] < 1.1


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zero_and_nan_weights_are_drawn(tmp_path, value):
    net = Net(config(weight_decay=0.0))
    torch.nn.init.constant_(net.down.weight, value)
    board = TensorBoardLogger(tmp_path, name="", version="")
    monitor = SpectralMonitor(50, parameters=["down.weight"])
    run = fit(tmp_path, net, monitor, logger=board, validate=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    # A weight of zero or NaN has no stable rank; a gradient of NaN has no spectrum either.
    assert "spectral/weight_stable_rank/down.weight" not in run.callback_metrics
    assert run.global_step == BATCHES
    images = events.Tags()["images"]
    assert images == (["spectral/singular_values"] if value == 0 else [])


def test_long_runs_drop_every_other_step_of_the_history(tmp_path, monkeypatch):
    monkeypatch.setattr(spectral_monitor, "_MAX_HISTORY", 4)
    monitor = SpectralMonitor(1)
    fit(tmp_path, Net(config()), monitor, max_epochs=2)
    steps = sorted(monitor._history)
    assert len(steps) <= 4 and steps[0] == 0 and steps[-1] >= 2 * BATCHES - 4


def test_two_monitors_of_the_same_matrices_warn(tmp_path):
    with pytest.warns(UserWarning, match="two SpectralMonitors log the same matrices"):
        fit(tmp_path, Net(config()), SpectralMonitor(2), SpectralMonitor(3))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="two SpectralMonitors")
        fit(tmp_path, Net(config()), SpectralMonitor(2), SpectralMonitor(3, parameters=["down.*"]))


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"every_n_steps": True}, {"rank": 0},
                                   {"rank": 2.5}, {"exact": "no"}, {"parameters": "down.*"},
                                   {"parameters": []}])  # fmt: skip
def test_options_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpectralMonitor(**wrong)


# Loggers.


def test_scalars_go_to_every_logger_and_the_rest_to_tensorboard(tmp_path):
    board, table = TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path / "csv")
    monitor = SpectralMonitor(2)
    run = fit(tmp_path, Net(config()), monitor, logger=[board, table], validate=True)
    tag = "spectral/momentum_nuclear/down.weight"
    curve = scalars(tmp_path, tag)
    assert [step for step, _ in curve] == [0, 2, 4]
    assert curve[-1][1] == pytest.approx(float(run.callback_metrics[tag]), rel=1e-6)
    lines = (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert tag in lines[0].split(",")

    events = EventAccumulator(str(tmp_path)).Reload()
    histogram = events.Histograms("spectral/momentum_spectrum/experts[1]")[-1].histogram_value
    assert histogram.num == sum(histogram.bucket) == 10
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    layout = events.Tensors("custom_scalars__config__")
    assert len(layout) == 1
    assert b"momentum_nuclear/group/matrix" in layout[0].tensor_proto.string_val[0]
    images = ["spectral/singular_values", "spectral/stable_rank"]
    assert sorted(events.Tags()["images"]) == images


def test_a_missing_logger_warns_once_and_metrics_stay(tmp_path):
    monitor = SpectralMonitor(1)
    with pytest.warns(UserWarning, match="no logger") as caught:
        run = fit(tmp_path, Net(config()), monitor)
        fit(tmp_path, Net(config()), monitor)
    assert sum("no logger" in str(w.message) for w in caught) == 1
    assert "spectral/momentum_nuclear/down.weight" in run.callback_metrics


@pytest.mark.parametrize("how", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_fast_dev_run_and_barebones_log_nothing(tmp_path, how, recwarn):
    settings = {
        "logger": None, "enable_checkpointing": None, "enable_progress_bar": None,
        "enable_model_summary": None, "log_every_n_steps": None,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SpectralMonitor")
        run = fit(tmp_path, Net(config()), SpectralMonitor(1), **{**settings, **how})
    assert run.optimizers[0].observers == ()
    assert not list(tmp_path.rglob("events*"))


# Resuming, stopping, the best checkpoint.


def test_a_resumed_run_logs_the_remaining_steps(tmp_path):
    keep = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = TensorBoardLogger(tmp_path / "whole", name="", version="")
    straight = fit(tmp_path, Net(config()), SpectralMonitor(1), keep, logger=whole, max_epochs=2)
    (saved,) = (tmp_path / "saved").glob("*step=6.ckpt")
    rest = TensorBoardLogger(tmp_path / "rest", name="", version="")
    monitor = SpectralMonitor(1)
    resumed = fit(
        tmp_path, Net(config()), monitor, logger=rest, ckpt_path=saved, max_epochs=2
    )  # fmt: skip
    assert_bit_equal(everything(straight), everything(resumed))
    tag = "spectral/momentum_nuclear/down.weight"
    expected = scalars(tmp_path / "whole", tag)
    assert [step for step, _ in expected] == list(range(2 * BATCHES))
    assert scalars(tmp_path / "rest", tag) == expected[6:]
    assert sorted(monitor._history) == list(range(2 * BATCHES))  # the figure shows all of it


def test_a_second_fit_clears_the_history(tmp_path):
    monitor = SpectralMonitor(1)
    fit(tmp_path, Net(config()), monitor, max_epochs=2)
    fit(tmp_path, Net(config()), monitor)
    assert sorted(monitor._history) == list(range(BATCHES))


def test_early_stopping_and_checkpoints_monitor_its_values(tmp_path):
    tag = "spectral/weight_spectral/down.weight"
    values = LoggedValues()
    fit(tmp_path, Net(config()), SpectralMonitor(1), values, max_epochs=6, validate=True)
    ends = [step[tag.removeprefix("spectral/")] for step in values.steps][BATCHES - 1 :: BATCHES]
    threshold = (ends[2] + ends[3]) / 2
    grows = ends[3] > ends[2]
    assert all((end > threshold) == grows for end in ends[3:])
    assert not any((end > threshold) == grows for end in ends[:3])
    stop = EarlyStopping(
        tag, patience=99, **{"stopping_threshold": threshold, "mode": "max" if grows else "min"}
    )
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor=tag, mode="max", save_top_k=1)
    run = fit(
        tmp_path, Net(config()), SpectralMonitor(1), stop, keep, max_epochs=6, validate=True
    )  # fmt: skip
    assert run.current_epoch == 4
    assert float(keep.best_model_score) == pytest.approx(max(ends[:4]), rel=1e-6)


def test_accumulation_counts_optimizer_steps(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, Net(config()), SpectralMonitor(2), logger=board, accumulate_grad_batches=2,
        max_epochs=2)  # fmt: skip
    assert [step for step, _ in scalars(tmp_path, "spectral/update_lr/down.weight")] == [0, 2, 4]

"""SpectralMonitor: right values, the same weights, every kind of run."""

import math
import multiprocessing
import os
import socket
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lit_fanions import Fanion, norms
from lit_fanions.callbacks import NormAdvisor, SpectralMonitor, figures, spectral_monitor
from lit_fanions.callbacks.quantities import QUANTITIES
from lit_fanions.lmo.spectrum import QUANTILES
from lit_fanions.optim.matrices import to_matrices
from tests.callbacks.nets import (
    BATCHES,
    MATRICES,
    Net,
    assert_bit_equal,
    everything,
    fit,
    loader,
    trainer,
)  # fmt: skip

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor has no logger"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor draws no figures"),
]


def config(algorithm: str = "muon", **options: Any) -> dict[str, Any]:
    matrix = {"algorithm": algorithm, "lr": 0.05, "weight_decay": 0.1, **options}
    return {"matrix": matrix, "other": {"lr": 0.01}}


class Values(Callback):
    """What the monitor gave at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        names = tuple(f"{name}/" for name in QUANTITIES)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(names)}
        self.steps.append(metrics)


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
def test_monitoring_changes_no_bit(tmp_path, options, how, exact):
    plain = fit(tmp_path, Net(options, dropout=0.3), **how)
    monitor = SpectralMonitor(1, exact=exact)
    watched = fit(tmp_path, Net(options, dropout=0.3), monitor, NormAdvisor(1), **how)
    assert_bit_equal(everything(plain), everything(watched))
    assert f"weight_spectral/{MATRICES[0]}" in watched.callback_metrics
    assert getattr(watched.optimizers[0], "observers", ()) == ()


class BreakOneGradient(Callback):
    """Makes a scaled gradient infinite in the third step."""

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == 2:
            pl_module.down.weight.grad[0, 0] = torch.inf


def with_scaler(path: Path, *callbacks: Callback) -> Trainer:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    return fit(path, Net(config()), BreakOneGradient(), *callbacks, plugins=[plugin])


def test_a_step_that_the_scaler_skips(tmp_path):
    values = Values()
    plain, watched = with_scaler(tmp_path), with_scaler(tmp_path, SpectralMonitor(1), values)
    assert_bit_equal(everything(plain), everything(watched))
    # Nothing was done in that step, so nothing new is told of it.
    assert values.steps[2] == values.steps[1]
    assert values.steps[3] != values.steps[2]


def test_a_step_that_the_optimizer_skips_is_counted(tmp_path):
    values = Values()
    run = fit(tmp_path, Net(config()), BreakOneGradient(), SpectralMonitor(1), values)
    name = "down.weight"
    assert [step[f"update_skipped/{name}"] for step in values.steps] == [0, 0, 1, 1, 1, 1]
    assert values.steps[2][f"update_rms/{name}"] == 0
    # The gradient has no norm then; the last one stays.
    norm = f"gradient_nuclear/{name}"
    assert values.steps[2][norm] == values.steps[1][norm] != values.steps[3][norm]
    assert run.global_step == BATCHES


def test_other_steps_are_left_alone(tmp_path):
    class Watched(Callback):
        steps: list[bool] = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.steps.append(bool(optimizer.observers))

    watched = Watched()
    fit(tmp_path, Net(config()), SpectralMonitor(3), watched)
    assert watched.steps == [True, False, False, True, False, False]


# Right values.


class Truth(Callback):
    """Gradients and weights around every step, seen from outside."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.momenta: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.before.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        named = dict(pl_module.named_parameters())
        self.gradients.append({n: p.grad.clone() for n, p in named.items()})
        self.after.append({n: p.detach().clone() for n, p in named.items()})
        state = trainer.optimizers[0].state
        self.momenta.append(
            {n: state[p]["momentum"].clone() for n, p in named.items() if "momentum" in state[p]}
        )


FORMS = {"attention.in_proj_weight": {"splits": 3}, "experts": {"layout": "batch"}}


def matrix(tensors: dict[str, Tensor], name: str) -> Tensor:
    parameter, _, index = name.removesuffix("]").partition("[")
    parts = to_matrices(tensors[parameter], **FORMS.get(parameter, {}))
    return torch.cat(parts)[int(index or 0)].double()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("algorithm", ["muon", "f_fanion", "kyfan"])
def test_values_are_those_of_a_float64_svd(tmp_path, algorithm, exact):
    values, truth = Values(), Truth()
    options = config(algorithm, **({} if algorithm == "muon" else {"rank": 2}), scale="original")
    fit(tmp_path, Net(options), SpectralMonitor(1, exact=exact), values, truth)
    norm = {
        "muon": norms.Spectral(),
        "f_fanion": norms.Blend(norms.KyFanDual(2), 0.5),
        "kyfan": norms.KyFan(2),
    }[algorithm]
    for step, got in enumerate(values.steps):
        for name in MATRICES:
            g = matrix(truth.gradients[step], name)
            m = 0.05 * g + 0.95 * matrix(truth.momenta[step], name)  # Nesterov
            before, after = matrix(truth.before[step], name), matrix(truth.after[step], name)
            rows, cols = before.shape
            k = 2 if algorithm != "muon" else min(rows, cols) // 4
            want = {
                "gradient_dual": norm.dual(g),
                "momentum_dual": norm.dual(m),
                **{f"gradient_{key}": value for key, value in of(g, k).items()},
                **{f"momentum_{key}": value for key, value in of(m, k).items()},
                "update_rms": (after - before).square().mean().sqrt(),
                "update_spectral": svd(after - before)[0],
                "update_relative": (after - before).norm() / before.norm(),
                "update_lr": torch.tensor(0.05 * max(1, rows / cols) ** 0.5),
                "update_skipped": torch.tensor(0.0),
                "weight_spectral": svd(before)[0],
                "weight_stable_rank": before.norm().square() / svd(before)[0].square(),
            }
            ratios = (svd(m) / svd(m)[0]).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
            for q, ratio in zip(QUANTILES, ratios, strict=True):
                want[f"momentum_quantile{round(100 * q)}"] = ratio
            for key, value in want.items():
                assert got[f"{key}/{name}"] == pytest.approx(float(value), rel=1e-3, abs=1e-6), (
                    key, name, step,
                )  # fmt: skip
            assert 0.97 <= got[f"oracle_quality/{name}"] <= 1.01
            assert set(QUANTITIES) - set(want) == {"oracle_quality", "oracle_residual"}


def svd(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x)


def of(x: Tensor, k: int) -> dict[str, Tensor]:
    s = svd(x)
    square = s.square().sum()
    return {
        "nuclear": s.sum(), "spectral": s[0], "frobenius": square.sqrt(), "kyfan": s[:k].sum(),
        "nuclear_rank": s.sum().square() / square, "energy": s[:k].square().sum() / square,
    }  # fmt: skip


@pytest.mark.parametrize("exact_oracle", [True, False])
def test_the_oracles_quality(tmp_path, exact_oracle):
    values = Values()
    options = {"polar": "exact"} if exact_oracle else {"polar": "convergent", "polar_steps": 1}
    fit(tmp_path, Net(config(**options)), SpectralMonitor(1), values)
    qualities = [step[f"oracle_quality/{name}"] for step in values.steps for name in MATRICES]
    if exact_oracle:
        assert qualities == pytest.approx([1.0] * len(qualities), rel=1e-4)
    else:
        assert min(qualities) < 0.9


def test_the_residual_of_error_feedback(tmp_path):
    values, truth = Values(), Truth()
    options = config("neon", error_feedback=True, solver="exact")
    fit(tmp_path, Net(options), SpectralMonitor(1, exact=True), values, truth)
    for name in MATRICES:
        m = matrix(truth.gradients[0], name)  # the first momentum
        s = svd(m)
        want = s[1:].norm() / s.norm()
        assert values.steps[0][f"oracle_residual/{name}"] == pytest.approx(float(want), rel=1e-3)


def test_group_values_are_means(tmp_path):
    run = fit(tmp_path, Net(config()), SpectralMonitor(1))
    # Groups of the configuration: the optimizer has three of this one, of different matrix forms.
    members = [run.callback_metrics[f"momentum_nuclear/{name}"] for name in MATRICES]
    mean = run.callback_metrics["momentum_nuclear/group/matrix"]
    assert mean == pytest.approx(float(sum(members)) / len(MATRICES), rel=1e-5)


@pytest.mark.parametrize("net", [Net(torch_optimizer=True), Net(config("adamw"))],
                         ids=["torch", "adamw"])  # fmt: skip
def test_other_optimizers_show_gradients_updates_and_weights(tmp_path, net):
    values, truth = Values(), Truth()
    fit(tmp_path, net, SpectralMonitor(1, exact=True), values, truth)
    assert not any(tag.startswith(("momentum", "oracle")) for tag in values.steps[0])
    for step, got in enumerate(values.steps):
        for name in MATRICES:
            g, w = (matrix(tensors[step], name) for tensors in (truth.gradients, truth.before))
            change = matrix(truth.after[step], name) - w
            assert got[f"gradient_nuclear/{name}"] == pytest.approx(float(svd(g).sum()), rel=1e-3)
            assert got[f"weight_spectral/{name}"] == pytest.approx(float(svd(w)[0]), rel=1e-3)
            want = float(change.norm() / w.norm())
            assert got[f"update_relative/{name}"] == pytest.approx(want, rel=1e-3)
        assert "update_lr/group/matrix" in got
    shown = {tag.partition("/")[2] for tag in values.steps[0]} - {"group/matrix"}
    assert {name for name in shown if not name.startswith("group/")} == set(MATRICES)


def test_only_the_parameters_asked_for(tmp_path):
    run = fit(tmp_path, Net(config()), SpectralMonitor(1, parameters=["experts", "d*.weight"]))
    shown = {tag.partition("/")[2] for tag in run.callback_metrics if tag.startswith("weight_")}
    assert {n for n in shown if "group" not in n} == {"down.weight", *MATRICES[-3:]}
    with pytest.raises(ValueError, match=r"no parameter's name matches 'nothing\*'"):
        fit(tmp_path, Net(config()), SpectralMonitor(1, parameters=["nothing*"]))


def test_the_rank_asked_for(tmp_path):
    metrics = fit(tmp_path, Net(config()), SpectralMonitor(1, rank=1)).callback_metrics
    for name in MATRICES:
        assert metrics[f"gradient_kyfan/{name}"] == metrics[f"gradient_spectral/{name}"]


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


def test_manual_optimization_of_several_optimizers(tmp_path):
    values = Values()
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


def test_each_optimizers_own_steps_as_they_were(tmp_path):
    values, net = Values(), ByTurns()
    fit(tmp_path, net, SpectralMonitor(2), values, max_epochs=2)
    steps = [step for step in values.steps if step]
    assert len({step["weight_spectral/down.weight"] for step in steps}) == 3
    seen = [step.get("gradient_frobenius/conv.weight") for step in values.steps]
    assert seen[0] is None and len(set(seen[1:])) == 3  # batches 1, 5 and 9 of 12
    assert seen[-1] < 50  # that of the step, not what came after it
    lr = values.steps[-1]["update_lr/conv.weight"]
    rms = values.steps[-1]["update_rms/conv.weight"] * net.conv.weight.numel() ** 0.5
    assert rms == pytest.approx(lr * seen[-1], rel=1e-4)


def test_a_scaler_skips_the_steps_of_other_optimizers_too(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    values = Values()
    fit(tmp_path, Net(torch_optimizer=True), BreakOneGradient(), SpectralMonitor(1), values,
        plugins=[plugin])  # fmt: skip
    assert values.steps[2] == values.steps[1]
    assert values.steps[3]["update_rms/down.weight"] > 0


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_weights_without_a_rank_break_no_figure(tmp_path, value):
    net = Net(config(weight_decay=0.0))
    torch.nn.init.constant_(net.down.weight, value)
    board = TensorBoardLogger(tmp_path, name="", version="")
    monitor = SpectralMonitor(50, parameters=["down.weight"])
    fit(tmp_path, net, monitor, logger=board, validate=True)


def test_long_runs_forget_every_other_look(tmp_path, monkeypatch):
    monkeypatch.setattr(spectral_monitor, "_REMEMBERED", 4)
    monitor = SpectralMonitor(1)
    fit(tmp_path, Net(config()), monitor, max_epochs=2)
    steps = sorted(monitor._history)
    assert len(steps) <= 4 and steps[0] == 0 and steps[-1] >= 2 * BATCHES - 4


def test_two_monitors_of_the_same_matrices_are_told(tmp_path):
    with pytest.warns(UserWarning, match="two SpectralMonitors log the same matrices"):
        fit(tmp_path, Net(config()), SpectralMonitor(2), SpectralMonitor(3))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="two SpectralMonitors")
        fit(tmp_path, Net(config()), SpectralMonitor(2), SpectralMonitor(3, parameters=["down.*"]))


def test_names_are_those_without_compiled_wrappers(tmp_path):
    net = Net(config())
    net.down = torch.compile(net.down, backend="eager")
    run = fit(tmp_path, net, SpectralMonitor(1, parameters=["down.weight"]))
    assert "weight_spectral/down.weight" in run.callback_metrics


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"every_n_steps": True}, {"rank": 0},
                                   {"rank": 2.5}])  # fmt: skip
def test_options_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpectralMonitor(**wrong)


# Loggers.


def scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_two_loggers(tmp_path):
    board, table = TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path / "csv")
    monitor = SpectralMonitor(2)
    run = fit(tmp_path, Net(config()), monitor, logger=[board, table], validate=True)
    tag = "momentum_nuclear/down.weight"
    curve = scalars(tmp_path, tag)
    assert [step for step, _ in curve] == [0, 2, 4]
    assert curve[-1][1] == pytest.approx(float(run.callback_metrics[tag]), rel=1e-6)
    lines = (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert tag in lines[0].split(",")

    events = EventAccumulator(str(tmp_path)).Reload()
    histogram = events.Histograms("momentum_spectrum/experts[1]")[-1].histogram_value
    assert histogram.num == sum(histogram.bucket) == 10
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    layout = events.Tensors("custom_scalars__config__")
    assert len(layout) == 1
    assert b"momentum_nuclear/group/" in layout[0].tensor_proto.string_val[0]
    images = ["spectra/singular_values", "spectra/stable_rank"] if figures.available() else []
    assert sorted(events.Tags()["images"]) == images


def test_without_a_logger_it_warns_once_and_goes_on(tmp_path):
    monitor = SpectralMonitor(1)
    with pytest.warns(UserWarning, match="no logger") as caught:
        run = fit(tmp_path, Net(config()), monitor)
        fit(tmp_path, Net(config()), monitor)
    assert sum("no logger" in str(w.message) for w in caught) == 1
    assert "momentum_nuclear/down.weight" in run.callback_metrics


@pytest.mark.parametrize("how", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_trials_and_barebones_are_quiet(tmp_path, how, recwarn):
    settings = {
        "logger": None, "enable_checkpointing": None, "enable_progress_bar": None,
        "enable_model_summary": None, "log_every_n_steps": None,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SpectralMonitor")
        run = fit(tmp_path, Net(config()), SpectralMonitor(1), **{**settings, **how})
    assert run.optimizers[0].observers == ()
    assert not list(tmp_path.rglob("events*"))


def test_without_matplotlib_only_the_figures_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    board = TensorBoardLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="pip install matplotlib") as caught:
        fit(tmp_path, Net(config()), SpectralMonitor(1), logger=board, validate=True,
            val_check_interval=2)  # fmt: skip
    assert sum("matplotlib" in str(w.message) for w in caught) == 1
    assert scalars(tmp_path, "momentum_nuclear/down.weight")


# Resuming, stopping, the best checkpoint.


def test_a_resumed_run_repeats_no_step(tmp_path):
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
    tag = "momentum_nuclear/down.weight"
    expected = scalars(tmp_path / "whole", tag)
    assert [step for step, _ in expected] == list(range(2 * BATCHES))
    assert scalars(tmp_path / "rest", tag) == expected[6:]
    assert sorted(monitor._history) == list(range(2 * BATCHES))  # the figure shows all of it


def test_another_run_starts_anew(tmp_path):
    monitor = SpectralMonitor(1)
    fit(tmp_path, Net(config()), monitor, max_epochs=2)
    fit(tmp_path, Net(config()), monitor)
    assert sorted(monitor._history) == list(range(BATCHES))


def test_early_stopping_and_checkpoints_follow_its_values(tmp_path):
    tag = "weight_spectral/down.weight"
    values = Values()
    fit(tmp_path, Net(config()), SpectralMonitor(1), values, max_epochs=6, validate=True)
    ends = [step[tag] for step in values.steps][BATCHES - 1 :: BATCHES]
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
    assert [step for step, _ in scalars(tmp_path, "update_lr/down.weight")] == [0, 2, 4]


def test_an_error_in_a_step_leaves_the_optimizer_alone(tmp_path):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, *args: Any) -> None:
            raise RuntimeError("stop")

    net = Net(config())
    made = trainer(tmp_path, Failing(), SpectralMonitor(1))
    with pytest.raises(RuntimeError, match="stop"):
        made.fit(net, loader())
    assert made.optimizers[0].observers == ()


# Two processes.


class Sharded(Net):
    """The same, sharded by FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.conv, self.down, self.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def _rank(rank: int, folder: Path, kind: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", NODE_RANK="0", GROUP_RANK="0", LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    try:
        for watch in (True, False):
            values = Values()
            callbacks = [SpectralMonitor(1, exact=True), values] if watch else []
            strategy = "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1)
            options = config("adamw", lr=0.01) if kind == "fsdp2 adamw" else config("f_muon")
            net = (Net if kind == "ddp" else Sharded)(options)
            board = TensorBoardLogger(folder / f"logs{watch}", name="", version="")
            run = fit(folder, net, *callbacks, logger=board, strategy=strategy, devices=2)
            weights = {
                name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
                for name, p in run.lightning_module.named_parameters()
            }
            torch.save((values.steps, weights), folder / f"{rank}{watch}.pt")
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 adamw"])
def test_two_processes_see_the_same(tmp_path, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(i, tmp_path, kind, port)) for i in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    errors = [path.read_text() for path in tmp_path.glob("error*")]
    assert not errors, errors[0]
    (first, weights), (second, _) = (torch.load(tmp_path / f"{i}True.pt") for i in range(2))
    _, unwatched = torch.load(tmp_path / "0False.pt")
    assert_bit_equal(weights, unwatched)
    assert len(first) == BATCHES // 2
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    inside = "update_rms" if kind == "fsdp2 adamw" else "oracle_quality"
    assert {f"{inside}/{name}" for name in MATRICES} <= first[0].keys()
    curve = scalars(tmp_path / "logsTrue", "weight_spectral/down.weight")
    want = [step["weight_spectral/down.weight"] for step in first]
    assert [step for step, _ in curve] == list(range(len(first)))
    assert [value for _, value in curve] == pytest.approx(want)

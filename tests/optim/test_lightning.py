"""The optimizer in Lightning's automatic optimization: resume, clipping, monitors, AMP."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_fanions import Fanion, FanionConfig, configure_optimizers

BATCHES = 6


class Points(Dataset):
    """Two classes of tokens."""

    def __init__(self, size: int = BATCHES * 4) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randint(0, 9, (size, 5), generator=generator)
        self.y = (self.x.sum(-1) % 3).long()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class Stream(IterableDataset):
    """The same without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        points = Points()
        return (points[i] for i in range(len(points)))


class Net(LightningModule):
    """Embedding, convolution, attention, head: every standard group."""

    def __init__(self, config: Any = None, **options: Any) -> None:
        super().__init__()
        plain = FanionConfig.from_dict(config).to_dict()
        self.save_hyperparameters({"config": plain, **options})
        self.config, self.options = plain, options
        torch.manual_seed(3)
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 12, 3)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.embed(x).mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x).mean(1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.config, **self.options)


CONFIG = {
    "matrix": {"algorithm": "f_fanion", "rank": 2, "lr": 0.05, "weight_decay": 0.1},
    "other": {"lr": 0.01},
    "overrides": {"vector": {"algorithm": "sgd", "lr": 0.05}},
    "schedule": {"shape": "linear", "warmup": 2, "momentum_warmup": 4, "floor": 0.1},
}


def loader(data: Dataset | None = None) -> DataLoader:
    return DataLoader(Points() if data is None else data, batch_size=4)


def trainer(path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": path, "accelerator": "cpu", "max_epochs": 2, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [*callbacks],
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }  # fmt: skip
    return Trainer(**{**settings, **options})


def fit(path: Path, net: Net | None = None, *callbacks: Callback, **options: Any) -> Trainer:
    data, ckpt_path = options.pop("data", None), options.pop("ckpt_path", None)
    made = trainer(path, *callbacks, **options)
    made.fit(Net(CONFIG) if net is None else net, loader(data), ckpt_path=ckpt_path)
    return made


def everything(run: Trainer) -> dict[str, Tensor]:
    """Weights and optimizer state by name, and the groups' numbers."""
    found = dict(run.lightning_module.state_dict())
    (optimizer,) = run.optimizers
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found |= {f"{name}: {key}": value for key, value in optimizer.state[p].items()}
        for key in ("lr", "momentum"):
            found[f"{group['name']}: {key}"] = torch.tensor(group[key], dtype=torch.float64)
    return {key: value.detach().clone() for key, value in found.items()}


def assert_bit_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


class Seen(Callback):
    """What every optimizer step finds."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in pl_module.named_parameters()}
        )  # fmt: skip

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(torch.stack([g.norm() for g in grads]).norm().item())


def test_a_run_equals_a_plain_loop(tmp_path):
    net = Net(CONFIG, total_steps=2 * BATCHES)
    made = configure_optimizers(net, CONFIG, total_steps=2 * BATCHES)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for batch in itertools.chain(loader(), loader()):
        optimizer.zero_grad()
        net.training_step(batch, 0).backward()
        optimizer.step()
        schedule.step()
    want = {name: p.detach() for name, p in net.named_parameters()}
    got = fit(tmp_path).lightning_module.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_accumulation_steps_on_the_mean_gradient(tmp_path):
    seen = Seen()
    run = fit(tmp_path, None, seen, accumulate_grad_batches=3)
    assert run.global_step == len(seen.gradients) == 4
    net = Net(CONFIG)
    batches = [*loader()][:3]
    torch.stack([net.training_step(batch, 0) for batch in batches]).mean().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(seen.gradients[0][name], p.grad)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(tmp_path, algorithm):
    seen = Seen()
    fit(tmp_path, None, seen, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    limit = 1e-3 * (1 if algorithm == "norm" else 50)
    assert seen.norms and max(seen.norms) <= limit * 1.001
    assert max(g.abs().max() for gs in seen.gradients for g in gs.values()) > 1e-3


def test_the_lr_monitor_shows_every_group_by_name(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    run = fit(
        tmp_path, None, LearningRateMonitor("step", log_momentum=True, log_weight_decay=True),
        logger=CSVLogger(tmp_path), log_every_n_steps=1,
    )  # fmt: skip
    names = {group["name"] for group in run.optimizers[0].param_groups}
    assert {"matrix", "matrix.splits3", "embedding", "head", "vector"} == names
    (monitor,) = (c for c in run.callbacks if isinstance(c, LearningRateMonitor))
    assert set(monitor.lrs) == {f"lr/{name}" for name in names}
    columns = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    for name in names:
        for column in (f"lr/{name}", f"lr/{name}-momentum", f"lr/{name}-weight_decay"):
            assert column in columns.split(",")


def checkpoints(path: Path, every: int = 1) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{step}", every_n_train_steps=every, save_top_k=-1)


@pytest.mark.parametrize("algorithm", ["muon", "f_neon", "kyfan", "dion", "signum", "adamw", "sgd"])
def test_resume_inside_an_epoch_is_bit_equal(tmp_path, algorithm):
    matrix = {"algorithm": algorithm, "lr": 0.05, "weight_decay": 0.1}
    schedule = {"shape": "linear", "steps": 10, "warmup": 2, "momentum_warmup": 4}
    resumed_equals_uninterrupted(tmp_path, {**CONFIG, "matrix": matrix, "schedule": schedule}, 8)


@pytest.mark.parametrize("step", [2, 8])
def test_resume_is_bit_equal_with_a_schedule_as_long_as_the_run(tmp_path, step):
    """Asking the trainer for that must not lose the place of a loader that resumes itself."""
    resumed_equals_uninterrupted(tmp_path, CONFIG, step)


def resumed_equals_uninterrupted(path: Path, config: dict[str, Any], step: int) -> None:
    straight = trainer(path, checkpoints(path / "saved"))
    straight.fit(Net(config), Stateful(loader()))
    (saved,) = (path / "saved").glob(f"*step={step}.ckpt")
    resumed = trainer(path, checkpoints(path / "again"))
    resumed.fit(Net(config), Stateful(loader()), ckpt_path=saved)
    assert resumed.global_step == straight.global_step == 2 * BATCHES
    assert_bit_equal(everything(resumed), everything(straight))


class Stateful:
    """A loader whose place in the epoch is saved in checkpoints.

    Args:
        loader: Batches of an epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.done = loader, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.done %= len(self)
        for batch in itertools.islice(self.loader, self.done, None):
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path):
    fit(tmp_path, None, checkpoints(tmp_path / "saved", 4))
    (saved,) = (tmp_path / "saved").glob("*step=4.ckpt")
    other = Net({**CONFIG, "matrix": {"algorithm": "neon", "lr": 0.05}})
    with pytest.raises(ValueError, match="'f_fanion' there, 'neon' here"):
        fit(tmp_path, other, ckpt_path=saved)


def test_a_model_is_loaded_from_a_checkpoint_with_its_configuration(tmp_path):
    run = fit(tmp_path, None, checkpoints(tmp_path / "saved", 2 * BATCHES))
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    torch.load(saved, weights_only=True)
    net = Net.load_from_checkpoint(saved)
    assert FanionConfig.from_dict(net.config) == FanionConfig.from_dict(CONFIG)
    for name, value in run.lightning_module.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


# Total steps.


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_epochs": 3}, 3 * BATCHES),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": -1, "max_steps": 5}, 5),
    ],
)
def test_the_schedule_takes_its_length_from_the_trainer(tmp_path, options, total):
    run = fit(tmp_path, **options)
    schedule = run.lr_scheduler_configs[0].scheduler
    assert schedule.total_steps == schedule.last_epoch == total
    base = dict(zip((g["name"] for g in run.optimizers[0].param_groups), schedule.base_lrs,
                    strict=True))  # fmt: skip
    last = {g["name"]: g["lr"] for g in run.optimizers[0].param_groups}
    assert last == pytest.approx({name: 0.1 * lr for name, lr in base.items()})


def test_a_stream_without_max_steps_asks_for_them(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        fit(tmp_path, data=Stream())
    run = fit(tmp_path, data=Stream(), max_epochs=-1, max_steps=5)
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 5


def test_an_endless_run_asks_for_max_steps_too(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        fit(tmp_path, max_epochs=-1)


def test_a_schedule_that_never_ends_asks_for_nothing(tmp_path):
    config = {**CONFIG, "schedule": {"warmup": 2}}
    run = fit(tmp_path, Net(config), data=Stream(), max_epochs=1)
    assert run.global_step == BATCHES


# Precision, non-finite gradients, fast_dev_run.


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(tmp_path, precision):
    run = fit(tmp_path, precision=precision)
    values = everything(run)
    assert all(value.isfinite().all() for value in values.values())
    want = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert values["conv.weight: momentum"].dtype == want[precision]


class Poison(Callback):
    """Breaks one gradient of the third step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 2:
            pl_module.conv.weight.grad[0] = torch.nan


def test_a_broken_gradient_is_skipped_and_counted(tmp_path):
    values = everything(fit(tmp_path, None, Poison()))
    assert all(value.isfinite().all() for value in values.values())
    assert values["conv.weight: skipped"] == 1 and values["head.weight: skipped"] == 0


def test_nonfinite_error_stops_the_run_with_the_name(tmp_path):
    config = {**CONFIG, "matrix": {**CONFIG["matrix"], "nonfinite": "error"}}
    with pytest.raises(FloatingPointError, match=r"gradient of conv\.weight"):
        fit(tmp_path, Net(config), Poison())


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_a_trial_run_works(tmp_path):
    assert fit(tmp_path, fast_dev_run=True).global_step == 1


def test_training_learns(tmp_path):
    run = fit(tmp_path, max_epochs=30)
    assert run.callback_metrics["loss"] < 0.7


# Other ways to use it in Lightning.


class Manual(Net):
    """Steps by hand, with torch's scheduler."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_works(tmp_path):
    run = fit(tmp_path, Manual())
    assert run.global_step == 2 * BATCHES


class WithOneCycle(Net):
    """Fanion with a scheduler of torch."""

    def configure_optimizers(self) -> Any:
        optimizer = Fanion(
            [{"params": [(n, p) for n, p in self.named_parameters() if n == "conv.weight"]},
             {"params": [(n, p) for n, p in self.named_parameters() if n != "conv.weight"],
              "algorithm": "adamw", "lr": 1e-3}]
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [0.05, 0.01], total_steps=2 * BATCHES, cycle_momentum=True
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }


def test_one_cycle_and_the_monitor_agree(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    run = fit(tmp_path, WithOneCycle(), LearningRateMonitor("step", log_momentum=True),
              logger=CSVLogger(tmp_path), log_every_n_steps=1)  # fmt: skip
    columns = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    for column in ("lr/muon", "lr/adamw", "lr/muon-momentum", "lr/adamw-momentum"):
        assert column in columns.split(",")
    assert run.global_step == 2 * BATCHES


class Rates(Callback):
    """The lr of the matrices at every step, and the loss on all points at the start."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []
        self.first = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self.first = loss_on_all(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        (lr,) = (g["lr"] for g in optimizer.param_groups if g["name"] == "matrix")
        self.steps.append((trainer.global_step, lr))


@torch.no_grad()
def loss_on_all(net: LightningModule) -> float:
    (batch,) = DataLoader(Points(), batch_size=BATCHES * 4)
    return float(cross_entropy(net(batch[0]), batch[1]))


@pytest.mark.parametrize("total", ["asked", "given"])
def test_run_goes_on_with_another_algorithm_and_schedule(tmp_path, total):
    first = fit(tmp_path, max_epochs=3)
    first.save_checkpoint(tmp_path / "old.ckpt")
    new = {
        "matrix": {"algorithm": "nsgd", "lr": 0.2},
        "other": {"algorithm": "sgd", "lr": 0.02},
        "schedule": {"shape": "linear", "warmup": 30, "cooldown": 30},
        "on_mismatch": "keep_momentum",
    }
    with pytest.raises(ValueError, match="on_mismatch: keep_momentum"):
        fit(
            tmp_path, Net({**new, "on_mismatch": "error"}), max_epochs=10,
            ckpt_path=tmp_path / "old.ckpt",
        )  # fmt: skip
    given = {"total_steps": 10 * BATCHES} if total == "given" else {}
    seen = Rates()
    with pytest.warns(UserWarning, match="11 of 11 parameters keep their momentum"):
        run = fit(tmp_path, Net(new, **given), seen, ckpt_path=tmp_path / "old.ckpt", max_epochs=10)
    start, end = 3 * BATCHES, 10 * BATCHES
    assert [step for step, _ in seen.steps] == [*range(start, end)]
    # The warmup of the new schedule lasts until step 30, its cooldown from there to step 60.
    want = [0.2 * min(step / 30, (end - step) / 30) for step in range(start, end)]
    assert [lr for _, lr in seen.steps] == pytest.approx(want)
    assert seen.first == pytest.approx(loss_on_all(first.lightning_module))
    assert loss_on_all(run.lightning_module) < 0.8 * seen.first

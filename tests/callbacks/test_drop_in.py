"""FanionOptimizer in projects with an optimizer and a schedule of their own."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import lr_scheduler

from lit_fanions import Fanion
from lit_fanions.callbacks import FanionOptimizer
from lit_fanions.callbacks.drop_in import FollowedSchedule
from lit_fanions.cli.app import main
from tests.callbacks.nets import BATCHES, Net, assert_bit_equal, everything, fit
from tests.conftest import toy_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

CONFIG = {"matrix": {"algorithm": "f_muon", "lr": 0.05}, "other": {"lr": 0.01}}
STEPS = 2 * BATCHES


class Theirs(Net):
    """A project's module with an optimizer and a scheduler of its own.

    Args:
        schedule: Which one.
    """

    def __init__(self, schedule: str = "none") -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.004)
        if self.schedule == "none":
            return optimizer
        if self.schedule == "epochs":
            return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.5)]
        if self.schedule == "plateau":
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "constant"}
        if self.schedule == "frozen first":
            groups = [{"params": [self.conv.weight], "lr": 0.0}, {"params": [self.down.weight]}]
            optimizer = torch.optim.AdamW(groups, lr=0.004)
        made = {
            "cyclic": lambda: lr_scheduler.CyclicLR(
                optimizer, 0.001, 0.004, step_size_up=3, cycle_momentum=False
            ),
            "frozen first": lambda: lr_scheduler.ExponentialLR(optimizer, 0.5),
            "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=STEPS),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
            "warmup": lambda: lr_scheduler.SequentialLR(
                optimizer,
                [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3),
                 lr_scheduler.ExponentialLR(optimizer, 0.9)],
                [3],
            ),
        }[self.schedule]()  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}

    def training_step(self, batch: Any, index: int) -> Any:
        self.log("constant", 1.0)
        return super().training_step(batch, index)


def test_training_is_bit_equal_to_the_factorys(tmp_path):
    theirs = Theirs()
    got = fit(tmp_path, theirs, FanionOptimizer(CONFIG))
    want = fit(tmp_path, Net(CONFIG))
    assert_bit_equal(everything(got), everything(want))
    assert isinstance(theirs.configure_optimizers(), torch.optim.AdamW)
    assert "configure_optimizers" not in vars(theirs)


def test_the_split_is_printed(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Theirs(), FanionOptimizer(CONFIG))
    assert "q, k, v of MultiheadAttention" in caplog.text and "f_muon" in caplog.text


def test_a_method_set_on_the_instance_is_restored(tmp_path):
    theirs = Theirs()

    def method() -> None:
        raise AssertionError("not to be called")

    theirs.configure_optimizers = method
    run = fit(tmp_path, theirs, FanionOptimizer(CONFIG, keep_schedule=False))
    assert isinstance(run.optimizers[0], Fanion)
    assert theirs.configure_optimizers is method


def test_the_method_is_restored_after_an_error(tmp_path):
    theirs = Theirs()
    wrong = {"overrides": {"nothing": {"lr": 1.0}}}
    with pytest.raises(ValueError, match=r"overrides\.nothing"):
        fit(tmp_path, theirs, FanionOptimizer(wrong))
    assert "configure_optimizers" not in vars(theirs)


def test_a_module_in_training_can_be_copied(tmp_path):
    theirs, callback = Theirs(), FanionOptimizer(CONFIG, keep_schedule=True)
    callback.setup(None, theirs, "fit")
    for other in (copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        made = other.configure_optimizers()["optimizer"]
        held = {p for group in made.param_groups for p in group["params"]}
        assert held <= set(other.parameters())


# Schedules.


def rates(run: Any, path: Path, group: str = "matrix") -> list[float]:
    lines = (path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index(f"lr/{group}")
    return [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]


def reference_multipliers(schedule: str) -> list[float]:
    """Multiples of lr at each step that their scheduler makes in a plain loop."""
    optimizers = Theirs(schedule).configure_optimizers()
    scheduler = optimizers["lr_scheduler"]["scheduler"]
    optimizer, found = optimizers["optimizer"], []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[-1]["lr"] / 0.004)
        optimizer.step()
        if len(found) < STEPS:
            scheduler.step()
    return found


def fit_logging_rates(path: Path, net: Net, *callbacks: Any, **options: Any) -> Any:
    return fit(
        path, net, *callbacks, LearningRateMonitor("step"), logger=CSVLogger(path),
        max_epochs=2, **options,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["one cycle", "cosine", "warmup", "cyclic", "frozen first"])
def test_the_modules_own_schedule_is_kept(tmp_path, schedule, recwarn):
    callback = FanionOptimizer(CONFIG)
    run = fit_logging_rates(tmp_path, Theirs(schedule), callback)
    want = reference_multipliers(schedule)
    assert rates(run, tmp_path) == pytest.approx([0.05 * x for x in want], rel=1e-6)
    assert rates(run, tmp_path, "head") == pytest.approx([0.01 * x for x in want], rel=1e-6)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_schedules_by_epoch_and_by_metric_are_kept(tmp_path):
    run = fit_logging_rates(
        tmp_path / "a", Theirs("epochs"), FanionOptimizer(CONFIG, keep_schedule=True)
    )
    want = [0.05] * BATCHES + [0.025] * BATCHES
    assert rates(run, tmp_path / "a") == pytest.approx(want)
    run = fit(tmp_path, Theirs("plateau"), FanionOptimizer(CONFIG, keep_schedule=True),
              max_epochs=3)  # fmt: skip
    lrs = {group["name"]: group["lr"] for group in run.optimizers[0].param_groups}
    assert lrs["matrix"] == pytest.approx(0.05 * 0.01)


def test_keep_schedule_false_drops_the_modules_schedule(tmp_path):
    run = fit_logging_rates(
        tmp_path, Theirs("cosine"), FanionOptimizer(CONFIG, keep_schedule=False)
    )
    assert set(rates(run, tmp_path)) == {0.05}


def test_a_schedule_in_the_configuration_replaces_the_modules(tmp_path):
    config = {**CONFIG, "schedule": {"shape": "linear"}}
    run = fit_logging_rates(tmp_path, Theirs("cosine"), FanionOptimizer(config))
    falls = [0.05 * (1 - step / STEPS) for step in range(STEPS)]
    assert rates(run, tmp_path) == pytest.approx(falls, rel=1e-6)


def test_a_module_without_a_schedule_has_none_to_keep(tmp_path, recwarn):
    run = fit(tmp_path, Theirs(), FanionOptimizer(CONFIG, keep_schedule=True))
    assert isinstance(run.optimizers[0], Fanion) and not run.lr_scheduler_configs
    run = fit_logging_rates(tmp_path, Theirs(), FanionOptimizer(CONFIG))
    assert set(rates(run, tmp_path)) == {0.05}
    assert not [w for w in recwarn if "keep" in str(w.message)]


class Unusable(Theirs):
    """A module whose schedule cannot be kept.

    Args:
        reason: Why.
    """

    def configure_optimizers(self) -> Any:
        if self.schedule == "method fails":
            raise ImportError("no module named their_optimizer")
        optimizer = torch.optim.SGD(self.parameters(), lr=0.0 if self.schedule == "lr 0" else 1.0)
        steps = [lr_scheduler.ExponentialLR(optimizer, 0.5) for _ in range(2)]
        return [optimizer], steps[:1] if self.schedule == "lr 0" else steps


@pytest.mark.parametrize(
    ("reason", "message"),
    [("method fails", "no module named their_optimizer"), ("two schedulers", "has 2 schedulers"),
     ("lr 0", "own optimizer is 0")],
)  # fmt: skip
def test_a_schedule_that_cannot_be_kept_warns_or_fails_if_required(tmp_path, reason, message):
    with pytest.warns(UserWarning, match=f"cannot keep the lr schedule of Unusable.*{message}"):
        run = fit_logging_rates(tmp_path, Unusable(reason), FanionOptimizer(CONFIG))
    assert set(rates(run, tmp_path)) == {0.05}
    with pytest.raises(Exception, match=message):
        fit(tmp_path, Unusable(reason), FanionOptimizer(CONFIG, keep_schedule=True))


def test_groups_with_different_schedules_warn(tmp_path):
    class PerGroup(Theirs):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [self.conv.weight]}, {"params": [self.down.weight]}]
            optimizer = torch.optim.SGD(groups, lr=1.0)
            multipliers = [lambda epoch: 1 / (1 + epoch), lambda epoch: 1.0]
            return [optimizer], [lr_scheduler.LambdaLR(optimizer, multipliers)]

    with pytest.warns(UserWarning, match="treats its parameter groups differently"):
        run = fit_logging_rates(tmp_path, PerGroup(), FanionOptimizer(CONFIG))
    assert rates(run, tmp_path) == pytest.approx([0.05] * BATCHES + [0.025] * BATCHES)


# Groups that other callbacks add during training.


class Finetuned(Theirs):
    """A module with a backbone, for BackboneFinetuning."""

    def __init__(self, schedule: str) -> None:
        super().__init__(schedule)
        self.backbone = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 4, bias=False))
        self.top = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.backbone(x.float()))


def test_a_late_group_follows_the_schedule_from_its_own_lr(tmp_path):
    class AddGroup(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                weight = pl_module.backbone[0].weight
                group = {"params": [("backbone.0.weight", weight)], "name": "late"}
                trainer.optimizers[0].add_param_group({**group, "algorithm": "muon", "lr": 0.3})
            if trainer.current_epoch == 2:
                trainer.optimizers[0].param_groups[-1]["lr"] *= 3

    net = Finetuned("epochs")
    net.backbone.requires_grad_(False)
    before = net.backbone[0].weight.clone()
    run = fit(tmp_path, net, FanionOptimizer(CONFIG), AddGroup(), max_epochs=3)
    lrs = {group["name"]: group["lr"] for group in run.optimizers[0].param_groups}
    # Halved after each epoch, of which the late group sees two, and tripled between them.
    assert lrs["late"] == pytest.approx(0.3 / 2 * 3 / 2) and lrs["head"] == pytest.approx(0.01 / 8)
    assert not net.backbone[0].weight.requires_grad and torch.equal(net.backbone[0].weight, before)


def test_backbone_finetuning_unfreezes_under_a_kept_schedule(tmp_path):
    net = Finetuned("epochs")
    before = net.backbone[0].weight.clone()
    finetuning = BackboneFinetuning(
        1, lambda_func=lambda epoch: 3, backbone_initial_lr=0.01, should_align=False
    )
    run = fit(tmp_path, net, FanionOptimizer(CONFIG), finetuning, max_epochs=3)
    (late,) = [
        g for g in run.optimizers[0].param_groups if net.backbone[0].weight in set(g["params"])
    ]
    # The callback sets .01 in epoch 1 and triples it in epoch 2; then the schedule halves it.
    assert late["lr"] == pytest.approx(0.03 / 2)
    assert not torch.equal(net.backbone[0].weight, before)


def test_two_fanion_optimizers_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="already has a FanionOptimizer"):
        fit(tmp_path, Theirs(), FanionOptimizer(CONFIG), FanionOptimizer(CONFIG))


@pytest.mark.parametrize("schedule", ["warmup", "one cycle"])
def test_resume_of_a_kept_schedule_is_bit_equal(tmp_path, schedule):
    def run(*callbacks: Any, **options: Any) -> Any:
        drop_in = FanionOptimizer(CONFIG, keep_schedule=True)
        return fit(tmp_path, Theirs(schedule), drop_in, *callbacks, max_epochs=2, **options)

    keep = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    straight = run(keep)
    (saved,) = (tmp_path / "saved").glob("*step=6.ckpt")
    assert_bit_equal(everything(run(ckpt_path=saved)), everything(straight))


def followed(lr: float) -> tuple[Any, FollowedSchedule]:
    p = nn.Parameter(torch.ones(6, 4))
    module = torch.optim.AdamW([("w", nn.Parameter(torch.ones(6, 4)))], lr=lr)
    schedule = lr_scheduler.CosineAnnealingLR(module, 20)
    fanion = Fanion([("w", p)], lr=0.02, algorithm="muon", on_mismatch="keep_momentum")
    return schedule, FollowedSchedule(fanion, schedule)


@pytest.mark.parametrize("lr", [1e-3, 0.02])
def test_schedule_of_the_module_alone_is_restored_as_a_share_of_its_lr(lr):
    schedule, _ = followed(1e-3)
    for _ in range(5):
        schedule.optimizer.step()
        schedule.step()
    _, new = followed(lr)
    new.optimizer.keeps_options = True
    new.load_state_dict(copy.deepcopy(schedule.state_dict()))
    share = schedule.get_last_lr()[0] / 1e-3
    assert new.get_last_lr()[0] == pytest.approx(0.02 * share)


def test_foreign_schedules_are_refused():
    schedule, new = followed(1e-3)
    state = schedule.state_dict()
    with pytest.raises(ValueError, match="that of configure_optimizers"):
        new.load_state_dict({**state, "_multipliers": [1.0]})
    with pytest.raises(ValueError, match="has 2 lrs, and the module's own optimizer 1 groups"):
        new.load_state_dict({**state, "_last_lr": [0.1, 0.2]})


def test_manual_optimization_is_refused(tmp_path):
    net = Net()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(tmp_path, net, FanionOptimizer(CONFIG))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"leave out optimizer\.schedule"):
        FanionOptimizer({"schedule": {"shape": "linear"}}, keep_schedule=True)
    with pytest.raises(ValueError, match="did you mean 'matrix'"):
        FanionOptimizer({"matrx": {"lr": 1.0}})
    with pytest.raises(ValueError, match="keep_schedule must be true or false, got 'no'"):
        FanionOptimizer(keep_schedule="no")


# As YAML.

MODULE = """
import torch
from toy_zoo import ToyNet

class Theirs(ToyNet):
    def configure_optimizers(self):
        raise AssertionError("not to be called")
"""


def test_one_entry_in_a_recipe_trains_with_fanion(project, capfd, caplog):
    Path("theirs.py").write_text(MODULE)
    recipe = toy_recipe()
    recipe["model"] = {"class_path": "theirs.Theirs"}
    recipe["trainer"]["callbacks"] = [
        {
            "class_path": "lit_fanions.callbacks.FanionOptimizer",
            "init_args": {
                "optimizer": {"matrix": {"algorithm": "f_muon", "lr": 0.02}},
                "keep_schedule": False,
            },
        },
        {
            "class_path": "lit_fanions.callbacks.SpectralMonitor",
            "init_args": {"every_n_steps": 4, "parameters": ["net.0.*"]},
        },
    ]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with caplog.at_level(logging.INFO):
        status = main(["fit", "--config", "recipe.yaml"])
    assert status == 0, capfd.readouterr().err
    assert "f_muon" in caplog.text
    capfd.readouterr()
    assert main(["params", "--config", "recipe.yaml"]) == 0
    assert "f_muon" in capfd.readouterr().out
    assert list(project.glob("lightning_logs/version_0/events*"))


class Named(Theirs):
    """Their module, with names in its optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.named_parameters(), lr=0.004)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@pytest.mark.parametrize("had_callback", [False, True])
def test_run_goes_on_with_the_callback_and_its_momentum_is_kept(tmp_path, had_callback):
    before = [FanionOptimizer(CONFIG)] if had_callback else []
    old = fit(tmp_path, Named(), *before, max_epochs=1)
    old.save_checkpoint(tmp_path / "old.ckpt")
    config = {
        "matrix": {"algorithm": "nsgd", "lr": 0.1}, "other": {"lr": 0.03},
        "on_mismatch": "keep_momentum",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="12 of 12 parameters keep their momentum"):
        run = fit(
            tmp_path, Named(), FanionOptimizer(config), max_epochs=2,
            ckpt_path=tmp_path / "old.ckpt",
        )  # fmt: skip
    assert run.global_step == 2 * BATCHES
    rates = {group["name"]: group["lr"] for group in run.optimizers[0].param_groups}
    assert rates["matrix"] == pytest.approx(0.1 * 0.9 ** (2 * BATCHES))
    assert rates["head"] == pytest.approx(0.03 * 0.9 ** (2 * BATCHES))

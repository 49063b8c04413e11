"""Checkpoints of two ranks are resumed by other numbers of ranks, those of one process by FSDP2."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lit_fanions import Fanion, configure_optimizers
from lit_fanions.optim.checkpoints import keyed_by_names, load_saved
from tests.optim.ranks import (
    STEPS,
    Net,
    assert_close,
    batch,
    make_optimizer,
    on_ranks,
    states,
    train,
    weights,
)

pytestmark = pytest.mark.timeout(120)

OPTIONS: list[dict[str, Any]] = [
    {"algorithm": "f_muon", "adapt": "rows"},
    {"algorithm": "fanion", "rank": 2},
    {"algorithm": "dion"},
    {"algorithm": "cosmos", "adapt_rank": 2},
]
FULL = states_of.StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded() -> nn.Module:
    """Return the network, sharded over all ranks."""
    net = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net.first, net.second, net.gate, net.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def uninterrupted(options: dict[str, Any]) -> dict[str, Tensor]:
    net = Net()
    train(net, make_optimizer(net, **options), steps=2 * STEPS)
    return weights(net)


def _save(rank: int, folder: Path) -> None:
    for i, options in enumerate(OPTIONS):
        net = sharded()
        optimizer = make_optimizer(net, **options)
        train(net, optimizer)
        model, state = states_of.get_state_dict(net, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / f"dcp{i}")
        full = states_of.get_state_dict(net, optimizer, options=FULL)
        if rank == 0:
            torch.save(full, folder / f"full{i}.pt")


def _resume_sharded(rank: int, folder: Path, form: str) -> list[dict[str, Tensor]]:
    found = []
    for i, options in enumerate(OPTIONS):
        net = sharded()
        optimizer = make_optimizer(net, **options)
        if form == "dcp":
            model, state = states_of.get_state_dict(net, optimizer)
            saved = {"model": model, "optimizer": state}
            dcp.load(saved, checkpoint_id=folder / f"dcp{i}")
            how = states_of.StateDictOptions()
        else:
            model, state = torch.load(folder / f"{form}{i}.pt", weights_only=False)
            saved = {"model": model, "optimizer": keyed_by_names(state)}
            how = states_of.StateDictOptions(full_state_dict=True)
        states_of.set_state_dict(
            net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
            options=how,
        )  # fmt: skip
        train(net, optimizer, start=STEPS)
        found.append(weights(net))
    return found


def _resume_alone(folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for i, options in enumerate(OPTIONS):
        net = Net()
        optimizer = make_optimizer(net, **options)
        model, state = torch.load(folder / f"full{i}.pt", weights_only=False)
        states_of.set_state_dict(
            net, optimizer, model_state_dict=model, optim_state_dict=state,
            options=states_of.StateDictOptions(full_state_dict=True),
        )  # fmt: skip
        train(net, optimizer, start=STEPS)
        found.append(weights(net))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints that two ranks have saved."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(tmp_path_factory.mktemp("ranks"), _save, folder)
    return folder


def assert_resumed(found: list[dict[str, Tensor]]) -> None:
    for got, options in zip(found, OPTIONS, strict=True):
        assert_close(got, uninterrupted(options), atol=1e-9)


def test_one_process_resumes_two_ranks(saved):
    assert_resumed(_resume_alone(saved))


@pytest.mark.parametrize(
    ("ranks", "form"),
    [
        (3, "dcp"),
        pytest.param(4, "dcp", marks=pytest.mark.slow),
        pytest.param(1, "dcp", marks=pytest.mark.slow),
        (3, "full"),
        pytest.param(4, "full", marks=pytest.mark.slow),
    ],
)
def test_other_numbers_of_ranks_resume_two_ranks(tmp_path, saved, ranks, form):
    for found in on_ranks(tmp_path, _resume_sharded, saved, form, count=ranks):
        assert_resumed(found)


def test_fsdp2_resumes_one_process(tmp_path):
    for i, options in enumerate(OPTIONS):
        net = Net()
        optimizer = make_optimizer(net, **options)
        train(net, optimizer)
        torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / f"alone{i}.pt")
    for found in on_ranks(tmp_path, _resume_sharded, tmp_path, "alone"):
        assert_resumed(found)


class Module(LightningModule):
    """The network, sharded where the strategy has a mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net.first, self.net.second, self.net.gate, self.net.last):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, algorithm="f_muon", other={"lr": 0.01})


def fit(
    folder: Path,
    steps: int,
    resume: Path | None = None,
    module: type[Module] = Module,
    **options: Any,
) -> Trainer:
    # Equal batches: where a run resumes within an epoch is not asked here.
    data = TensorDataset(*(torch.cat([x] * 4) for x in batch(0)))
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module(), DataLoader(data, 8), ckpt_path=resume)
    return trainer


def _set_environment(rank: int) -> None:
    """Set what torchrun sets."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", NODE_RANK="0", GROUP_RANK="0", LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip


def _lightning(rank: int, folder: Path, strategy: str) -> tuple[dict[str, Tensor], bool]:
    _set_environment(rank)
    parallel = ModelParallelStrategy(2, 1) if strategy == "fsdp2" else strategy
    trainer = fit(folder, 4, folder / "alone.ckpt", strategy=parallel, devices=2)
    optimizer = trainer.optimizers[0]
    return weights(trainer.lightning_module), optimizer.process_group is not None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_lightnings_strategies_resume_one_process(tmp_path, strategy):
    fit(tmp_path, 2).save_checkpoint(tmp_path / "alone.ckpt")
    want = weights(fit(tmp_path, 4).lightning_module)
    for got, is_sharing in on_ranks(tmp_path, _lightning, tmp_path, strategy):
        assert_close(got, want, atol=1e-6)
        # DDP replicates parameters: their work is shared without a setting.
        assert is_sharing == (strategy == "ddp")


# Another configuration, on purpose.


def make_other(net: nn.Module) -> Fanion:
    """Return an optimizer of other algorithms, whose matrices are in another group too."""
    config = {
        "matrix": {"algorithm": "fanion", "rank": 2, "lr": 0.02},
        "other": {"algorithm": "sgd", "lr": 0.01},
        "overrides": {"head": {"algorithm": "adamw", "lr": 0.01}},
        "on_mismatch": "keep_momentum",
    }
    return configure_optimizers(net, config)["optimizer"]


def _convert(rank: int, folder: Path, form: str) -> dict[str, Tensor]:
    net = sharded() if dist.is_initialized() else Net()
    optimizer = make_other(net)
    if form == "dcp":
        saved = load_saved(folder / "dcp0", ["model", "optimizer"])
        model, state = saved["model"], saved["optimizer"]
    else:
        model, state = torch.load(folder / f"{form}0.pt", weights_only=False)
    options = states_of.StateDictOptions(full_state_dict=True)
    states_of.set_model_state_dict(net, model, options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(state)
    assert sum("parameters keep their momentum" in str(w.message) for w in caught) == (rank == 0)
    train(net, optimizer, start=STEPS)
    return {**weights(net), **states(net, optimizer)}


@pytest.mark.parametrize("form", ["dcp", "full"])
def test_momenta_of_two_ranks_are_kept_by_another_configuration(tmp_path, saved, form):
    want = _convert(0, saved, form)
    for found in on_ranks(tmp_path, _convert, saved, form, count=3):
        assert_close(found, want)


def test_momenta_of_one_process_are_kept_by_fsdp2(tmp_path):
    net = Net()
    optimizer = make_optimizer(net, **OPTIONS[0])
    train(net, optimizer)
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "alone0.pt")
    want = _convert(0, tmp_path, "alone")
    for found in on_ranks(tmp_path, _convert, tmp_path, "alone"):
        assert_close(found, want)


class Converted(Module):
    """The module with another optimizer."""

    def configure_optimizers(self) -> Any:
        return configure_optimizers(
            self, algorithm="nsgd", other={"algorithm": "sgd", "lr": 0.02},
            on_mismatch="keep_momentum", schedule={"shape": "linear"},
        )  # fmt: skip


def _lightning_converts(rank: int, folder: Path, saves: bool) -> dict[str, Tensor]:
    _set_environment(rank)
    strategy, path = ModelParallelStrategy(2, 1), folder / "alone.ckpt"
    if saves:
        path = folder / "sharded.ckpt"
        fit(folder, 2, strategy=strategy, devices=2).save_checkpoint(path)
        strategy = ModelParallelStrategy(2, 1)
    trainer = fit(folder, 4, path, Converted, strategy=strategy, devices=2)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["algorithm"], group["initial_lr"], group["lr"]) == ("nsgd", 0.02, 0.0)
    return weights(trainer.lightning_module)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("saves", [False, True], ids=["file", "folder"])
def test_lightnings_fsdp2_keeps_the_momenta_of_another_configuration(tmp_path, saves):
    fit(tmp_path, 2).save_checkpoint(tmp_path / "alone.ckpt")
    want = weights(fit(tmp_path, 4, tmp_path / "alone.ckpt", Converted).lightning_module)
    for got in on_ranks(tmp_path, _lightning_converts, tmp_path, saves):
        assert_close(got, want, atol=1e-6)

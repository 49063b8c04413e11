"""Two processes log the same values and train as without a monitor."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lit_fanions.callbacks import SmoothnessMonitor, SpectralMonitor
from tests.callbacks.nets import BATCHES, MATRICES, Net, assert_bit_equal, fit
from tests.callbacks.recording import LoggedValues, config, scalars

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


class Sharded(Net):
    """The same, sharded by FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.conv, self.down, self.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def run_ranks(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call ``function(rank, folder, *args)`` in two processes; fail if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_call, args=(function, i, folder, port, args)) for i in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    errors = [path.read_text() for path in folder.glob("error*")]
    assert not errors, errors[0]


def _call(
    function: Callable[..., None], rank: int, folder: Path, port: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", NODE_RANK="0", GROUP_RANK="0", LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    try:
        function(rank, folder, *args)
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise


def strategy(kind: str) -> Any:
    """Return the strategy of ddp, or of FSDP2 for any other kind."""
    return "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1)


def whole_weights(run: Trainer) -> dict[str, Tensor]:
    """Return the weights, gathered from all ranks."""
    return {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in run.lightning_module.named_parameters()
    }


def _monitor(rank: int, folder: Path, kind: str) -> None:
    for monitored in (True, False):
        values = LoggedValues()
        monitors = [SpectralMonitor(1, exact=True), SmoothnessMonitor(1)]
        callbacks = [*monitors, values] if monitored else []
        options = config("adamw", lr=0.01) if kind == "fsdp2 adamw" else config("f_muon")
        net = (Net if kind == "ddp" else Sharded)(options)
        board = TensorBoardLogger(folder / f"logs{monitored}", name="", version="")
        run = fit(folder, net, *callbacks, logger=board, strategy=strategy(kind), devices=2)
        torch.save((values.steps, whole_weights(run)), folder / f"{rank}{monitored}.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 adamw"])
def test_two_processes_log_the_same_values(tmp_path, kind):
    run_ranks(_monitor, tmp_path, kind)
    (first, weights), (second, _) = (torch.load(tmp_path / f"{i}True.pt") for i in range(2))
    _, unmonitored = torch.load(tmp_path / "0False.pt")
    assert_bit_equal(weights, unmonitored)
    assert len(first) == BATCHES // 2
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    own = ["update_rms"] if kind == "fsdp2 adamw" else ["oracle_quality", "smoothness_estimate"]
    assert {f"{quantity}/{name}" for quantity in own for name in MATRICES} <= first[0].keys()
    curve = scalars(tmp_path / "logsTrue", "spectral/weight_spectral/down.weight")
    want = [step["weight_spectral/down.weight"] for step in first]
    assert [step for step, _ in curve] == list(range(len(first)))
    assert [value for _, value in curve] == pytest.approx(want)

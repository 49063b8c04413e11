"""NanoGPT in a Trainer: losses, logs, refused options, several processes."""

import math
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from models import NanoGPT
from tests.models.nanogpt_runs import (
    BOS,
    NETWORK,
    OPTIMIZER,
    SGD,
    SPEEDRUN,
    Losses,
    data,
    model,
    trainer,
    weights,
)

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*many workers:UserWarning"),
]


@pytest.mark.parametrize("network", [NETWORK, SPEEDRUN], ids=["track3", "speedrun"])
def test_first_loss_is_of_a_uniform_guess_and_falls(shards: Path, tmp_path: Path, network) -> None:
    losses = Losses()
    module = model(network=network, optimizer={**OPTIMIZER, "other": {"lr": 0.1}})
    fit = trainer(tmp_path, 40, callbacks=[losses])
    fit.fit(module, datamodule=data(shards))
    assert losses.values[0] == pytest.approx(math.log(257), abs=1e-4)
    assert losses.values[-1] < 3.2
    (results,) = fit.validate(module, datamodule=data(shards), verbose=False)
    assert results["val/loss"] < 3.2


def test_validation_is_the_mean_over_the_first_tokens(shards: Path, tmp_path: Path) -> None:
    module = model()
    torch.nn.init.normal_(module.network.head.weight)
    (results,) = trainer(tmp_path).validate(
        module, datamodule=data(shards, val_tokens=333, val_batch_size=3), verbose=False
    )
    stream = torch.tensor(np.fromfile(shards / "fineweb_val_000000.bin", "<u2")[512:].astype(int))
    nats, count, size = 0.0, 0, 0
    for start in range(0, 333, 32):
        end = min(start + 32, 333)
        logits = module(stream[None, start:end])[0].log_softmax(-1)
        targets = stream[start + 1 : end + 1]
        nats -= logits[torch.arange(end - start), targets].sum().item()
        count += len(targets)
        size += (targets != BOS).sum().item()
    assert count == 333
    assert results["val/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert results["val/bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_steps_do_not_depend_on_micro_batches(shards: Path, tmp_path: Path) -> None:
    """1, 2, 3 or 8 forward passes per step, some padded, give the same weights and logs."""
    outcomes = []
    for micro in (8, 4, 3, 1):
        losses, module = Losses(), model(network=SPEEDRUN)
        fit = trainer(tmp_path, 5, callbacks=[losses], precision="64-true")
        fit.fit(module, datamodule=data(shards, micro_batch_size=micro))
        assert fit.accumulate_grad_batches == math.ceil(8 / micro)
        outcomes.append((weights(module), torch.tensor(losses.values)))
    for params, values in outcomes[1:]:
        torch.testing.assert_close(params, outcomes[0][0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(values, outcomes[0][1], atol=1e-6, rtol=1e-6)


def test_window_grows_with_the_steps(shards: Path, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: NanoGPT, *args: Any) -> None:
            seen.append(module._windows().tolist())

        def on_validation_batch_start(self, trainer: Trainer, module: NanoGPT, *args: Any) -> None:
            seen.append(module._windows().tolist())

    module = model(network=SPEEDRUN)
    fit = trainer(tmp_path, 4, callbacks=[Watch()])
    fit.fit(module, datamodule=data(shards, val_every_n_steps=4, val_tokens=32))
    expected = [max(1, math.ceil(300 * step / 4 / 128)) for step in (0, 1, 2, 3, 4)]
    assert [pair[0] for pair in seen] == expected
    seen.clear()
    trainer(tmp_path, callbacks=[Watch()]).validate(
        module, datamodule=data(shards, val_tokens=32), verbose=False
    )
    assert seen == [[3, 1]]


def test_window_needs_max_steps(shards: Path, tmp_path: Path) -> None:
    module = model(network=SPEEDRUN, optimizer={})
    with pytest.raises(ValueError, match="set max_steps"):
        trainer(tmp_path, -1, max_epochs=-1).fit(module, datamodule=data(shards))


def test_bf16_with_memory_savers_trains_like_without(shards: Path, tmp_path: Path) -> None:
    outcomes = []
    sgd = {"algorithm": "sgd", "lr": 3e-3}
    optimizer = {"matrix": sgd, "other": sgd}
    for options in ({}, {"activation_checkpointing": True, "logits_chunk": 50}):
        losses, module = Losses(), model(network=SPEEDRUN, optimizer=optimizer, **options)
        fit = trainer(tmp_path, 4, precision="bf16-mixed", callbacks=[losses])
        fit.fit(module, datamodule=data(shards))
        outcomes.append((weights(module), torch.tensor(losses.values)))
    assert outcomes[0][1].diff().abs().min() > 1e-3  # it moves
    for plain, saving in zip(*outcomes, strict=True):
        torch.testing.assert_close(saving, plain, atol=1e-3, rtol=1e-2)


def test_logged_loss_is_of_all_processes(shards: Path, tmp_path: Path, monkeypatch) -> None:
    losses, module = Losses(), model()
    fit = trainer(tmp_path, 1, callbacks=[losses])

    def with_another(x: torch.Tensor, group: Any = None, reduce_op: str = "mean") -> torch.Tensor:
        if x.shape != (2,):
            return x
        assert reduce_op == "sum"
        return x + torch.tensor([100.0, 50.0])

    monkeypatch.setattr(fit.strategy, "reduce", with_another)
    fit.fit(module, datamodule=data(shards))
    assert losses.values == pytest.approx([(256 * math.log(257) + 100) / 306])


def test_tensor_parallelism_is_refused() -> None:
    module = model()
    module._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, SPEEDRUN], ids=["track3", "speedrun"])
def test_compiled_network_trains_like_eager(shards: Path, tmp_path: Path, network) -> None:
    outcomes = []
    for compiled in (False, True):
        optimizer = {**OPTIMIZER, "other": SGD}
        module = model(network=network, compile=compiled, optimizer=optimizer, sample_tokens=4)
        trainer(tmp_path, 3).fit(module, datamodule=data(shards, val_every_n_steps=3))
        outcomes.append(weights(module))
        assert all("_orig_mod" not in name for name, _ in module.named_parameters())
    torch.testing.assert_close(*outcomes, atol=2e-5, rtol=2e-4)


def test_data_that_does_not_fit_the_network_is_refused(shards: Path, tmp_path: Path) -> None:
    small = {**NETWORK, "vocab_size": 200, "bos": 0}
    with pytest.raises(ValueError, match=r"257 different tokens .* vocab_size=200: set it to at"):
        trainer(tmp_path, 1).fit(model(network=small), datamodule=data(shards))
    other = {**SPEEDRUN, "bos": 0}
    with pytest.raises(ValueError, match=r"start with token 256 .* set bos to 256"):
        trainer(tmp_path, 1).fit(model(network=other), datamodule=data(shards))
    with pytest.raises(ValueError, match="sample_tokens=64 after a prompt of 4 tokens exceed"):
        trainer(tmp_path, 1).fit(model(sample_tokens=64), datamodule=data(shards))


def test_sequences_longer_than_the_context_are_refused(shards: Path, tmp_path: Path) -> None:
    short = {**NETWORK, "context_length": 16}
    with pytest.raises(
        ValueError, match="sequence_length=32 of the data exceeds context_length=16"
    ):
        trainer(tmp_path, 1).fit(model(network=short), datamodule=data(shards))


@pytest.mark.parametrize("wrong", [{"sample_tokens": -1}, {"temperature": -0.1}, {"top_k": 0}])
def test_invalid_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model(**wrong)


def test_work_of_a_training_batch_is_counted() -> None:
    inputs = torch.zeros(8, 32, dtype=torch.long)
    # Two operations a weight forwards, four backwards; attention: 4 x width x length forwards.
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 257
    per_token = 6 * matrices + 3 * 2 * 4 * 16 * 32
    assert model().count_work((inputs, inputs)) == {"tokens": 256, "flops": 256 * per_token}


def _train(strategy: Any, devices: int, folder: Path, shards: Path) -> torch.Tensor:
    torch.set_num_threads(1)
    module = model(network=SPEEDRUN, sample_tokens=2, optimizer={**OPTIMIZER, "other": SGD})
    fit = trainer(folder, 3, strategy=strategy, devices=devices)
    fit.fit(module, datamodule=data(shards, micro_batch_size=3, val_every_n_steps=3))
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    loss = fit.callback_metrics["val/loss"].reshape(1)
    return torch.cat([*(p.detach().flatten() for p in full), loss])


def _launch(rank: int, folder: Path, shards: Path, kind: str, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", NODE_RANK="0", GROUP_RANK="0", LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    strategy = ModelParallelStrategy(2, 1) if kind == "fsdp2" else "ddp"
    outcome = _train(strategy, 2, folder, shards)
    if rank == 0:
        torch.save(outcome, folder / f"{kind}.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(shards: Path, tmp_path: Path, kind: str) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_launch, args=(rank, tmp_path, shards, kind, port))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
        process.kill()
    together = torch.load(tmp_path / f"{kind}.pt")
    alone = _train("auto", 1, tmp_path, shards)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-4)

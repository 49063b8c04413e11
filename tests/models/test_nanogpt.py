"""NanoGPT's life in a Trainer: losses, logs, checkpoints, samples, several processes."""

import dataclasses
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from datamodules import FineWebDataModule
from datamodules.shards import write_shard
from datamodules.tokenizers import ByteTokenizer
from experiments.bench.__main__ import main as bench
from lit_fanions.cli.app import SaveLastStep
from lit_fanions.cli.runner import read_curves
from models import GPTConfig, NanoGPT
from models.nanogpt import sequences, tokens

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*many workers:UserWarning"),
]

BOS = 256
NETWORK: dict[str, Any] = {
    "vocab_size": 257, "context_length": 64, "layers": 2, "width": 16, "heads": 2,
    "mlp_width": 32, "bos": BOS,
}  # fmt: skip
SPEEDRUN = {
    **dataclasses.asdict(GPTConfig.speedrun()), **NETWORK,
    "layers_without_attention": (), "long_window_layers": (1,), "value_embeddings": 1,
    "embedding_dtype": "float32", "context_length": 400, "window": 300,
}  # fmt: skip
SGD = {"algorithm": "sgd", "lr": 1e-4}  # not AdamW, which blows up the rounding in zeros
OPTIMIZER = {
    "matrix": {"lr": 0.02},
    "other": {"lr": 0.01},
    "schedule": {"shape": "linear", "cooldown": 0.7},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in which one letter tells the next, in documents of some hundred bytes."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, count in (("fineweb_train_000001", 30_000), ("fineweb_val_000000", 3_001)):
        letters = (97 + (np.cumsum(rng.integers(1, 4, count)) % 26)).astype(np.uint16)
        letters[rng.integers(0, count, count // 200)] = BOS
        letters[0] = BOS
        write_shard(folder / f"{name}.bin", letters)
    return folder


def data(folder: Path, **options: Any) -> FineWebDataModule:
    settings = {
        "batch_tokens": 256, "sequence_length": 32, "micro_batch_size": 8, "shuffle": True,
        "val_tokens": 640, "tokenizer": "bytes", "shards": 1,
    }  # fmt: skip
    return FineWebDataModule(str(folder), **{**settings, **options})


def model(**options: Any) -> NanoGPT:
    seed_everything(0, verbose=False)
    return NanoGPT(**{"optimizer": OPTIMIZER, "network": NETWORK, **options})


def trainer(folder: Path, steps: int = 6, **options: Any) -> Trainer:
    settings = {
        "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "enable_checkpointing": False, "default_root_dir": folder, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**{**settings, **options})


class Losses(Callback):
    """What was logged as train/loss after each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.values.append(float(trainer.callback_metrics["train/loss"]))


def weights(module: NanoGPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("network", [NETWORK, SPEEDRUN], ids=["track3", "speedrun"])
def test_learns_and_starts_at_the_uniform_guess(shards: Path, tmp_path: Path, network) -> None:
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


def test_accumulation_changes_nothing(shards: Path, tmp_path: Path) -> None:
    """One, two or eight forward passes, the last ones padded: the same steps and logs."""
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


def test_window_needs_an_end(shards: Path, tmp_path: Path) -> None:
    module = model(network=SPEEDRUN, optimizer={})
    with pytest.raises(ValueError, match="set max_steps"):
        trainer(tmp_path, -1, max_epochs=-1).fit(module, datamodule=data(shards))


def test_bf16_and_memory_savers_train_alike(shards: Path, tmp_path: Path) -> None:
    outcomes = []
    sgd = {"algorithm": "sgd", "lr": 3e-3}
    optimizer = {"matrix": sgd, "other": sgd}
    for options in ({}, {"activation_checkpointing": True, "logits_chunk": 50}):
        losses, module = Losses(), model(network=SPEEDRUN, optimizer=optimizer, **options)
        fit = trainer(tmp_path, 4, precision="bf16-mixed", callbacks=[losses])
        fit.fit(module, datamodule=data(shards))
        outcomes.append((weights(module), torch.tensor(losses.values)))
    assert outcomes[0][1].diff().abs().min() > 1e-3  # it moves
    for plain, thrifty in zip(*outcomes, strict=True):
        torch.testing.assert_close(thrifty, plain, atol=1e-3, rtol=1e-2)


def test_loss_is_logged_for_all_processes(shards: Path, tmp_path: Path, monkeypatch) -> None:
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
def test_compiled_network_trains_alike(shards: Path, tmp_path: Path, network) -> None:
    outcomes = []
    for compiled in (False, True):
        optimizer = {**OPTIMIZER, "other": SGD}
        module = model(network=network, compile=compiled, optimizer=optimizer, sample_tokens=4)
        trainer(tmp_path, 3).fit(module, datamodule=data(shards, val_every_n_steps=3))
        outcomes.append(weights(module))
        assert all("_orig_mod" not in name for name, _ in module.named_parameters())
    torch.testing.assert_close(*outcomes, atol=2e-5, rtol=2e-4)


# --- checkpoints ---


def test_resumed_run_is_the_uninterrupted_one(shards: Path, tmp_path: Path) -> None:
    whole, losses = model(network=SPEEDRUN), Losses()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, 8, callbacks=[losses, keep], enable_checkpointing=True).fit(
        whole, datamodule=data(shards, micro_batch_size=4)
    )
    again, rest = model(network=SPEEDRUN), Losses()
    trainer(tmp_path, 8, callbacks=[rest]).fit(
        again,
        datamodule=data(shards, micro_batch_size=4),
        ckpt_path=str(tmp_path / "step=3.ckpt"),
        weights_only=True,
    )
    assert rest.values == losses.values[3:]
    assert torch.equal(weights(again), weights(whole))


def test_last_checkpoint_is_of_the_last_step(shards: Path, tmp_path: Path) -> None:
    """Also where the run ends between two saves; and it goes on from there."""

    def run(name: str, steps: int, **resume: Any) -> tuple[str, torch.Tensor]:
        module = model(optimizer={})
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_last=True, save_top_k=0)
        fit = trainer(tmp_path, steps, callbacks=[SaveLastStep(), keep], enable_checkpointing=True)
        fit.fit(module, datamodule=data(shards), **resume)
        assert torch.load(keep.last_model_path, weights_only=True)["global_step"] == steps
        return keep.last_model_path, weights(module)

    path, _ = run("cut", 7)
    _, resumed = run("resumed", 10, ckpt_path=path, weights_only=True)
    assert torch.equal(resumed, run("whole", 10)[1])


def test_checkpoints_load_without_a_trainer(shards: Path, tmp_path: Path) -> None:
    module = model(network=SPEEDRUN, sample_tokens=3)
    fit = trainer(tmp_path, 2, limit_val_batches=0)
    fit.fit(module, datamodule=data(shards))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    loaded = NanoGPT.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    assert loaded.network.config == module.network.config
    assert loaded.sample_tokens == 3
    assert torch.equal(weights(loaded), weights(module))


def test_init_from_starts_with_the_weights_alone(shards: Path, tmp_path: Path) -> None:
    module = model()
    fit = trainer(tmp_path, 5)
    fit.fit(module, datamodule=data(shards))
    fit.save_checkpoint(tmp_path / "base.ckpt")
    (before,) = fit.validate(module, datamodule=data(shards), verbose=False)

    tuned, losses = model(init_from=str(tmp_path / "base.ckpt")), Losses()
    second = trainer(tmp_path, 1, callbacks=[losses])
    second.fit(tuned, datamodule=data(shards))
    assert losses.values[0] == pytest.approx(before["val/loss"], abs=0.2)
    assert second.global_step == 1


@pytest.mark.parametrize("case", ["missing", "no checkpoint", "empty", "cut", "another network"])
def test_init_from_says_what_is_wrong(shards: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "base.ckpt"
    if case == "no checkpoint":
        torch.save([1, 2], path)
    if case == "empty":
        path.touch()
    if case in ("another network", "cut"):
        module = model(network={**NETWORK, "width": 24})
        trainer(tmp_path, 1).fit(module, datamodule=data(shards))
        fit = trainer(tmp_path, 1)
        fit.strategy.connect(module)
        fit.save_checkpoint(path)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    expected = {
        "missing": (FileNotFoundError, "init_from: there is no file"),
        "no checkpoint": (ValueError, "damaged or no Lightning checkpoint"),
        "empty": (ValueError, "damaged or no Lightning checkpoint"),
        "cut": (ValueError, "damaged or no Lightning checkpoint"),
        "another network": (ValueError, "of another network: .*size mismatch"),
    }
    error, message = expected[case]
    with pytest.raises(error, match=message):
        trainer(tmp_path, 1).fit(model(init_from=str(path)), datamodule=data(shards))


# --- mistakes ---


def test_data_and_network_must_fit(shards: Path, tmp_path: Path) -> None:
    small = {**NETWORK, "vocab_size": 200, "bos": 0}
    with pytest.raises(ValueError, match=r"257 different tokens .* vocab_size=200: set it to at"):
        trainer(tmp_path, 1).fit(model(network=small), datamodule=data(shards))
    other = {**SPEEDRUN, "bos": 0}
    with pytest.raises(ValueError, match=r"start with token 256 .* set bos to 256"):
        trainer(tmp_path, 1).fit(model(network=other), datamodule=data(shards))
    with pytest.raises(ValueError, match="sample_tokens=64 after a prompt of 4 tokens exceed"):
        trainer(tmp_path, 1).fit(model(sample_tokens=64), datamodule=data(shards))


def test_sequences_must_fit_the_context(shards: Path, tmp_path: Path) -> None:
    short = {**NETWORK, "context_length": 16}
    with pytest.raises(
        ValueError, match="sequence_length=32 of the data exceeds context_length=16"
    ):
        trainer(tmp_path, 1).fit(model(network=short), datamodule=data(shards))


@pytest.mark.parametrize("wrong", [{"sample_tokens": -1}, {"temperature": -0.1}, {"top_k": 0}])
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model(**wrong)


# --- text ---


def test_predict_continues_prompts(shards: Path, tmp_path: Path) -> None:
    module = model(predict_tokens=9, temperature=0.0)
    texts = trainer(tmp_path).predict(module, datamodule=data(shards, prompts=["abc", ""]))
    assert texts[0].startswith("abc")
    prompt = torch.tensor([[BOS, *b"abc"]])
    assert texts[0] == bytes(module.generate(prompt, 9)[0, 1:].tolist()).decode(errors="replace")
    long = data(shards, prompts=["x" * 60])
    with pytest.raises(ValueError, match="a prompt of 61 tokens and 9 more exceed the context"):
        trainer(tmp_path).predict(module, datamodule=long)


def test_samples_are_of_known_tokens(shards: Path, tmp_path: Path) -> None:
    wide = {**NETWORK, "vocab_size": 2000}
    module = model(network=wide, temperature=1e6, top_k=None)
    fit = trainer(tmp_path, 1, limit_val_batches=0)
    fit.fit(module, datamodule=data(shards))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    loaded = NanoGPT.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    for each in (module, loaded):
        assert each.generate(torch.tensor([[BOS]]), 30).max() < 257


def test_tokenizer_out_of_reach_is_no_harm(shards: Path, tmp_path: Path, monkeypatch) -> None:
    def unreachable(self: Any) -> None:
        raise FileNotFoundError("no vocabulary")

    monkeypatch.setattr(ByteTokenizer, "token_bytes", unreachable)
    fit = trainer(tmp_path, 2)
    with pytest.warns(match="no bits per byte and no samples of text: no vocabulary"):
        fit.fit(model(sample_tokens=5), datamodule=data(shards, val_every_n_steps=2))
    assert "val/loss" in fit.callback_metrics
    assert "val/bits_per_byte" not in fit.callback_metrics


def test_samples_are_shown_and_printed(shards: Path, tmp_path: Path, capsys) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = model(sample_tokens=5, sample_prompt="Oh")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit = trainer(tmp_path, 5, logger=logger)
    fit.fit(module, datamodule=data(shards, val_every_n_steps=2))
    assert module.training
    events = EventAccumulator(str(tmp_path)).Reload()
    samples = events.Tensors("val/sample/text_summary")
    assert [event.step for event in samples] == [2, 4, 5]  # the last one of the trained weights
    assert samples[0].tensor_proto.string_val[0].startswith(b"Oh")
    assert "sample: Oh" in capsys.readouterr().out


def test_sampling_leaves_the_run_alone(shards: Path, tmp_path: Path) -> None:
    outcomes = []
    for count in (0, 5):
        module = model(sample_tokens=count)
        fit = trainer(tmp_path, 4)
        fit.fit(module, datamodule=data(shards, val_every_n_steps=2))
        outcomes.append(weights(module))
    assert torch.equal(*outcomes)


def test_throughput_is_counted(shards: Path, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = ThroughputMonitor(sequences, tokens, window_size=2)
    module = model()
    trainer(tmp_path, 6, logger=logger, callbacks=[monitor]).fit(module, datamodule=data(shards))
    per_batch = dict(
        read_curves(tmp_path, ["train/device/batches_per_sec"])["train/device/batches_per_sec"]
    )
    per_token = dict(
        read_curves(tmp_path, ["train/device/items_per_sec"])["train/device/items_per_sec"]
    )
    flops = dict(
        read_curves(tmp_path, ["train/device/flops_per_sec"])["train/device/flops_per_sec"]
    )
    last = max(per_batch)
    assert per_token[last] / per_batch[last] == pytest.approx(256)
    # Two operations a weight forwards, four backwards; attention: 4 x width x length forwards.
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 257
    per_token_flops = 6 * matrices + 3 * 2 * 4 * 16 * 32
    assert flops[last] / per_token[last] == pytest.approx(per_token_flops, rel=1e-3)


# --- several processes ---


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
def test_two_processes_train_as_one(shards: Path, tmp_path: Path, kind: str) -> None:
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
        process.join(90)
        process.kill()
    together = torch.load(tmp_path / f"{kind}.pt")
    alone = _train("auto", 1, tmp_path, shards)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-4)


# --- the command line ---


def recipe(folder: Path, name: str, shards: Path, steps: int, **network: Any) -> list[str]:
    """Write a recipe into the folder; return the arguments of fit."""
    content = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": steps, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": name, "version": ""},
            },
            "callbacks": {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "every_n_train_steps": 5, "save_last": True, "save_top_k": 0,
                    "dirpath": str(folder / name),
                },
            },
        },
        "model": {
            "class_path": "models.NanoGPT",
            "init_args": {"optimizer": OPTIMIZER, "network": {**NETWORK, **network}},
        },
        "data": {
            "class_path": "datamodules.FineWebDataModule",
            "init_args": {
                "data_dir": str(shards), "batch_tokens": 2048, "sequence_length": 32,
                "micro_batch_size": 16, "shuffle": True, "val_tokens": 320,
                "val_every_n_steps": 20, "tokenizer": "bytes", "shards": 1,
            },
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_bare_loop_takes_the_same_steps(shards: Path, tmp_path: Path, compiled, capsys) -> None:
    args = recipe(tmp_path, "raced", shards, 12, window=300, long_window_layers=[0])
    given = [*args, f"--model.compile={compiled}", "--trainer.limit_train_batches=4"]
    assert bench(["overhead", *given, "--epochs", "2"]) == 0
    assert "weights after the same steps: equal" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_checkpoint(shards: Path, tmp_path: Path) -> None:
    """SIGKILL at some step: after the resume the losses are those of the uninterrupted run."""

    def config(name: str) -> list[str]:
        fit = [sys.executable, "-m", "lit_fanions", "fit"]
        return [*fit, *recipe(tmp_path, name, shards, 40)]

    root = Path(__file__).parents[2]
    subprocess.run(config("whole"), cwd=root, check=True, capture_output=True)
    expected = dict(read_curves(tmp_path / "whole", ["train/loss"])["train/loss"])
    process = subprocess.Popen(
        config("killed"), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = tmp_path / "killed" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3 * np.random.default_rng().random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(last, weights_only=True)["global_step"]
    assert done < 40
    for events in (tmp_path / "killed").glob("events.*"):
        events.unlink()
    resume = [*config("killed"), "--ckpt_path", str(last)]
    subprocess.run(resume, cwd=root, check=True, capture_output=True)
    resumed = dict(read_curves(tmp_path / "killed", ["train/loss"])["train/loss"])
    assert resumed == {step: loss for step, loss in expected.items() if step >= done}

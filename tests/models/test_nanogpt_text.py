"""NanoGPT's text: prompts, samples, tokenizers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from datamodules.tokenizers import ByteTokenizer
from models import NanoGPT
from tests.models.nanogpt_runs import BOS, NETWORK, data, model, trainer, weights

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*many workers:UserWarning"),
]


def test_predict_continues_prompts(shards: Path, tmp_path: Path) -> None:
    module = model(predict_tokens=9, temperature=0.0)
    texts = trainer(tmp_path).predict(module, datamodule=data(shards, prompts=["abc", ""]))
    assert texts[0].startswith("abc")
    prompt = torch.tensor([[BOS, *b"abc"]])
    assert texts[0] == bytes(module.generate(prompt, 9)[0, 1:].tolist()).decode(errors="replace")
    long = data(shards, prompts=["x" * 60])
    with pytest.raises(ValueError, match="a prompt of 61 tokens and 9 more exceed the context"):
        trainer(tmp_path).predict(module, datamodule=long)


def test_samples_use_the_vocabulary_of_the_data(shards: Path, tmp_path: Path) -> None:
    wide = {**NETWORK, "vocab_size": 2000}
    module = model(network=wide, temperature=1e6, top_k=None)
    fit = trainer(tmp_path, 1, limit_val_batches=0)
    fit.fit(module, datamodule=data(shards))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    loaded = NanoGPT.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    for each in (module, loaded):
        assert each.generate(torch.tensor([[BOS]]), 30).max() < 257


def test_missing_vocabulary_only_warns(shards: Path, tmp_path: Path, monkeypatch) -> None:
    def unreachable(self: Any) -> None:
        raise FileNotFoundError("no vocabulary")

    monkeypatch.setattr(ByteTokenizer, "token_bytes", unreachable)
    fit = trainer(tmp_path, 2)
    with pytest.warns(match="no bits per byte and no samples of text: no vocabulary"):
        fit.fit(model(sample_tokens=5), datamodule=data(shards, val_every_n_steps=2))
    assert "val/loss" in fit.callback_metrics
    assert "val/bits_per_byte" not in fit.callback_metrics


def test_samples_are_logged_and_printed(shards: Path, tmp_path: Path, capsys) -> None:
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


def test_sampling_does_not_change_training(shards: Path, tmp_path: Path) -> None:
    outcomes = []
    for count in (0, 5):
        module = model(sample_tokens=count)
        fit = trainer(tmp_path, 4)
        fit.fit(module, datamodule=data(shards, val_every_n_steps=2))
        outcomes.append(weights(module))
    assert torch.equal(*outcomes)


def test_prompt_that_fills_the_context_is_refused_on_every_process(shards: Path) -> None:
    """Also on a process that has another prompt: one that stops alone leaves others waiting."""
    source = data(shards, prompts=["", "x" * 62])
    module = model()
    module._trainer = SimpleNamespace(datamodule=source, world_size=2, global_rank=0)
    module.setup("predict")
    source.prompts.append("x" * 63)
    with pytest.raises(ValueError, match=r"prompt 'x+'… has 64 tokens, .* context is 64: shorten"):
        module.setup("predict")

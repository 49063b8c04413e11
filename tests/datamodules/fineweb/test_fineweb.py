"""Which shards of a folder are used, by stage, data set and tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules import FineWebDataModule
from datamodules.fineweb import MARKER
from datamodules.tokenizing import tokenize
from tests.datamodules.fineweb.hub import (
    FIRST,
    FOURTH,
    SECOND,
    SMALL,
    THIRD,
    VAL,
    Hub,
    in_stage,
    module,
    put,
)


def test_no_more_shards_than_wanted_are_used(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST, SECOND, "fineweb_val_000001.bin")
    data = module(tmp_path, 1)
    data.prepare_data()
    assert hub.names == []
    assert [path.name for path in data.shard_paths("train")] == [FIRST]
    assert [path.name for path in data.shard_paths("val")] == [VAL]


def test_wanted_shards_are_the_first_ones(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST, SECOND, FOURTH)
    hub.fail_at = THIRD
    data = module(tmp_path, 3)
    with pytest.warns(UserWarning, match=rf"Training on 2 of 3 shards \(shards=2 asks.*{THIRD}"):
        data.prepare_data()
    assert [path.name for path in data.shard_paths("train")] == [FIRST, SECOND]
    data = module(tmp_path, 4)
    with pytest.warns(UserWarning, match=rf"Training on 3 of 4 shards: {THIRD} is not in"):
        data.prepare_data()
    assert [path.name for path in data.shard_paths("train")] == [FIRST, SECOND, FOURTH]
    hub.fail_at = None
    data.prepare_data()
    assert [path.name for path in data.shard_paths("train")] == [FIRST, SECOND, THIRD, FOURTH]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (TrainerFn.FITTING, ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]),
        (TrainerFn.VALIDATING, ["fineweb_val_000000.bin"]),
        (TrainerFn.TESTING, ["fineweb_val_000000.bin"]),
        (TrainerFn.PREDICTING, []),
    ],
)
def test_only_what_the_stage_needs_is_downloaded(
    tmp_path: Path, hub: Hub, stage: TrainerFn, expected: list[str]
) -> None:
    data = in_stage(module(tmp_path / "f", 1), stage)
    data.prepare_data()
    assert hub.names == expected
    data.prepare_data()
    assert hub.names == expected


def test_predict_needs_no_shards(tmp_path: Path, hub: Hub) -> None:
    class Lengths(LightningModule):
        def predict_step(self, batch: Tensor, batch_idx: int) -> int:
            return batch.shape[1]

    data = module(tmp_path / "f", prompts=["a", "bc"])
    data.tokenizer.encode = lambda text: np.zeros(len(text), np.uint16)  # type: ignore
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    assert trainer.predict(Lengths(), datamodule=data) == [2, 3]
    assert not hub.urls and not hub.asked


@pytest.mark.parametrize("stage", [TrainerFn.VALIDATING, TrainerFn.TESTING])
def test_evaluation_without_a_network_needs_the_validation_shard(
    tmp_path: Path, hub: Hub, stage: TrainerFn
) -> None:
    put(tmp_path, FIRST)
    hub.answer = ConnectionError("no network")
    data = in_stage(module(tmp_path, 1), stage)
    with pytest.raises(FileNotFoundError, match=rf"{VAL} is not in .*no network"):
        data.prepare_data()
    put(tmp_path, VAL)
    data.prepare_data()


def test_folder_of_another_download_is_refused(tmp_path: Path, hub: Hub) -> None:
    module(tmp_path).prepare_data()
    assert (tmp_path / MARKER).read_text() == "kjj0/fineweb10B-gpt2\n"
    hub.asked.clear()
    for dataset in ("fineweb100B", "finewebedu10B"):
        message = (
            f"{tmp_path} holds kjj0/fineweb10B-gpt2, not kjj0/{dataset}-gpt2: "
            "choose another data_dir"
        )
        with pytest.raises(ValueError, match=message):
            module(tmp_path, dataset=dataset).prepare_data()
        with pytest.raises(ValueError, match=message):
            in_stage(module(tmp_path, dataset=dataset), TrainerFn.TESTING).prepare_data()
    assert not hub.asked
    module(tmp_path, 3).prepare_data()
    assert hub.names == [THIRD]


def test_copied_shards_are_recognised_by_name(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST, SECOND)
    for dataset in ("fineweb10B", "fineweb100B"):
        module(tmp_path, dataset=dataset).prepare_data()
    assert not hub.asked and not (tmp_path / MARKER).exists()
    with pytest.raises(ValueError, match=rf"holds {FIRST}, not kjj0/finewebedu10B-gpt2: choose"):
        module(tmp_path, dataset="finewebedu10B").prepare_data()
    put(tmp_path / "own", "notes_train_000000.bin")
    with pytest.raises(ValueError, match=r"holds notes_train_000000\.bin, not .* dataset: null"):
        module(tmp_path / "own").prepare_data()


@pytest.mark.parametrize("stage", [TrainerFn.FITTING, TrainerFn.TESTING])
def test_own_text_downloads_nothing(tmp_path: Path, hub: Hub, stage: TrainerFn) -> None:
    data = in_stage(module(tmp_path / "own", 3, dataset=None), stage)
    data.prepare_data()
    remedy = r"no \*_train_\*\.bin .* make it with python -m datamodules\.fineweb tokenize"
    with pytest.raises(FileNotFoundError, match=remedy):
        data.shard_paths("train")
    assert not hub.urls and not hub.asked and not (tmp_path / "own").exists()
    names = ["a_train_000002.bin", "a_train_000004.bin", "b_train_000001.bin"]
    put(tmp_path / "own", "a_val_000000.bin", "b_val_000000.bin", *names, "c_train_000000.bin")
    data.prepare_data()
    assert [path.name for path in data.shard_paths("train")] == names
    assert len(data.shard_paths("val")) == 2 and not hub.urls


def test_finetune_recipe_downloads_nothing() -> None:
    path = Path(__file__).parents[3] / "configs" / "nanogpt" / "finetune.yaml"
    options = yaml.safe_load(path.read_text())["data"]["init_args"]
    assert FineWebDataModule(**options).dataset is None


def test_own_text_is_not_mixed_with_fineweb(tmp_path: Path, hub: Hub) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 100)
    folder = tmp_path / "own"
    tokenize([text], folder, "bytes")
    data = module(folder, 5, tokenizer="bytes")
    data.prepare_data()
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))[0]) == 2
    assert hub.names == []
    assert (data.vocab_size, data.bos) == (257, 256)
    data = module(tmp_path / "nothing", tokenizer="bytes")
    data.prepare_data()
    with pytest.raises(
        FileNotFoundError,
        match=r"no \*_val_\*\.bin of bytes .* tokenize INPUT --tokenizer bytes .*, or set",
    ):
        data.setup("test")
    assert hub.names == []


def test_setup_before_prepare_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"call prepare_data\(\) first"):
        module(tmp_path).setup("test")


def test_data_dir_expands_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FineWebDataModule("~/tokens").data_dir == tmp_path / "tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "c4"}, "dataset 'c4' is none of fineweb10B, fineweb100B, finewebedu10B"),
        ({"shards": 0}, "shards must be a whole number of at least 1, got 0"),
        ({"shards": 0, "dataset": None}, "shards must be a whole number of at least 1, got 0"),
        ({"shards": 104}, "shards=104: fineweb10B has 1 to 103"),
        ({"tokenizer": "words"}, "tokenizer 'words' is none of gpt2, bytes"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineWebDataModule(**options)


def test_command_line_has_all_options() -> None:
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_lightning_class_args(FineWebDataModule, "data")
    config = parser.parse_args(
        ["--data.val_every_n_steps", "125", "--data.prompts", '["Once upon", "A"]']
    )
    assert config.data.prompts == ["Once upon", "A"] and config.data.val_every_n_steps == 125
    assert config.data.batch_tokens == 524288 and config.data.shuffle is False
    assert config.data.dataset == "fineweb10B"
    assert parser.parse_args(["--data.dataset", "null"]).data.dataset is None
    shown = parser.format_help()
    for text in ("Tokens of one optimizer step", "Number of training shards", "--data.num_workers"):
        assert text in shown


@pytest.mark.parametrize(("made", "given"), [("bytes", "gpt2"), ("gpt2", "bytes")])
def test_tokens_of_another_kind_are_refused(
    made: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the manifest, tokens of bytes would pass as GPT-2's tokens."""
    text = tmp_path / "some.txt"
    text.write_text("word " * 300)
    tokenize([text], tmp_path / "own", "bytes")
    manifest = tmp_path / "own" / "tokenize.json"
    manifest.write_text(
        manifest.read_text().replace('"tokenizer": "bytes"', f'"tokenizer": "{made}"')
    )
    data = FineWebDataModule(str(tmp_path / "own"), tokenizer=given, shards=1, **SMALL)
    data.prepare_data()
    with pytest.raises(ValueError, match=f"holds tokens of kind {made}, not {given}"):
        data.setup("fit")

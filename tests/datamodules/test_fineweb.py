"""FineWeb's shards: the download, what is there already, what is wrong with it."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules import FineWebDataModule
from datamodules.fineweb import MARKER, SOURCES
from datamodules.fineweb.__main__ import main
from datamodules.shards import Shard, write_shard
from datamodules.tokenizing import tokenize

SMALL = {"batch_tokens": 64, "sequence_length": 16, "micro_batch_size": 2}


class HubError(OSError):
    """Stands for an answer that is an error."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"{status_code} it is")
        self.response = SimpleNamespace(status_code=status_code)


class Hub:
    """Stands for huggingface_hub: writes a shard, or fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fail_at: str | None = None
        self.cut = 0
        self.urls: list[str] = []
        self.answer: Exception | None = None

    def hf_hub_url(self, repo_id: str, filename: str, *, repo_type: str) -> str:
        return f"{repo_type}s/{repo_id}/{filename}"

    def get_hf_file_metadata(self, url: str) -> None:
        self.urls.append(url)
        if self.answer:
            raise self.answer

    def hf_hub_download(
        self, repo_id: str, filename: str, *, repo_type: str, local_dir: Path
    ) -> str:
        assert repo_type == "dataset"
        self.asked.append((repo_id, filename))
        if filename == self.fail_at:
            try:
                raise ConnectionError("Name or service\nnot known")
            except ConnectionError as error:
                raise OSError("a long story about the cache") from error
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, np.full(200, len(self.asked), np.uint16))
        path.write_bytes(path.read_bytes()[: path.stat().st_size - self.cut])
        return str(path)

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.asked]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    errors = SimpleNamespace(HfHubHTTPError=HubError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return stand_in


def module(folder: Path, shards: int = 2, **options: Any) -> FineWebDataModule:
    return FineWebDataModule(str(folder), shards, **{**SMALL, **options})


def in_stage(data: FineWebDataModule, stage: TrainerFn) -> FineWebDataModule:
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))  # type: ignore[assignment]
    return data


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_shard(folder / name, np.arange(200, dtype=np.uint16))


VAL = "fineweb_val_000000.bin"
FIRST, SECOND, THIRD, FOURTH = (f"fineweb_train_00000{number}.bin" for number in range(1, 5))


@pytest.mark.parametrize(
    ("dataset", "repository", "prefix", "most"),
    [
        ("fineweb10B", "kjj0/fineweb10B-gpt2", "fineweb", 103),
        ("fineweb100B", "kjj0/fineweb100B-gpt2", "fineweb", 1030),
        ("finewebedu10B", "kjj0/finewebedu10B-gpt2", "finewebedu", 99),
    ],
)
def test_what_is_missing_is_downloaded(
    tmp_path: Path, hub: Hub, dataset: Any, repository: str, prefix: str, most: int
) -> None:
    assert SOURCES[dataset].shards == most
    data = module(tmp_path / "new" / "folder", dataset=dataset)
    data.prepare_data()
    names = [f"{prefix}_val_000000.bin", *(f"{prefix}_train_00000{i}.bin" for i in (1, 2))]
    assert hub.asked == [(repository, name) for name in names]
    data.prepare_data()
    assert len(hub.asked) == 3
    assert hub.urls == [f"datasets/{repository}/{names[0]}"]
    data.setup("fit")
    assert [path.name for path in data.shard_paths("train")] == names[1:]
    assert len(data.train_dataloader()) == 2 * 6  # 24 windows, 4 to a step, 2 to a batch


def test_what_is_there_is_kept(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, SECOND)
    module(tmp_path, 3).prepare_data()
    assert hub.names == [FIRST, "fineweb_train_000003.bin"]
    assert Shard(tmp_path / SECOND).tokens[5] == 5


def test_no_more_shards_than_wanted_are_used(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST, SECOND, "fineweb_val_000001.bin")
    data = module(tmp_path, 1)
    data.prepare_data()
    assert hub.names == []
    assert [path.name for path in data.shard_paths("train")] == [FIRST]
    assert [path.name for path in data.shard_paths("val")] == [VAL]


def test_the_wanted_shards_are_the_first_ones(tmp_path: Path, hub: Hub) -> None:
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


def test_a_trainer_predicts_without_shards(tmp_path: Path, hub: Hub) -> None:
    class Lengths(LightningModule):
        def predict_step(self, batch: Tensor, batch_idx: int) -> int:
            return batch.shape[1]

    data = module(tmp_path / "f", prompts=["a", "bc"])
    data.tokenizer.encode = lambda text: np.zeros(len(text), np.uint16)  # type: ignore
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    assert trainer.predict(Lengths(), datamodule=data) == [2, 3]
    assert not hub.urls and not hub.asked


@pytest.mark.parametrize("stage", [TrainerFn.VALIDATING, TrainerFn.TESTING])
def test_without_a_network_training_shards_do_not_help_evaluation(
    tmp_path: Path, hub: Hub, stage: TrainerFn
) -> None:
    put(tmp_path, FIRST)
    hub.answer = ConnectionError("no network")
    data = in_stage(module(tmp_path, 1), stage)
    with pytest.raises(FileNotFoundError, match=rf"{VAL} is not in .*no network"):
        data.prepare_data()
    put(tmp_path, VAL)
    data.prepare_data()


# --- one data set a folder ---


def test_a_folder_remembers_what_was_downloaded(tmp_path: Path, hub: Hub) -> None:
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


def test_shards_put_there_by_hand_are_known_by_their_names(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST, SECOND)
    for dataset in ("fineweb10B", "fineweb100B"):
        module(tmp_path, dataset=dataset).prepare_data()
    assert not hub.asked and not (tmp_path / MARKER).exists()
    with pytest.raises(ValueError, match=rf"holds {FIRST}, not kjj0/finewebedu10B-gpt2: choose"):
        module(tmp_path, dataset="finewebedu10B").prepare_data()
    put(tmp_path / "own", "notes_train_000000.bin")
    with pytest.raises(ValueError, match=r"holds notes_train_000000\.bin, not .* dataset: null"):
        module(tmp_path / "own").prepare_data()


def test_the_command_line_does_not_mix_either(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 100)
    tokenize([text], tmp_path / "own", "bytes")
    assert main(["download", "--output", str(tmp_path / "own")]) == 2
    put(tmp_path / "edu", "finewebedu_val_000000.bin")
    assert main(["download", "--output", str(tmp_path / "edu")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and not hub.urls
    assert "holds shards made by python -m datamodules.fineweb tokenize, not" in errors[0]
    assert "holds finewebedu_val_000000.bin, not kjj0/fineweb10B-gpt2" in errors[1]


@pytest.mark.parametrize("stage", [TrainerFn.FITTING, TrainerFn.TESTING])
def test_nothing_is_downloaded_for_text_of_ones_own(
    tmp_path: Path, hub: Hub, stage: TrainerFn
) -> None:
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


def test_the_recipe_for_text_of_ones_own_downloads_nothing() -> None:
    path = Path(__file__).parents[2] / "configs" / "nanogpt" / "finetune.yaml"
    options = yaml.safe_load(path.read_text())["data"]["init_args"]
    assert FineWebDataModule(**options).dataset is None


# --- without a network ---


def test_without_a_network_no_folder_is_made(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.answer = ConnectionError("no network")
    folder = tmp_path / "f"
    with pytest.raises(FileNotFoundError, match=rf"{VAL} is not in .*\(no network\)"):
        module(folder).prepare_data()
    assert main(["download", "--output", str(folder)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not hub.asked and not folder.exists()


@pytest.mark.parametrize(("status", "downloads"), [(403, 0), (404, 0), (429, 2), (503, 2)])
def test_a_busy_hub_is_asked_again(tmp_path: Path, hub: Hub, status: int, downloads: int) -> None:
    """By hf_hub_download, which waits."""
    hub.answer = HubError(status)
    data = module(tmp_path / "f", 1)
    if downloads:
        data.prepare_data()
    else:
        with pytest.raises(FileNotFoundError, match=f"{status} it is"):
            data.prepare_data()
    assert len(hub.asked) == downloads


def test_the_real_hub_library_gives_up_soon_and_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    nobody = "http://127.0.0.1:9/file"
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *args, **options: nobody)
    start = time.monotonic()
    assert main(["download", "--output", str(tmp_path / "f")]) == 1
    assert time.monotonic() - start < 5
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {VAL} is not in") and "Connection refused" in line
    assert not (tmp_path / "f").exists()


# --- what is there, and what is damaged ---


def test_without_a_network_a_part_is_enough(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST)
    hub.fail_at = SECOND
    data = module(tmp_path, 5)
    with pytest.warns(UserWarning, match=r"Training on 1 of 5 shards \(shards=1 .*not known") as w:
        data.prepare_data()
    assert "\n" not in str(w[0].message)
    data.setup("fit")
    assert len(data.shard_paths("train")) == 1


@pytest.mark.parametrize("there", [[], [FIRST], [VAL]])
def test_without_a_network_one_line_says_what_is_missing(
    tmp_path: Path, hub: Hub, there: list[str]
) -> None:
    put(tmp_path, *there)
    missing = hub.fail_at = FIRST if VAL in there else VAL
    with pytest.raises(FileNotFoundError) as caught:
        module(tmp_path).prepare_data()
    message = str(caught.value)
    assert "\n" not in message and caught.value.__suppress_context__
    for part in (missing, str(tmp_path), "Name or service not known", "data_dir"):
        assert part in message


def test_an_interrupted_download_goes_on(tmp_path: Path, hub: Hub) -> None:
    hub.fail_at = SECOND
    with pytest.warns(UserWarning, match="Training on 1 of 2"):
        module(tmp_path).prepare_data()
    hub.fail_at = None
    hub.asked.clear()
    module(tmp_path).prepare_data()
    assert hub.names == [SECOND]


def test_a_damaged_download_is_named(tmp_path: Path, hub: Hub) -> None:
    hub.cut = 2
    with pytest.raises(ValueError, match=rf"{VAL} is damaged: .* delete it"):
        module(tmp_path).prepare_data()
    hub.cut = 0
    hub.asked.clear()
    with pytest.raises(ValueError, match=VAL):
        module(tmp_path).prepare_data()
    assert not hub.asked
    (tmp_path / VAL).unlink()
    module(tmp_path).prepare_data()


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        module(tmp_path).prepare_data()
    put(tmp_path, VAL, FIRST)
    with pytest.warns(UserWarning, match="Training on 1 of 2 shards"):
        module(tmp_path).prepare_data()
    module(tmp_path, 1).prepare_data()


def test_own_text_is_never_mixed_with_fineweb(tmp_path: Path, hub: Hub) -> None:
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


def test_setup_before_prepare_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"call prepare_data\(\) first"):
        module(tmp_path).setup("test")


def test_a_home_directory_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FineWebDataModule("~/tokens").data_dir == tmp_path / "tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "c4"}, "dataset='c4': choose one of fineweb10B, fineweb100B, finewebedu10B"),
        ({"shards": 0}, "shards=0: fineweb10B has 1 to 103"),
        ({"shards": 0, "dataset": None}, "shards=0: it must be at least 1"),
        ({"shards": 104}, "shards=104: fineweb10B has 1 to 103"),
        ({"tokenizer": "words"}, "tokenizer='words': choose gpt2 or bytes"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineWebDataModule(**options)


def test_the_command_line_downloads(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "f"
    assert main(["download", "--shards", "2", "--output", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 training and 1 validation shards\n"
    assert hub.names == [VAL, FIRST, SECOND]
    hub.fail_at = "fineweb_train_000003.bin"
    assert main(["download", "--shards", "3", "--output", str(folder)]) == 1
    assert main(["download", "--shards", "104", "--output", str(folder)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "fineweb_train_000003.bin is not in" in errors[0]
    assert "shards=104: fineweb10B has 1 to 103" in errors[1]


def test_the_command_line_shows_all_options() -> None:
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
    for text in ("Tokens of one optimizer step", "Training shards wanted", "--data.num_workers"):
        assert text in shown


@pytest.mark.parametrize(("made", "given"), [("bytes", "gpt2"), ("gpt2", "bytes")])
def test_tokens_of_another_kind_are_refused(
    made: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any bytes would pass as GPT-2's tokens."""
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

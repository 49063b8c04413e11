"""Downloads of shards: with, without and with a bad network."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.fineweb import MARKER, SOURCES
from datamodules.fineweb.__main__ import main
from datamodules.shards import Shard
from datamodules.tokenizing import tokenize
from tests.datamodules.fineweb.hub import (
    FIRST,
    SECOND,
    VAL,
    Hub,
    HubError,
    module,
    put,
)


@pytest.mark.parametrize(
    ("dataset", "repository", "prefix", "most"),
    [
        ("fineweb10B", "kjj0/fineweb10B-gpt2", "fineweb", 103),
        ("fineweb100B", "kjj0/fineweb100B-gpt2", "fineweb", 1030),
        ("finewebedu10B", "kjj0/finewebedu10B-gpt2", "finewebedu", 99),
    ],
)
def test_missing_shards_are_downloaded(
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


def test_downloaded_shard_that_is_damaged_later_is_named(tmp_path: Path, hub: Hub) -> None:
    data = module(tmp_path)
    data.prepare_data()
    (tmp_path / FIRST).write_bytes((tmp_path / FIRST).read_bytes()[:-2] + b"\7\0")
    data.setup("fit")
    with pytest.raises(ValueError, match=f"{FIRST} is damaged: its checksum differs"):
        list(data.train_dataloader())
    (tmp_path / f"{FIRST}.crc32").write_text("no number")
    with pytest.raises(ValueError, match=r"\.crc32 is damaged: delete it"):
        data.setup("fit")


def test_existing_shards_are_kept(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, SECOND)
    module(tmp_path, 3).prepare_data()
    assert hub.names == [FIRST, "fineweb_train_000003.bin"]
    assert Shard(tmp_path / SECOND).tokens[5] == 5


def test_download_command_refuses_folders_of_other_shards(
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
def test_busy_hub_is_asked_again(tmp_path: Path, hub: Hub, status: int, downloads: int) -> None:
    """A busy hub is left to hf_hub_download, which waits and tries again."""
    hub.answer = HubError(status)
    data = module(tmp_path / "f", 1)
    if downloads:
        data.prepare_data()
    else:
        with pytest.raises(FileNotFoundError, match=f"{status} it is"):
            data.prepare_data()
    assert len(hub.asked) == downloads


def test_real_hub_library_fails_soon_with_one_line(
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


def test_training_without_a_network_uses_a_part(tmp_path: Path, hub: Hub) -> None:
    put(tmp_path, VAL, FIRST)
    hub.fail_at = SECOND
    data = module(tmp_path, 5)
    with pytest.warns(UserWarning, match=r"Training on 1 of 5 shards \(shards=1 .*not known") as w:
        data.prepare_data()
    assert "\n" not in str(w[0].message)
    data.setup("fit")
    assert len(data.shard_paths("train")) == 1


@pytest.mark.parametrize("there", [[], [FIRST], [VAL]])
def test_missing_shard_without_a_network_is_named(
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


def test_interrupted_download_is_resumed(tmp_path: Path, hub: Hub) -> None:
    hub.fail_at = SECOND
    with pytest.warns(UserWarning, match="Training on 1 of 2"):
        module(tmp_path).prepare_data()
    hub.fail_at = None
    hub.asked.clear()
    module(tmp_path).prepare_data()
    assert hub.names == [SECOND]


def test_damaged_download_is_named(tmp_path: Path, hub: Hub) -> None:
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


def test_missing_huggingface_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        module(tmp_path).prepare_data()
    put(tmp_path, VAL, FIRST)
    with pytest.warns(UserWarning, match="Training on 1 of 2 shards"):
        module(tmp_path).prepare_data()
    module(tmp_path, 1).prepare_data()


def test_download_command_downloads(
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


def test_marker_with_a_byte_order_mark_is_read(tmp_path: Path, hub: Hub) -> None:
    module(tmp_path).prepare_data()
    (tmp_path / MARKER).write_text("\ufeffkjj0/fineweb10B-gpt2\n", encoding="utf-8")
    module(tmp_path).prepare_data()

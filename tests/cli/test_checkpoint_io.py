"""Checkpoint files: saved whole or not at all, refused if damaged, never run as code."""

import errno
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from lit_fanions.cli import app
from lit_fanions.cli._checkpoint_io import CheckpointFiles, check_checkpoint
from tests.cli.recipes import FIT
from tests.conftest import subprocess_environment

FILES = CheckpointFiles()
STATE = {"state_dict": {"w": torch.arange(5000.0)}, "global_step": 3}


class Code:
    """An object whose pickle makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 10 kB: a write fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def is_state(checkpoint: dict) -> bool:
    return torch.equal(checkpoint["state_dict"]["w"], STATE["state_dict"]["w"])


# Saving.


def test_saved_checkpoint_loads_and_leaves_no_other_file(folder):
    FILES.save_checkpoint(STATE, "new/last.ckpt")
    assert is_state(FILES.load_checkpoint("new/last.ckpt"))
    assert os.listdir("new") == ["last.ckpt"]


def test_full_disk_keeps_the_earlier_checkpoint_and_is_named(folder, request):
    FILES.save_checkpoint(STATE, "last.ckpt")
    request.getfixturevalue("small_files")
    with pytest.raises(
        OSError, match=r"file that was there before is unchanged: 'last\.ckpt'"
    ) as e:
        FILES.save_checkpoint(STATE, "last.ckpt")
    assert e.value.errno == errno.EFBIG
    assert os.listdir() == ["last.ckpt"]
    assert is_state(FILES.load_checkpoint("last.ckpt"))


def test_object_that_cannot_be_pickled_keeps_the_earlier_checkpoint(folder):
    FILES.save_checkpoint(STATE, "last.ckpt")
    with pytest.raises(Exception, match="pickle"):
        FILES.save_checkpoint({**STATE, "hook": lambda: 0}, "last.ckpt")
    assert os.listdir() == ["last.ckpt"]
    assert is_state(FILES.load_checkpoint("last.ckpt"))


SAVE_FOREVER = """\
import torch
from lit_fanions.cli._checkpoint_io import CheckpointFiles

state = {"state_dict": {"w": torch.zeros(300_000)}}
while True:
    CheckpointFiles().save_checkpoint(state, "last.ckpt")
    print(end=".", flush=True)
"""


def test_kill_while_saving_leaves_a_whole_checkpoint(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER], env=subprocess_environment(), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(3)
    deadline = time.monotonic() + 20
    while not list(folder.glob(".*.partial")) and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert FILES.load_checkpoint("last.ckpt")["state_dict"]["w"].numel() == 300_000


def test_files_of_killed_runs_are_removed_after_an_hour(folder):
    for name, age in (("old", 4000), ("new", 0)):
        path = Path(f".last.ckpt.{name}.partial")
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    FILES.save_checkpoint(STATE, "last.ckpt")
    assert sorted(os.listdir()) == [".last.ckpt.new.partial", "last.ckpt"]


def test_fit_saves_beside_the_target_and_loads_what_it_saved(project, monkeypatch):
    saved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (saved.append(Path(b)), replace(a, b)))
    assert app.main([*FIT, "--trainer.max_epochs", "1"]) == 0
    assert [path.suffix for path in saved if path.suffix == ".ckpt"] == [".ckpt"]
    assert app.main([*FIT, "--ckpt_path", str(saved[0])]) == 0


# Damage.


def image(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


IMAGE = image(STATE)


@st.composite
def damaged_images(draw: st.DrawFn) -> bytes:
    """A checkpoint with flipped bits, with a run of zeros, or cut off."""
    data = bytearray(IMAGE)
    # Half of the damage hits the headers at the end, which are a small part of the file.
    start = draw(st.sampled_from([0, len(data) - 1500]))
    place = draw(st.integers(start, len(data) - 1))
    kind = draw(st.sampled_from(["flip", "zeros", "cut"]))
    if kind == "flip":
        data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "zeros":
        data[place : place + draw(st.integers(1, 512))] = bytes(1)
    return bytes(data[:place] if kind == "cut" else data)


def test_500_damaged_checkpoints_are_refused_by_name_or_hold_the_same(folder):
    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_images())
    def check(data: bytes) -> None:
        path = folder / "damaged.ckpt"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            checkpoint = FILES.load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert is_state(checkpoint)

    check()


@pytest.mark.parametrize("keep", [0, 1, 1000, len(IMAGE) - 1])
def test_truncated_checkpoint_is_a_mistake_on_the_command_line(keep, project, capfd):
    Path("cut.ckpt").write_bytes(IMAGE[:keep])
    with pytest.raises(SystemExit) as stop:
        app.main([*FIT, "--ckpt_path", "cut.ckpt"])
    assert stop.value.code == 2
    (line,) = [a for a in capfd.readouterr().err.splitlines() if a.startswith("error: ")]
    assert "cut.ckpt" in line


def test_damaged_last_checkpoint_is_a_mistake_on_the_command_line(project, capfd):
    last = Path("kept/last.ckpt")
    args = [
        "--trainer.callbacks",
        "{class_path: ModelCheckpoint, init_args: {dirpath: kept, save_last: true}}",
    ]
    assert app.main([*FIT, *args, "--trainer.max_epochs", "1"]) == 0
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        app.main([*FIT, *args, "--ckpt_path", "last"])
    assert stop.value.code == 2
    assert "last.ckpt is damaged" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [({"w": torch.ones(2)}, "no checkpoint of a Trainer"), ([1, 2], "no checkpoint of a Trainer")],
)
def test_file_of_another_kind_is_refused_when_it_is_loaded(content, message, folder):
    torch.save(content, "other.ckpt")
    with pytest.raises(ValueError, match=message):
        FILES.load_checkpoint("other.ckpt")


def test_weights_that_spawned_processes_return_are_loaded(folder):
    FILES.save_checkpoint({"w": torch.ones(2)}, "returned/.temp.ckpt")  # the name is Lightning's
    assert torch.equal(FILES.load_checkpoint("returned/.temp.ckpt")["w"], torch.ones(2))


# Code.


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_with_code_is_refused_unless_trusted(legacy, folder):
    torch.save({**STATE, "x": Code()}, "code.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"code\.ckpt holds objects.*--weights_only false"):
        FILES.load_checkpoint("code.ckpt")
    assert not Path("code_was_run").exists()
    FILES.load_checkpoint("code.ckpt", weights_only=False)
    assert Path("code_was_run").exists()


def test_checkpoint_from_a_url_is_not_run_as_code(folder, monkeypatch):
    import fsspec

    torch.save({**STATE, "x": Code()}, "code.ckpt")
    files = fsspec.filesystem("memory")
    files.pipe_file("/code.ckpt", Path("code.ckpt").read_bytes())
    with pytest.raises(ValueError, match="holds objects"):
        FILES.load_checkpoint("memory://code.ckpt")
    files.pipe_file("/good.ckpt", IMAGE)
    assert is_state(FILES.load_checkpoint("memory://good.ckpt"))
    assert not Path("code_was_run").exists()


def test_command_line_refuses_http(project, capfd):
    with pytest.raises(SystemExit) as stop:
        app.main([*FIT, "--ckpt_path", "http://example.org/last.ckpt"])
    assert stop.value.code == 2
    assert "use https://" in capfd.readouterr().err


@pytest.mark.parametrize("trusted", [False, True])
def test_command_line_runs_code_of_a_checkpoint_only_if_asked(trusted, project, capfd):
    options = ["--weights_only=false"] if trusted else []
    torch.save({**STATE, "x": Code()}, "code.ckpt")
    try:
        app.main([*FIT, *options, "--ckpt_path", "code.ckpt"])
    except SystemExit as stop:
        assert stop.code == 2
    assert Path("code_was_run").exists() == trusted
    assert ("--weights_only false" in capfd.readouterr().err) != trusted


# Distributed checkpoints.


@pytest.fixture
def sharded(folder: Path) -> Path:
    """A distributed checkpoint of one process."""
    dcp.save({"w": torch.arange(100.0), "lr": 0.1}, checkpoint_id=folder / "sharded")
    return folder / "sharded"


def test_distributed_checkpoint_passes(sharded):
    check_checkpoint(sharded)


def test_damaged_shard_is_named(sharded):
    (shard,) = sharded.glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[data.index(torch.arange(100.0).numpy().tobytes()) + 50] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        check_checkpoint(sharded)


def test_missing_shard_is_named(sharded):
    (shard,) = sharded.glob("*.distcp")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        check_checkpoint(sharded)


def test_metadata_with_code_is_refused_unless_trusted(sharded):
    (sharded / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"\.metadata calls posix\.mkdir.*--weights_only false"):
        check_checkpoint(sharded)
    assert not Path("code_was_run").exists()


class Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickles a member of an enum."""

    def __init__(self, *given):
        self.given = given

    def __reduce__(self):
        return getattr, self.given


def test_member_of_an_enum_in_metadata_is_read_and_no_other_attribute(sharded):
    metadata = sharded / ".metadata"
    saved = pickle.loads(metadata.read_bytes())
    saved.storage_meta = Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    metadata.write_bytes(pickle.dumps(saved))
    check_checkpoint(sharded)
    for attribute in ((Path, "unlink"), (_MEM_FORMAT_ENCODING, "__new__")):
        saved.storage_meta = Attribute(*attribute)
        metadata.write_bytes(pickle.dumps(saved))
        with pytest.raises(ValueError, match=r"calls builtins\.getattr .*--weights_only false"):
            check_checkpoint(sharded)


def test_metadata_that_changes_an_enum_gets_no_attribute_of_it(sharded, monkeypatch):
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "_member_map_", _MEM_FORMAT_ENCODING._member_map_)
    kind = f"c{_MEM_FORMAT_ENCODING.__module__}\n{_MEM_FORMAT_ENCODING.__name__}\n"
    attribute = "cbuiltins\ngetattr\n(" + kind + "V{}\ntR"
    members = "(dV__new__\n" + attribute.format("TORCH_CONTIGUOUS_FORMAT") + "s"
    changed = kind + "(N(dV_member_map_\n" + members + "stb"  # _member_map_ = members
    content = changed + "0" + attribute.format("__new__") + "."
    (sharded / ".metadata").write_bytes(content.encode())
    with pytest.raises(ValueError, match=r"calls builtins\.getattr"):
        check_checkpoint(sharded)


def test_object_with_code_in_a_shard_is_refused_unless_trusted(folder):
    dcp.save({"w": torch.ones(3), "x": Code()}, checkpoint_id=folder / "sharded")
    with pytest.raises(ValueError, match="holds objects"):
        check_checkpoint(folder / "sharded")
    check_checkpoint(folder / "sharded", weights_only=False)
    assert not Path("code_was_run").exists()


@pytest.mark.parametrize("damage", [b"", b"\x80\x04."])
def test_damaged_metadata_is_named(damage, sharded):
    (sharded / ".metadata").write_bytes(damage)
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        check_checkpoint(sharded)


def test_folder_without_metadata_is_no_checkpoint(folder):
    with pytest.raises(ValueError, match="no distributed checkpoint"):
        check_checkpoint(folder)

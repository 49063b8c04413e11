"""One writer at a time, and never half a file."""

import errno
import logging
import multiprocessing
from pathlib import Path

import pytest

from datamodules.files import only_writer, whole_file
from tests.datamodules.processes import at_once


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    def append() -> None:
        for _ in range(20):
            with only_writer(tmp_path):
                text = (tmp_path / "log").read_text()
                (tmp_path / "log").write_text(text + "x")

    (tmp_path / "log").touch()
    at_once(append)
    assert (tmp_path / "log").read_text() == 80 * "x"


def test_waiting_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    held, released = context.Event(), context.Event()

    def hold() -> None:
        with only_writer(tmp_path):
            held.set()
            released.wait(1)

    process = context.Process(target=hold)
    process.start()
    held.wait(30)
    with caplog.at_level(logging.WARNING), only_writer(tmp_path):
        assert f"waiting for another process that writes to {tmp_path}" in caplog.text
    process.join()


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_text("before")
    with (
        pytest.raises(OSError, match=r"No space left on device: .*out\.bin"),
        whole_file(path) as new,
    ):
        new.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]

"""The command that tokenizes: options, mistakes, Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.fineweb.__main__ import main
from datamodules.tokenizing import tokenize
from tests.datamodules.tokenizing.texts import contents


def test_command_writes_shards_and_reports_errors_in_a_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["tokenize", str(source), "--output", str(out), "--tokenizer", "bytes"]
    assert main([*arguments, "--shard-tokens", "3000", "--val-documents", "2"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 training and 1 validation shards\n"
    tokenize([source], tmp_path / "same", "bytes", shard_tokens=3000, val_documents=2)
    assert contents(out) == contents(tmp_path / "same")
    assert main(arguments) == 2
    assert main([*arguments[:1], "no.txt", *arguments[2:]]) == 2
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert main(["tokenize", str(tmp_path / "a.txt"), "--output", str(tmp_path / "b")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tokenise"],
        ["tokenize"],
        ["tokenize", "a.txt"],
        ["tokenize", "a.txt", "--output", "b", "--tokenizer", "words"],
        ["tokenize", "a.txt", "--output", "b", "--val-tokens", "5", "--val-documents", "5"],
        ["tokenize", "a.txt", "--out", "b"],
        ["tokenize", "a.txt", "--output", "b", "--processes", "many"],
        ["download", "--dataset", "c4"],
    ],
)
def test_command_line_mistakes_take_two_lines(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 2


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("tokenize", "download"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("(default: gpt2)", "(default: 100000000)", "10485761", "(default: fineweb10B)"):
        assert part in shown


def test_ctrl_c_prints_one_line(source: Path, tmp_path: Path) -> None:
    """Runs in a process of its own, with workers, where `python -m` must not warn either."""
    script = (
        "import signal, sys, time, runpy, datamodules.tokenizing.encoding as t\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also in the background
        "t.CHUNK = 1\n"
        "slow = t.chunked\n"
        "def chunked(documents):\n"
        "    for number, chunk in enumerate(slow(documents)):\n"
        "        if number == 20: print('started', flush=True)\n"
        "        if number > 20: time.sleep(.1)\n"
        "        yield chunk\n"
        "t.chunked = chunked\n"
        "runpy.run_module('datamodules.fineweb', run_name='__main__', alter_sys=True)\n"
    )
    arguments = ["tokenize", source, "--output", tmp_path / "out", "--tokenizer", "bytes"]
    process = subprocess.Popen(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script, *arguments, "--processes=2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err == "\ninterrupted; run the same command again to resume\n"

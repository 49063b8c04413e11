"""Text into shards: every input, any number of processes, killed and started again."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import tokenizing
from datamodules.fineweb.__main__ import main
from datamodules.shards import Shard, write_shard
from datamodules.tokenizers import GPT2Tokenizer
from datamodules.tokenizing import MANIFEST, TokenStream, UsageError, read_documents, tokenize

BOS = 256


def document(index: int) -> str:
    return f"Document {index}: " + "é wörd " * (7 * index % 23)


DOCUMENTS = [document(index) for index in range(60)]


def expected_tokens(documents: list[str]) -> list[int]:
    """What bytes tokenizing is, by definition."""
    return [token for text in documents if text for token in (BOS, *text.encode())]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "source.jsonl", DOCUMENTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_tokens(paths: list[Path]) -> list[int]:
    return [token for path in paths for token in Shard(path).tokens.tolist()]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "CHUNK", 500)


# --- shards ---


def test_shards_are_the_documents_one_after_the_other(source: Path, tmp_path: Path) -> None:
    paths = tokenize([source], tmp_path / "out", "bytes", shard_tokens=1000, val_tokens=300)
    total = expected_tokens(DOCUMENTS)
    assert [path.name for path in paths[:3]] == [
        "text_val_000000.bin", "text_train_000001.bin", "text_train_000002.bin"
    ]  # fmt: skip
    assert [len(Shard(path)) for path in paths[:-1]] == [300] + [1000] * (len(paths) - 2)
    assert len(Shard(paths[-1])) == (len(total) - 300) % 1000
    assert all_tokens(paths) == total
    assert sorted(contents(tmp_path / "out")) == sorted([MANIFEST, *(p.name for p in paths)])


def test_documents_can_be_held_out_instead(source: Path, tmp_path: Path) -> None:
    val, *train = tokenize([source], tmp_path / "out", "bytes", val_documents=7)
    assert all_tokens([val]) == expected_tokens(DOCUMENTS[:7])
    assert all_tokens(train) == expected_tokens(DOCUMENTS[7:])


@pytest.mark.parametrize(("most", "expected"), [(10**6, "tenth"), (100, "most")])
def test_by_default_a_tenth_is_held_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: str
) -> None:
    monkeypatch.setattr(tokenizing, "VAL_TOKENS", most)
    paths = tokenize([source], tmp_path / "out", "bytes")
    total = expected_tokens(DOCUMENTS)
    assert len(Shard(paths[0])) == (len(total) // 10 if expected == "tenth" else 100)
    assert all_tokens(paths) == total and len(paths) == 2


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_nothing(
    source: Path, tmp_path: Path, processes: int
) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 700}
    tokenize([source], tmp_path / "one", **options)
    tokenize([source], tmp_path / "many", processes=processes, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_few_documents_are_read_ahead(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def counted(*args: Any) -> Any:
        nonlocal read
        for text in DOCUMENTS * 50:
            read += 1
            yield text

    monkeypatch.setattr(tokenizing, "CHUNK", 1)  # a chunk is a document
    with tokenizing.encoded(counted(), "bytes", 2) as results:
        for index in range(1, 40):
            next(results)
            assert read <= index + 4


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["abcdefg"], {"val_documents": 1}),
        (["abcdefg"], {"val_tokens": 8}),
        (["abcdefg"], {}),
        (["", ""], {}),
        ([], {"val_tokens": 2}),
    ],
)
def test_too_little_text(tmp_path: Path, texts: list[str], options: dict[str, int]) -> None:
    path = write_jsonl(tmp_path / "small.jsonl", texts)
    with pytest.raises(ValueError, match="the input is too small"):
        tokenize([path], tmp_path / "out", "bytes", **options)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_stream_knows_where_it_stands() -> None:
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 1, 5, 2)]
    whole = np.concatenate(documents).tolist()
    ends = np.cumsum([3, 1, 5, 2]).tolist()
    for first in range(12):
        for second in range(13 - first):
            stream = TokenStream(iter(documents))
            assert stream.look_ahead(20) == 11
            assert stream.take(first).tolist() == whole[:first]
            index = sum(end <= first for end in ends)
            offset = first - ([0, *ends][index])
            assert (stream.document, stream.offset) == (index, offset)
            again = TokenStream(iter(documents[index:]), index, offset)
            for each in (stream, again):
                assert each.look_ahead(second) == min(second, 11 - first)
                assert each.take(second).tolist() == whole[first : first + second]
            assert (stream.document, stream.offset) == (again.document, again.offset)


# --- inputs ---


def test_every_kind_of_input(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("one file\nis one document", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "b.jsonl", ["first", "", "second"])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n")
    write_jsonl(tmp_path / "c.jsonl.gz", ["zipped"])
    table = pa.table({"text": ["row", None, "next row"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "d.parquet")
    names = ["d.parquet", "a.txt", "empty.txt", "c.jsonl.gz", "b.jsonl"]
    texts = ["row", "next row", "one file\nis one document", "zipped", "first", "second"]
    assert list(read_documents([tmp_path / name for name in names], "text")) == texts
    paths = tokenize([tmp_path / name for name in names], tmp_path / "out", "bytes")
    assert all_tokens(paths) == expected_tokens(texts)


class Letters(GPT2Tokenizer):
    """Decodes the tokens 0 to 25 as letters."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def test_gpt2_shards_are_decoded_across_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bos, texts = 50256, [*"abcdefghijkl", "mnop" * 5]
    tokens = [t for text in texts for t in (bos, *(ord(c) - ord("a") for c in text))]
    stream = np.array([24, 25, *tokens], np.uint16)  # goes on with a document of a shard before
    names = [tmp_path / f"gpt_{i}.bin" for i in range(3)]
    for path, part in zip(names, np.split(stream, [13, 30]), strict=True):
        write_shard(path, part)
    monkeypatch.setattr(tokenizing, "_tokenizer", tokenizing.load_tokenizer)
    monkeypatch.setattr(tokenizing, "GPT2Tokenizer", Letters)
    monkeypatch.setattr("datamodules.tokenizers.GPT2Tokenizer", Letters)
    paths = tokenize(names, tmp_path / "out", "bytes")
    assert all_tokens(paths) == expected_tokens(["yz", *texts])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2, is no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"tex\n', r"a\.jsonl, line 2, is no JSON .* --column"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1"),
        ("a.txt", b"good \xff bad", r"a\.txt is no UTF-8 text, at byte 5"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet is damaged or no parquet file"),
        ("a.jsonl.gz", b"not zipped", "Not a gzipped file"),
        ("a.bin", b"not tokens", r"a\.bin is no token shard"),
    ],
)
def test_a_damaged_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        tokenize([tmp_path / name], tmp_path / "out", "bytes")


def test_another_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["text of it"], "n": [1]}), tmp_path / "a.parquet")
    path = write_jsonl(tmp_path / "a.jsonl", ["and more"], field="body")
    both = [tmp_path / "a.parquet", path]
    tokens = all_tokens(tokenize(both, tmp_path / "out", "bytes", column="body", val_tokens=3))
    assert tokens == expected_tokens(["text of it", "and more"])
    with pytest.raises(ValueError, match="no column 'text' but body, n: give one"):
        tokenize(both, tmp_path / "other", "bytes")
    with pytest.raises(ValueError, match="column 'n' is no text"):
        tokenize(both[:1], tmp_path / "third", "bytes", column="n")


# --- stopped and started again ---


def killed(at: int, *args: Any, **options: Any) -> int:
    """Run ``tokenize`` in a process that kills itself at its n-th replacement of a file."""
    calls = iter(range(at))
    replace = Path.replace

    def replace_or_die(self: Path, target: Path) -> Path:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    def run() -> None:
        Path.replace = replace_or_die  # type: ignore[method-assign, assignment]
        tokenize(*args, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(30)
    return process.exitcode or 0


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_anywhere_it_goes_on(source: Path, tmp_path: Path, processes: int) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    tokenize([source], tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 10  # nine shards, each followed by the manifest, and that first and last
    for at in range(0, 20, 1 if processes == 1 else 5):
        folder = tmp_path / f"killed{at}"
        assert killed(at, [source], folder, processes=processes, **options) == -signal.SIGKILL
        assert contents(folder) != whole
        tokenize([source], folder, processes=processes, **options)
        assert contents(folder) == whole


def test_finished_shards_are_not_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    folder = tmp_path / "out"
    killed(7, [source], folder, **options)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")}
    encoded: list[str] = []
    original = tokenizing.encode_all

    def noted(documents: Any, tokenizer: Any) -> Any:
        encoded.extend(documents)
        return original(documents, tokenizer)

    monkeypatch.setattr(tokenizing, "encode_all", noted)
    paths = tokenize([source], folder, **options)
    kept = [p for p in paths if before.get(p.name) == p.stat().st_mtime_ns]
    assert kept == paths[:3]
    assert encoded == DOCUMENTS[-len(encoded) :] and 0 < len(encoded) < 50
    encoded.clear()
    assert tokenize([source], folder, **options) == paths and not encoded


@pytest.mark.parametrize("change", ["edit", "other folder"])
def test_a_changed_input_is_never_gone_on_with(source: Path, tmp_path: Path, change: str) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    folder = tmp_path / "out"
    first = write_jsonl(tmp_path / "first.jsonl", ["unchanged"])
    killed(7, [first, source], folder, **options)
    before, size = contents(folder), source.stat().st_size
    if change == "other folder":
        (tmp_path / "new").mkdir()
        source = tmp_path / "new" / source.name
    write_jsonl(source, [text.replace("Document", "document") for text in DOCUMENTS])
    assert source.stat().st_size == size
    with pytest.raises(UsageError, match=r"were changed since \(source\.jsonl\): choose another"):
        tokenize([first, source], folder, **options)
    assert contents(folder) == before


def test_moved_inputs_are_gone_on_with(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900, "val_tokens": 200}
    tokenize([source], tmp_path / "whole", **options)
    killed(7, [source], tmp_path / "out", **options)
    (tmp_path / "new").mkdir()
    tokenize([source.rename(tmp_path / "new" / source.name)], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_a_damaged_shard_is_made_again(source: Path, tmp_path: Path, damage: str) -> None:
    options: dict[str, Any] = {"tokenizer": "bytes", "shard_tokens": 900}
    paths = tokenize([source], tmp_path / "out", **options)
    whole = contents(tmp_path / "out")
    if damage == "remove":
        paths[2].unlink()
    else:
        os.truncate(paths[2], 1100)
    tokenize([source], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == whole


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    def run() -> None:
        with tokenizing.encoded(iter(DOCUMENTS * 100), "bytes", 2) as results:
            next(results)
            children = [child.pid for child in multiprocessing.active_children()]
            (tmp_path / "partial").write_text(json.dumps(children))
            (tmp_path / "partial").replace(tmp_path / "pids")
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    limit = time.monotonic() + 20
    while not (tmp_path / "pids").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    pids = json.loads((tmp_path / "pids").read_text())
    assert len(pids) == 2
    process.kill()
    process.join()
    while any(map(_alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


# --- what is refused ---


def test_other_settings_need_another_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    tokenize([source], folder, "bytes")
    before = contents(folder)
    with pytest.raises(UsageError, match="made with shard_tokens=100000000, not 500: choose"):
        tokenize([source], folder, "bytes", shard_tokens=500)
    with pytest.raises(UsageError, match=r"other inputs.* \(source\.jsonl\): choose another"):
        tokenize([source, source], folder, "bytes")
    with pytest.raises(UsageError, match="was not made with GPT-2's tokenizer"):
        tokenize([folder / "text_train_000001.bin"], tmp_path / "new", "bytes")
    assert contents(folder) == before
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=f"{MANIFEST} is damaged: delete"):
        tokenize([source], folder, "bytes")
    (folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match=r"has other shards, text_train_000001\.bin"):
        tokenize([source], folder, "bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes=0: it must be at least 1"),
        ({"shard_tokens": 1}, "shard_tokens=1: it must be at least 2"),
        ({"val_tokens": 1}, "val_tokens=1"),
        ({"val_documents": 0}, "val_documents=0"),
        ({"val_documents": 1, "val_tokens": 5}, "give one of them"),
        ({"inputs": []}, "there are no inputs"),
        ({"inputs": [Path("nowhere.txt")]}, r"nowhere\.txt is no file"),
        ({"inputs": [Path(__file__)]}, r"only \.txt, \.jsonl, .* can be read"),
    ],
)
def test_arguments_are_checked_before_anything_is_done(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"inputs": [source], "output": tmp_path / "out", **options}
    with pytest.raises(UsageError, match=message):
        tokenize(**arguments, tokenizer="bytes")
    assert not (tmp_path / "out").exists()


# --- the command line ---


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_mistakes_on_the_command_line(
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


def test_ctrl_c_is_one_line(source: Path, tmp_path: Path) -> None:
    """In a process of its own, with workers; also that `python -m` works without a warning."""
    script = (
        "import signal, sys, time, runpy, datamodules.tokenizing as t\n"
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
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
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
    assert err == "\ninterrupted; the same command goes on from here\n"

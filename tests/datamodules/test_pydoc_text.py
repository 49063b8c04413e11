"""Python's documentation as text: gathering, splits and cache."""

import builtins
import platform
from pathlib import Path

import pytest

from datamodules import PydocDataModule, pydoc_text
from datamodules.pydoc_text import gather_documents, is_held_out
from datamodules.shards import Shard
from datamodules.tokenizers import ByteTokenizer

MODULE = '''"""Module text."""
class C:
    """Class text."""
    def f(self):
        """Method text."""
        return "no documentation"
    async def g(self): "Coroutine text."
def h(): pass
'''


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """Write a small standard library, with files that cannot be read or parsed among others."""
    folder = tmp_path / "lib"
    for name in ("pydoc_data", "test", "pkg/tests", "site-packages", "pkg/sub", "idlelib"):
        (folder / name).mkdir(parents=True)
    (folder / "a.py").write_text(MODULE)
    (folder / "broken.py").write_text("def (:")
    (folder / "zero.py").write_bytes(b"x = 1\0")
    (folder / "latin.py").write_bytes(b'"""caf\xe9"""')
    (folder / "declared.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""caf\xe9"""')
    (folder / "escape.py").write_text('"""\\d is old"""\n')
    (folder / "empty.py").touch()
    (folder / "gone.py").symlink_to(folder / "nowhere.py")
    (folder / "raises.py").write_text('"""Never run."""\nraise SystemExit(3)\n')
    (folder / "pkg/sub/b.py").write_text('"""In a package."""')
    (folder / "pkg/sub/again.py").write_text('"""In a package."""')
    for name in ("test", "pkg/tests", "site-packages", "idlelib"):
        (folder / name / "c.py").write_text('"""Unwanted."""')
    (folder / "pydoc_data/topics.py").write_text(
        "# generated\ntopics = {'if': 'The if statement.\\n', 'for': 'The for ' 'statement.'}\n"
    )
    return folder


def test_documents_are_topics_and_docstrings(stdlib: Path) -> None:
    *documents, last = gather_documents(stdlib)
    assert documents == [
        "The if statement.\n",
        "The for statement.",
        "Module text.\n\nClass text.\n\nMethod text.\n\nCoroutine text.",
        "café",
        "\\d is old",
        "In a package.",
        "Never run.",
    ]
    for kind in (int, len, ValueError):
        assert kind.__doc__ in last


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_documents_without_a_library_are_of_the_builtins(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    (document,) = gather_documents(folder)
    assert len(document) > 10_000


@pytest.fixture
def small(stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(40):
        (stdlib / f"m{number:02d}.py").write_text(f'"""Module {number}. {"words " * 20}"""')
    monkeypatch.setattr(pydoc_text.sysconfig, "get_path", lambda name: str(stdlib))
    return stdlib


def test_splits_hold_the_documents(small: Path, tmp_path: Path) -> None:
    data = PydocDataModule(str(tmp_path / "cache"))
    data.prepare_data()
    documents = gather_documents(small)
    tokenizer = ByteTokenizer()
    for split in ("train", "val"):
        chosen = [text for text in documents if is_held_out(text) == (split == "val")]
        expected = [token for text in chosen for token in (256, *tokenizer.encode(text).tolist())]
        (path,) = data.shard_paths(split)  # type: ignore[arg-type]
        assert chosen and Shard(path).tokens.tolist() == expected
    data.setup("fit")
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (16, 256) and inputs[0, 0] == data.bos == 256
    assert data.tokenizer.decode(inputs[0]).startswith("<|endoftext|>The if statement.")


def test_text_is_gathered_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = PydocDataModule()
    assert data.data_dir == tmp_path / "xdg" / "lit_fanions"
    data.prepare_data()
    files = {path: path.read_bytes() for path in data.data_dir.glob("*.bin")}
    assert len(files) == 2
    assert all(f"cpython-{platform.python_version()}" in path.name for path in files)
    gather = pydoc_text.gather_documents
    monkeypatch.setattr(pydoc_text, "gather_documents", None)
    PydocDataModule().prepare_data()
    monkeypatch.setattr(pydoc_text, "gather_documents", gather)
    (train,) = data.shard_paths("train")
    train.write_bytes(files[train][:2000])
    data.prepare_data()
    assert {path: path.read_bytes() for path in data.data_dir.glob("*.bin")} == files
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    data.prepare_data()
    assert len(list(data.data_dir.glob("*.bin"))) == 4


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert PydocDataModule().data_dir == tmp_path / ".cache" / "lit_fanions"
    assert PydocDataModule("~/other").data_dir == tmp_path / "other"


def test_few_documents_are_in_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydoc_text, "gather_documents", lambda stdlib: ["only this " * 1000])
    data = PydocDataModule(str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert len(data.shard_paths("val")) == 1


def test_python_without_documentation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pydoc_text, "gather_documents", lambda stdlib: [])
    with pytest.raises(RuntimeError, match="comes without documentation"):
        PydocDataModule(str(tmp_path)).prepare_data()


def test_this_installation_has_enough_text(tmp_path: Path) -> None:
    data = PydocDataModule(str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_dataloader()) >= 20
    assert len(data.val_dataloader()) >= 1
    assert builtins.__doc__


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_errors_that_are_not_of_the_source_are_raised(
    stdlib: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(source: bytes) -> None:
        raise error

    monkeypatch.setattr(pydoc_text.ast, "parse", fail)
    with pytest.raises(error):
        gather_documents(stdlib)

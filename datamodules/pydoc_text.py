"""Python's own documentation: real English text that needs no download."""

import ast
import builtins
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.files import only_writer
from datamodules.shards import Shard, Split, write_shard
from datamodules.tokenizers import ByteTokenizer
from datamodules.tokens import TokenDataModule

SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
HELD_OUT = 16  # one document in that many is for validation
VERSION = 1  # of the cached files: counts changes of what is gathered


def gather_documents(stdlib: Path) -> list[str]:
    """Return the documentation of Python as texts without duplicates, in a fixed order.

    The documents are the topics of the language reference that pydoc shows, each module's
    docstrings, and those of the built-in functions and classes. Sources are parsed, not imported.
    """
    documents = [*_topics(stdlib / "pydoc_data" / "topics.py"), *_docstrings(stdlib), _builtins()]
    return list(dict.fromkeys(text for text in documents if text.strip()))


def is_held_out(document: str) -> bool:
    """Return whether a document is for validation, decided by its content alone."""
    return hashlib.sha256(document.encode(errors="replace")).digest()[0] % HELD_OUT == 0


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences are only warned about
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # written for another version of Python, or not readable


def _topics(path: Path) -> Iterator[str]:
    module = _parse(path)
    for node in module.body if module else []:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for text in node.value.values:
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    yield text.value


def _docstrings(stdlib: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(stdlib.rglob("*.py")):
        module = None if SKIPPED & set(path.relative_to(stdlib).parts) else _parse(path)
        if module:
            nodes = [node for node in ast.walk(module) if isinstance(node, kinds)]
            texts = [ast.get_docstring(node) for node in nodes]
            yield "\n\n".join(text for text in texts if text)


def _builtins() -> str:
    texts = [getattr(builtins, name).__doc__ for name in sorted(dir(builtins))]
    return "\n\n".join(dict.fromkeys(text for text in texts if isinstance(text, str)))


class PydocDataModule(TokenDataModule):
    """The documentation that comes with Python, as bytes: 2 MB of real English text.

    Gathered from the installed standard library, and cached for each version of Python. One
    document in 16, chosen by its content, is for validation.

    Args:
        data_dir: Folder of the cached shards; None: lit_fanions in $XDG_CACHE_HOME or ~/.cache.
        batch_tokens: Tokens of one optimizer step, see TokenDataModule.
        sequence_length: Tokens of a sequence.
        micro_batch_size: Largest number of sequences per forward pass and process.
        options: Other options of TokenDataModule.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_tokens: int = 4096,
        sequence_length: int = 256,
        micro_batch_size: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(
            ByteTokenizer(), batch_tokens, sequence_length, micro_batch_size, **options
        )
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lit_fanions")
        self.data_dir = Path(data_dir or cache).expanduser()

    def prepare_data(self) -> None:
        """Gather the text, unless intact shards of it are cached.

        Raises:
            RuntimeError: If this Python has no documentation.
        """
        if self._is_cached():
            return
        with only_writer(self.data_dir):
            if not self._is_cached():  # by another process meanwhile
                self._gather()

    def shard_paths(self, split: Split) -> list[Path]:
        """Return the file of one split for this version of Python."""
        version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
        return [self.data_dir / f"pydoc{VERSION}-{version}_{split}_000000.bin"]

    def _is_cached(self) -> bool:
        try:
            for split in ("train", "val"):
                Shard(*self.shard_paths(split)).verify()
        except (OSError, ValueError):
            return False
        return True

    def _gather(self) -> None:
        documents = gather_documents(Path(sysconfig.get_path("stdlib")))
        start = np.array([self.bos], np.uint16)
        for split in ("val", "train"):
            chosen = [text for text in documents if is_held_out(text) == (split == "val")]
            # With so few documents that a split has none, both splits get all of them.
            tokens = [self.tokenizer.encode(text) for text in chosen or documents]
            if not tokens:
                raise RuntimeError(
                    "this installation of Python comes without documentation (does it run with "
                    "-OO?): train on another text, see python -m datamodules.fineweb tokenize"
                )
            (path,) = self.shard_paths(split)
            write_shard(path, np.concatenate([part for text in tokens for part in (start, text)]))

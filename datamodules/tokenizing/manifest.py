"""The manifest beside the shards: what they were made of, and where in the input they end."""

import json
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datamodules.shards import Shard, Tokens, write_shard
from datamodules.tokenizers import TokenizerName
from datamodules.tokenizing.stream import TokenStream

MANIFEST = "tokenize.json"


class UsageError(ValueError):
    """The request is not possible; nothing was done."""


@dataclass(frozen=True)
class Settings:
    """What the shards depend on.

    Attributes:
        inputs: Name, size and time of the last change of each input file.
        tokenizer: Name of the tokenizer.
        shard_tokens: Number of tokens of a training shard.
        val_tokens: Number of tokens of the validation shard, or None.
        val_documents: Number of documents of the validation shard, or None.
        column: Field of JSON lines, or column of parquet files, that holds the text.
    """

    inputs: list[list[str | int]]
    tokenizer: TokenizerName
    shard_tokens: int
    val_tokens: int | None
    val_documents: int | None
    column: str


def file_identity(path: Path) -> list[str | int]:
    """Return name, size and time of the last change of a file.

    A digest would take as long as reading everything; the folder may differ between machines.
    """
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


class Manifest:
    """The shards that were written into a folder.

    Args:
        folder: Folder of the shards and of the manifest's file.
        settings: Settings that the shards are made with.

    Attributes:
        shards: Name, number of tokens, and position in the input after each shard.
        complete: Whether these are all shards of the input.

    Raises:
        UsageError: If the folder holds shards that were made otherwise.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.shards: list[dict[str, Any]] = []
        self.complete = False
        saved = _read(folder)
        if saved is None:
            _check_without_shards(folder)
        else:
            _check_same_settings(folder, saved["settings"], asdict(settings))
            self.shards = _leading_intact(folder, saved["shards"])
            self.complete = saved["complete"] and len(self.shards) == len(saved["shards"])

    @property
    def paths(self) -> list[Path]:
        """Paths of the shards."""
        return [self.folder / shard["name"] for shard in self.shards]

    @property
    def position(self) -> tuple[int, int]:
        """Number of the document that the next shard starts in, and of its tokens to skip."""
        last = self.shards[-1] if self.shards else {"document": 0, "offset": 0}
        return last["document"], last["offset"]

    def add(self, tokens: Tokens, stream: TokenStream) -> None:
        """Write the next shard; the first one of a folder is for validation.

        Args:
            tokens: Tokens of the shard.
            stream: The stream that the tokens were taken from, which stands behind them.
        """
        if not self.shards:  # before the first shard, so that a resumed run knows the folder
            self.save()
        name = f"text_{'train' if self.shards else 'val'}_{len(self.shards):06d}.bin"
        write_shard(self.folder / name, tokens)
        position = {"document": stream.document, "offset": stream.offset}
        self.shards.append({"name": name, "tokens": len(tokens), **position})
        self.save()

    def finish(self) -> None:
        """Record that there are no more shards."""
        self.complete = True
        self.save()

    def save(self) -> None:
        """Write the file; it appears whole or not at all."""
        path = self.folder / MANIFEST
        temporary = path.with_suffix(".partial")
        settings = asdict(self.settings)
        content = {"settings": settings, "shards": self.shards, "complete": self.complete}
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(path)


def recorded_tokenizer(folder: Path) -> str | None:
    """Return the tokenizer of the shards that ``tokenize`` wrote into a folder, or None."""
    saved = _read(folder)
    return saved["settings"].get("tokenizer") if saved else None


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor may add a mark
    except FileNotFoundError:
        return None
    except ValueError:
        saved = None
    fields = {"settings": dict, "shards": list, "complete": bool}
    if not isinstance(saved, dict) or any(
        not isinstance(saved.get(name), kind) for name, kind in fields.items()
    ):
        raise UsageError(f"{path} is damaged: delete {folder} and start again")
    return saved


def _check_without_shards(folder: Path) -> None:
    others = sorted(folder.glob("*_train_*.bin")) + sorted(folder.glob("*_val_*.bin"))
    if others:
        raise UsageError(f"{folder} has other shards, {others[0].name}: choose another folder")


def _check_same_settings(folder: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    changed = [name for name in settings if saved.get(name) != settings[name]]
    if "inputs" in changed:
        pairs = zip_longest(saved.get("inputs") or [], settings["inputs"])
        first = next(str((now or before)[0]) for before, now in pairs if before != now)
        raise UsageError(
            f"{folder} was made with other inputs, or ones that were changed since ({first}): "
            "choose another folder, or delete it"
        )
    if changed:
        name = changed[0]
        raise UsageError(
            f"{folder} was made with {name}={saved.get(name)}, not {settings[name]}: choose "
            "another folder, or delete it"
        )


def _leading_intact(folder: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    intact = []
    for shard in shards:
        try:
            if len(Shard(folder / shard["name"])) != shard["tokens"]:
                break
        except (OSError, ValueError):
            break
        intact.append(shard)
    return intact

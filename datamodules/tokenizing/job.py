"""The whole way from text files to token shards, and the manifest that a killed run resumes by.

The manifest is a file beside the shards. It says what they were made of, and for each of them its
checksum and where in the input the next one starts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from datamodules.files import only_writer, whole_file
from datamodules.shards import Shard, Tokens, write_shard
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing.documents import SUFFIXES, read_documents, suffix
from datamodules.tokenizing.encoding import TokenStream, encoded, take_validation
from lit_fanions.checks import whole_number
from lit_fanions.progress import Meter

MANIFEST = "tokenize.json"


class UsageError(ValueError):
    """The request is not possible; nothing was done."""


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: TokenizerName = "gpt2",
    processes: int = 1,
    shard_tokens: int = 100_000_000,
    val_tokens: int | None = None,
    val_documents: int | None = None,
    column: str = "text",
    progress: bool = False,
) -> list[Path]:
    """Make token shards of text, a validation shard first; resume if a run was killed before.

    A run is resumed only with the same settings and inputs. Inputs are recognised by name, size and
    time of the last change: they may be moved, but not edited, nor copied without that time. While
    another process makes shards in the same folder, this one waits.

    Args:
        inputs: Files in the order of the tokens: .txt, .jsonl, .jsonl.gz, .parquet, or .bin with
            GPT-2's tokens.
        output: Folder of the shards.
        tokenizer: Name of the tokenizer.
        processes: Number of processes that encode; the shards do not depend on it.
        shard_tokens: Number of tokens of a training shard; the last one is shorter.
        val_tokens: Number of tokens of the validation shard; None: a tenth of all, at most
            VAL_TOKENS.
        val_documents: Number of documents of the validation shard, instead of val_tokens.
        column: Field of JSON lines, or column of parquet files, that holds the text.
        progress: Report on stderr how far the work is.

    Returns:
        The shards' paths.

    Raises:
        UsageError: If an argument or the folder does not allow it.
        ValueError: If an input is damaged or has too little text.
    """
    _check_inputs(inputs)
    numbers = ("processes", processes, 1), ("shard_tokens", shard_tokens, 2)
    held_out = ("val_tokens", val_tokens, 2), ("val_documents", val_documents, 1)
    try:
        for name, number, least in (*numbers, *(each for each in held_out if each[1] is not None)):
            whole_number(name, number, least)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if val_tokens is not None and val_documents is not None:
        raise UsageError("val_tokens and val_documents: give one of them")
    load_tokenizer(tokenizer)
    identities = [file_identity(path) for path in inputs]
    settings = Settings(identities, tokenizer, shard_tokens, val_tokens, val_documents, column)
    with only_writer(output):
        manifest = Manifest(output, settings)
        for stale in output.glob("*.partial"):  # left by a run that was killed while it wrote
            stale.unlink()
        if not manifest.complete:
            _write_shards(inputs, manifest, processes, progress)
    return [output / shard["name"] for shard in manifest.shards]


def file_identity(path: Path) -> list[str | int]:
    """Return name, size and time of the last change of a file.

    A digest would take as long as reading everything; the folder may differ between machines.
    """
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def recorded_tokenizer(folder: Path) -> str | None:
    """Return the tokenizer of the shards that ``tokenize`` wrote into a folder, or None."""
    saved = _read(folder)
    return saved["settings"].get("tokenizer") if saved else None


# --- the manifest ---


@dataclass(frozen=True)
class Settings:
    """What the shards depend on; see ``tokenize``."""

    inputs: list[list[str | int]]  # see file_identity
    tokenizer: TokenizerName
    shard_tokens: int
    val_tokens: int | None
    val_documents: int | None
    column: str


class Manifest:
    """The shards that were written into a folder.

    Attributes:
        shards: Name, number of tokens, checksum, and position in the input after each shard.
        complete: Whether these are all shards of the input.

    Raises:
        UsageError: If the folder holds shards that were made with other settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.shards: list[dict[str, Any]] = []
        self.complete = False
        saved = _read(folder)
        others = sorted(folder.glob("*_train_*.bin")) + sorted(folder.glob("*_val_*.bin"))
        if saved is None and others:
            raise UsageError(f"{folder} has other shards, {others[0].name}: choose another folder")
        if saved is not None:
            _check_same_settings(folder, saved["settings"], asdict(settings))
            self.shards = _leading_intact(folder, saved["shards"])
            self.complete = saved["complete"] and len(self.shards) == len(saved["shards"])

    def add(self, tokens: Tokens, stream: TokenStream) -> None:
        """Write the tokens that ``stream`` gave last; the first shard is for validation."""
        if not self.shards:  # before the first shard, so that a resumed run knows the folder
            self.save()
        name = f"text_{'train' if self.shards else 'val'}_{len(self.shards):06d}.bin"
        shard = {"name": name, "tokens": len(tokens)}
        shard["crc32"] = write_shard(self.folder / name, tokens)
        self.shards.append({**shard, "document": stream.document, "offset": stream.offset})
        self.save()

    def save(self) -> None:
        """Write the file; it appears whole or not at all."""
        settings = asdict(self.settings)
        content = {"settings": settings, "shards": self.shards, "complete": self.complete}
        with whole_file(self.folder / MANIFEST) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


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
    """Return the entries before the first shard that is missing or damaged."""
    intact = []
    with Meter(f"checking the shards in {folder}", len(shards)) as meter:
        for entry in shards:
            try:
                shard = Shard(folder / entry["name"])
                shard.verify()
            except (OSError, ValueError):
                break
            checksum = entry.get("crc32", 0)  # a manifest of 0.1.0 has none
            if (len(shard), shard.checksum) != (entry["tokens"], checksum):
                break
            intact.append(entry)
            meter.advance()
    return intact


# --- the work ---


def _write_shards(
    inputs: Sequence[Path], manifest: Manifest, processes: int, progress: bool
) -> None:
    settings = manifest.settings
    # The next shard starts in this document, after so many of its tokens.
    last = manifest.shards[-1] if manifest.shards else {"document": 0, "offset": 0}
    document, offset = last["document"], last["offset"]
    read = 0.0

    def note(size: float) -> None:
        nonlocal read
        read = size

    documents = islice(read_documents(inputs, settings.column, note), document, None)
    with (
        Meter("tokenizing", sum(path.stat().st_size for path in inputs)) as meter,
        encoded(documents, settings.tokenizer, processes) as results,
    ):

        def counted() -> Iterator[Tokens]:
            count = sum(shard["tokens"] for shard in manifest.shards)
            for i, tokens in enumerate(results):
                if i == 0:  # what a resumed run skips takes no time
                    meter.restart(read)
                count += len(tokens)
                if progress:
                    meter.reach(read, f"{count / 1e6:.1f} million tokens")
                yield tokens

        stream = TokenStream(counted(), document, offset)
        if not manifest.shards:
            held_out = take_validation(stream, settings.val_tokens, settings.val_documents)
            manifest.add(held_out, stream)
        while len(tokens := stream.take(settings.shard_tokens)):
            manifest.add(tokens, stream)
    manifest.complete = True
    manifest.save()


def _check_inputs(inputs: Sequence[Path]) -> None:
    if not inputs:
        raise UsageError("there are no inputs: name files")
    for path in inputs:
        if not path.is_file():
            raise UsageError(f"{path} is no file: name the files, such as {path}/*.parquet")
        if not suffix(path):
            raise UsageError(f"{path}: only {', '.join(SUFFIXES)} can be read")
        if path.suffix == ".bin" and recorded_tokenizer(path.parent) not in (None, "gpt2"):
            raise UsageError(f"{path} was not made with GPT-2's tokenizer: give the text itself")

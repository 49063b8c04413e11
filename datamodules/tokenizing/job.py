"""The whole way from text files to token shards."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from datamodules.shards import Tokens
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing.documents import SUFFIXES, read_documents, suffix
from datamodules.tokenizing.encoding import encoded
from datamodules.tokenizing.manifest import (
    Manifest,
    Settings,
    UsageError,
    file_identity,
    recorded_tokenizer,
)
from datamodules.tokenizing.stream import TokenStream, take_validation
from lit_fanions.checks import whole_number


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
    time of the last change: they may be moved, but not edited, nor copied without that time.

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
        progress: Show a bar on a terminal.

    Returns:
        The shards' paths.

    Raises:
        UsageError: If an argument or the folder does not allow it.
        ValueError: If an input is damaged or has too little text.
    """
    _check_inputs(inputs)
    try:
        whole_number("processes", processes)
        whole_number("shard_tokens", shard_tokens, 2)
        if val_tokens is not None:
            whole_number("val_tokens", val_tokens, 2)
        if val_documents is not None:
            whole_number("val_documents", val_documents)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if val_tokens is not None and val_documents is not None:
        raise UsageError("val_tokens and val_documents: give one of them")
    load_tokenizer(tokenizer)
    identities = [file_identity(path) for path in inputs]
    settings = Settings(identities, tokenizer, shard_tokens, val_tokens, val_documents, column)
    output.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(output, settings)
    for stale in output.glob("*.partial"):  # left by a run that was killed while it wrote
        stale.unlink()
    if not manifest.complete:
        _write_shards(inputs, manifest, processes, progress)
    return manifest.paths


def _write_shards(
    inputs: Sequence[Path], manifest: Manifest, processes: int, progress: bool
) -> None:
    settings = manifest.settings
    document, offset = manifest.position
    documents = islice(read_documents(inputs, settings.column), document, None)
    with (
        tqdm(unit=" tokens", unit_scale=True, disable=None if progress else True) as bar,
        encoded(documents, settings.tokenizer, processes) as results,
    ):
        bar.update(sum(shard["tokens"] for shard in manifest.shards))

        def counted() -> Iterator[Tokens]:
            for tokens in results:
                bar.update(len(tokens))
                yield tokens

        stream = TokenStream(counted(), document, offset)
        if not manifest.shards:
            held_out = take_validation(stream, settings.val_tokens, settings.val_documents)
            manifest.add(held_out, stream)
        while len(tokens := stream.take(settings.shard_tokens)):
            manifest.add(tokens, stream)
    manifest.finish()


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

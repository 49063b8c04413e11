"""`python -m datamodules.fineweb {download,tokenize}`: get token shards, or make them of text."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from datamodules.fineweb import Dataset, check_folder, check_source, download, find_shards
from datamodules.tokenizers import TokenizerName
from datamodules.tokenizing import SUFFIXES, VAL_TOKENS, UsageError, tokenize

PROGRAM = "python -m datamodules.fineweb"
USAGE_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130

EXAMPLES = f"""\
examples:
  {PROGRAM} download --shards 9
  {PROGRAM} tokenize data/fineweb/*_val_*.bin data/fineweb/*_train_*.bin \\
      --tokenizer bytes --output data/fineweb_bytes
  {PROGRAM} tokenize 10BT/*.parquet --processes 8 --output data/fineweb10B
  {PROGRAM} tokenize notes/*.txt --val-documents 3 --output data/notes
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in two lines."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with status 2."""
        self.exit(USAGE_ERROR, f"error: {message}\n  all options: {self.prog} --help\n")


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Token shards for datamodules.FineWebDataModule.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    shown: Any = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    download = commands.add_parser(
        "download", help="download FineWeb's GPT-2 tokens from the Hugging Face hub", **shown,
        description="Download the validation shard and the first training shards, of 100 million "
        "GPT-2 tokens and 200 MB each. Finished files are kept, unfinished ones continued.",
    )  # fmt: skip
    add = download.add_argument
    add("--dataset", choices=get_args(Dataset), default="fineweb10B", help="data set")
    add("--shards", type=int, default=9, metavar="N", help="number of training shards")
    folder = Path("data/fineweb")
    add("--output", type=Path, default=folder, metavar="DIR", help="folder of the shards")
    tokenizing = commands.add_parser(
        "tokenize", help="make shards of text files", **shown,
        description="Make shards of text: one for validation, then those to train on. Each "
        "document starts with the token that separates documents. The same command resumes a run "
        "that was stopped, unless an input was changed since. The shards depend on the input and "
        "on all options but --processes. In a .txt, Windows' line ends become line feeds; byte "
        "order marks are left out.",
    )  # fmt: skip
    _add_tokenize_options(tokenizing)
    return parser


def _add_tokenize_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, target: Any = parser, **options: Any) -> None:
        target.add_argument(name, help=text, **options)

    number: Any = {"type": int, "metavar": "N"}
    unset: Any = {"default": argparse.SUPPRESS}
    suffixes = ", ".join(SUFFIXES)
    add("inputs", f"files in the order of their tokens: {suffixes}; a .txt is one document, a .bin "
        "holds GPT-2 tokens, which are decoded", type=Path, nargs="+", metavar="INPUT")  # fmt: skip
    add("--output", "folder of the shards, without other shards",
        type=Path, required=True, metavar="DIR", **unset)  # fmt: skip
    add("--tokenizer", "kind of tokens", choices=get_args(TokenizerName), default="gpt2")
    add("--processes", "number of processes that encode", default=1, **number)
    add("--shard-tokens", "number of tokens of a training shard", default=100_000_000, **number)
    group = parser.add_mutually_exclusive_group()
    tenth = f"hold the first N tokens out (default: a tenth, at most {VAL_TOKENS})"
    add("--val-tokens", tenth, group, **number, **unset)
    add("--val-documents", "hold the first N documents out instead", group, **number, **unset)
    add("--column", "field of JSON lines, or column of parquet files, with the text",
        default="text", metavar="NAME")  # fmt: skip


def run(command: str, output: Path, **options: Any) -> None:
    """Run a command, then print how many shards the folder has."""
    if command == "download":
        try:
            check_source(**options)
            check_folder(output, options["dataset"])
        except ValueError as error:
            raise UsageError(str(error)) from None
        download(output, **options)
    else:
        tokenize(output=output, progress=True, **options)
    train, val = (len(find_shards(output, split)) for split in ("train", "val"))
    print(f"{output}: {train} training and {val} validation shards")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run(**vars(build_parser().parse_args(args)))
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        plain = isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError))
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text if plain else f'{type(error).__name__}: {text}'}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else RUN_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

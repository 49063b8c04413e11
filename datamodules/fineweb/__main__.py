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
    """Reports a mistake in two lines."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with status 2."""
        self.exit(USAGE_ERROR, f"error: {message}\n  all options: {self.prog} --help\n")


def parser() -> Parser:
    """The command line."""
    result = Parser(
        prog=PROGRAM,
        description="Token shards for datamodules.FineWebDataModule.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)

    get = commands.add_parser(
        "download",
        help="download FineWeb's GPT-2 tokens from the Hugging Face hub",
        description="Download the validation shard and the first training shards, of 100 million "
        "GPT-2 tokens and 200 MB each. What is there is kept, what was begun is gone on with.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    get.add_argument("--dataset", choices=get_args(Dataset), default="fineweb10B", help="which one")
    get.add_argument("--shards", type=int, default=9, metavar="N", help="number of training shards")
    get.add_argument(
        "--output",
        type=Path,
        default=Path("data/fineweb"),
        metavar="DIR",
        help="folder of the shards",
    )

    make = commands.add_parser(
        "tokenize",
        help="make shards of text files",
        description="Make shards of text: one for validation, then those to train on. Each "
        "document starts with the token that separates documents. The same command goes on where "
        "one was stopped, unless an input was changed since. The shards depend on the input and "
        "the options but --processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    make.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT",
        help=f"files in the order of their tokens: {', '.join(SUFFIXES)}; a .txt is one document, "
        "a .bin holds GPT-2 tokens, which are decoded",
    )  # fmt: skip
    make.add_argument(
        "--output", type=Path, required=True, metavar="DIR", default=argparse.SUPPRESS,
        help="folder of the shards, without other ones",
    )  # fmt: skip
    make.add_argument(
        "--tokenizer", choices=get_args(TokenizerName), default="gpt2", help="what tokens are"
    )
    make.add_argument("--processes", type=int, default=1, metavar="N", help="processes that encode")
    make.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens of a training shard",
    )
    held_out = make.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-tokens", type=int, metavar="N", default=argparse.SUPPRESS,
        help=f"hold the first N tokens out (default: a tenth, at most {VAL_TOKENS})",
    )  # fmt: skip
    held_out.add_argument(
        "--val-documents", type=int, metavar="N", default=argparse.SUPPRESS,
        help="hold the first N documents out instead",
    )  # fmt: skip
    make.add_argument(
        "--column", default="text", metavar="NAME",
        help="field of JSON lines, or column of parquet files, with the text",
    )  # fmt: skip
    return result


def run(command: str, output: Path, **options: Any) -> None:
    """Carry a command out and tell what is there then."""
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
    """Run the command line; returns the exit status."""
    try:
        run(**vars(parser().parse_args(args)))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        plain = isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError))
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text if plain else f'{type(error).__name__}: {text}'}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else RUN_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

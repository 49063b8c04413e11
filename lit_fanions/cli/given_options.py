"""What the user gave: the options of a command line and of the recipes that it names."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Given:
    """An option that the user gave.

    Args:
        name: Dotted name.
        place: Where it stands, for messages.
        value: Its value.
    """

    name: str
    place: str
    value: Any

    def is_named(self, word: str) -> bool:
        """Return True if `word` is the name of this option or the end of it."""
        return self.name == word or self.name.endswith(f".{word}")


def config_files(args: Sequence[str]) -> list[str]:
    """Return the configuration files named in a command line."""
    files = [b for a, b in itertools.pairwise(args) if a in ("-c", "--config")]
    return files + [a.partition("=")[2] for a in args if a.startswith("--config=")]


def given_options(args: Sequence[str]) -> Iterator[Given]:
    """Yield the options of a command line and of the recipes it names."""
    for arg, following in itertools.zip_longest(args, args[1:]):
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            yield Given(name.removeprefix("--"), name, value if equals else following)
    for file in reversed(config_files(args)):
        for path, value in _dotted_paths(read_yaml(file)):
            yield Given(path, f"{path} in {file}", value)


def read_yaml(file: str) -> object:
    """Return the contents of a YAML file, None if unreadable, the exception if not YAML."""
    try:
        return yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError):
        return None
    except yaml.YAMLError as error:
        return error


def _dotted_paths(tree: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every key of a nested mapping."""
    if isinstance(tree, list):
        for item in tree:
            yield from _dotted_paths(item, prefix)
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}", value
            yield from _dotted_paths(value, f"{prefix}{key}.")

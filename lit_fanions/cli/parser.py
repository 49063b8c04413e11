"""How the command line and recipes are read: jsonargparse, with what it lacks."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import DefaultHelpFormatter, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from lit_fanions.checks import did_you_mean
from lit_fanions.cli import errors, failures
from lit_fanions.cli.messages import PROGRAM

USAGE_ERROR = 2

_OVERRIDE = re.compile(r"^(?P<name>--[\w.]+\.overrides\.\w+)\.(?P<keys>[\w.]+)(?:=(?P<value>.+))?$")
_CALLBACK = re.compile(
    r"^--trainer\.callbacks\.(?P<name>[A-Z]\w*)\.(?P<keys>[\w.]+)(?:=(?P<value>.+))?$"
)

_load_yaml = get_loader("yaml")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the line breaks of descriptions and examples kept."""


class Parser(LightningArgumentParser):
    """Reports a mistake in at most three lines and accepts no abbreviations."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)
        self.command_line: Sequence[str] = ()  # as the user gave it, to find options in

    def option_names(self) -> list[str]:
        """Return the dotted names of all options, those of subcommands included."""
        subcommands = getattr(self._subcommands_action, "choices", None) or {}
        nested = [name for parser in subcommands.values() for name in parser.option_names()]
        return [action.dest for action in self._actions if action.option_strings] + nested

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check the values; the complaint about an unknown key brings the known ones."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            if not hasattr(error, "option_names"):  # those of the innermost parser
                error.option_names = self.option_names()  # type: ignore[attr-defined]
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake and exit with status 2; nested parsers pass it on."""
        if not self.exit_on_error:
            try:
                super().error(message, ex)
            except Exception as error:
                if ex is None:
                    error.option_names = self.option_names()  # type: ignore[attr-defined]
                raise
        cause = failures.unwrap(ex) if ex else None
        if cause and failures.user_place(cause):  # the import of a user's module failed
            raise cause
        failures.print_traceback()
        self.fail(errors.explain(message, ex, self.command_line, self.option_names()))

    def fail(self, line: str) -> NoReturn:
        """Print `line` as an error and exit with status 2."""
        command = " ".join([PROGRAM, *filter(None, [getattr(self, "subcommand", None)])])
        print(f"error: {line}", file=sys.stderr)
        print(f"  usage: {command} --config FILE [--OPTION VALUE ...]", file=sys.stderr)
        print(f"  all options: {command} --help", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def load_without_empty_sections(text: str) -> Any:
    """Load YAML; a key with nothing behind it, such as a section of comments, is left out.

    An explicit ``null`` stays: it is a value of some options.
    """
    value = _load_yaml(text)
    if value == text and text.endswith(":\n"):  # jsonargparse takes a lone `key:` for a string
        return {}
    if isinstance(value, (dict, list)):
        _drop_empty(value, yaml.compose(text, Loader=yaml.SafeLoader))
    return value


def _drop_empty(value: Any, node: Any) -> bool:
    """Remove from `value` what `node` shows to be empty; return True if that was all of it."""
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        for key, child in node.value:
            if key.value in value and _drop_empty(value[key.value], child):
                del value[key.value]
        return bool(node.value) and not value
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        for item, child in zip(value, node.value, strict=False):
            _drop_empty(item, child)
    return value is None and isinstance(node, yaml.ScalarNode) and not node.value


set_loader("yaml", load_without_empty_sections, (yaml.YAMLError,))


def nest_overrides(args: Sequence[str]) -> list[str]:
    """Rewrite `--A.overrides.NAME.KEY VALUE` as `--A.overrides.NAME {KEY: VALUE}`.

    jsonargparse reaches into a mapping no deeper than to its values.
    """
    nested, remaining = [], iter(args)
    for arg in remaining:
        match = _OVERRIDE.match(arg)
        value = match and (match["value"] or next(remaining, None))
        if match is None or value is None:
            nested.append(arg)
            continue
        for key in reversed(match["keys"].split(".")):
            value = f"{{{key}: {value}}}"
        nested += [match["name"], value]
    return nested


def split_callback_options(args: Sequence[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Split `--trainer.callbacks.CLASS.OPTION VALUE` off the other arguments.

    Returns:
        The other arguments, and (class name, option, value) for each of these.
    """
    others, named, remaining = [], [], iter(args)
    for arg in remaining:
        match = _CALLBACK.match(arg)
        value = match and (match["value"] or next(remaining, None))
        if match is None or value is None:
            others.append(arg)
        else:
            named.append((match["name"], match["keys"], value))
    return others, named


def with_callback_options(
    callbacks: Any, options: Sequence[tuple[str, str, str]]
) -> list[dict[str, Any]]:
    """Return the configured callbacks with some options of theirs replaced.

    Args:
        callbacks: One callback or several, in the plain form of recipes.
        options: Class name, dotted option and value, as given on the command line.

    Raises:
        ValueError: If no callback of that class is configured.
    """
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    for name, option, value in options:
        matching = [own for own in listed if own["class_path"].rpartition(".")[2] == name]
        if not matching:
            known = [own["class_path"].rpartition(".")[2] for own in listed]
            raise ValueError(
                f"--trainer.callbacks.{name}.{option}: the recipe has no {name}"
                f"{did_you_mean(name, known)} (it has {', '.join(known) or 'no callbacks'})"
            )
        for own in matching:
            *sections, last = option.split(".")
            node = own.setdefault("init_args", {})
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = _load_yaml(value)
    return listed

"""How the command line and recipes are read, and what `--help` says beside the options."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from lit_fanions.checks import did_you_mean
from lit_fanions.cli import errors, failures, messages

USAGE_ERROR = 2

SECTIONS = {
    "trainer": "trainer: how to run, the options of Lightning's Trainer",
    "model": "model: what to train, any LightningModule",
    "data": "data: what to train on, any LightningDataModule",
}

_NAMED = r"\.(?P<name>%s)\.(?P<keys>[\w.]+)(?:=(?P<value>.+))?$"
_OVERRIDE = re.compile(r"^(?P<section>--[\w.]+\.overrides)" + _NAMED % r"\w+")
_CALLBACK = re.compile(r"^--trainer\.callbacks" + _NAMED % r"[A-Z]\w*")

# Numbers that Lightning accepts, and later fails at without naming the option.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "seed_everything": (lambda seed: 0 <= seed < 2**32, "between 0 and 4294967295"),
    "trainer.accumulate_grad_batches": (lambda count: count >= 1, "at least 1"),
    "trainer.check_val_every_n_epoch": (lambda count: count >= 1, "at least 1"),
    "trainer.val_check_interval": (lambda interval: interval > 0, "above 0"),
}

_load_yaml = get_loader("yaml")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the line breaks of descriptions and examples kept."""


def parser_options() -> dict[str, Any]:
    """Return what the parsers of the program and of its subcommands say in their help."""
    usage = "%(prog)s --config FILE [--config FILE ...] [--OPTION VALUE ...]"
    own = {
        name: {"description": text, "usage": usage, "epilog": messages.EXAMPLES}
        for name, text in messages.SUBCOMMANDS.items()
    }
    return {
        "prog": messages.PROGRAM,
        "description": f"{messages.DESCRIPTION} Beside the subcommands below there are "
        f"{', '.join(messages.OTHER_COMMANDS)}.",
        "epilog": messages.EXAMPLES,
        "version": messages.format_versions(),
        "formatter_class": HelpFormatter,
        **own,
    }


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
        namespace = args[0] if args else kwargs["namespace"]
        for action in self._actions:
            value = namespace.get(action.dest) if hasattr(action, "basetype") else None
            if isinstance(value, (int, float, list)):  # jsonargparse would ignore it
                raise TypeError(
                    f'Parser key "{action.dest}": a section of options or a file with one is '
                    f"expected, got {value!r}"
                )
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
        command = " ".join([messages.PROGRAM, *filter(None, [getattr(self, "subcommand", None)])])
        print(f"error: {line}", file=sys.stderr)
        print(f"  usage: {command} --config FILE [--OPTION VALUE ...]", file=sys.stderr)
        print(f"  all options: {command} --help", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def check_texts(parser: Parser, files: Sequence[str]) -> None:
    """Refuse recipes that are empty or in another encoding; the parser finds missing ones."""
    for file in filter(os.path.isfile, files):
        try:
            if not Path(file).read_text(encoding="utf-8"):
                parser.fail(f"{file} is empty")
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}"
            parser.fail(f"{file} is not UTF-8 text ({reason}): save it as UTF-8")


def check_numbers(parser: Parser, config: Namespace) -> None:
    """Refuse numbers of the options of a subcommand that would fail in the middle of Lightning."""
    for name, (is_allowed, allowed) in _NUMBERS.items():
        value = config.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not is_allowed(value):
            parser.fail(f"{name} must be {allowed}, got {value}")


def load_without_empty_sections(text: str) -> Any:
    """Load YAML; a key with nothing behind it, such as a section of comments, is left out.

    An explicit ``null`` stays: it is a value of some options.
    """
    value = _load_yaml(text)
    nodes = errors.compose_yaml(text)
    # jsonargparse takes comments alone, and a lone `key:`, for a string.
    is_plain = value in (None, text) and text.endswith("\n")
    if is_plain and (nodes is None or text.endswith(":\n")):
        return {}
    if isinstance(value, (dict, list)):
        _drop_empty(value, nodes)
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


def _split(args: Sequence[str], pattern: re.Pattern[str]) -> list[str | tuple[re.Match, str]]:
    """Return the arguments, with (match, value) for each option that has a form of its own."""
    found: list[str | tuple[re.Match, str]] = []
    remaining = iter(args)
    for arg in remaining:
        match = pattern.match(arg)
        value = match and (match["value"] or next(remaining, None))
        found.append(arg if match is None or value is None else (match, value))
    return found


def nest_overrides(args: Sequence[str]) -> list[str]:
    """Rewrite `--A.overrides.NAME.KEY VALUE` as `--A.overrides.NAME {KEY: VALUE}`.

    jsonargparse reaches into a mapping no deeper than to its values.
    """
    nested: list[str] = []
    for part in _split(args, _OVERRIDE):
        if isinstance(part, str):
            nested.append(part)
            continue
        match, value = part
        for key in reversed(match["keys"].split(".")):
            value = f"{{{key}: {value}}}"
        nested += [f"{match['section']}.{match['name']}", value]
    return nested


def list_callback_options(parser: LightningArgumentParser, args: Sequence[str]) -> list[str]:
    """Rewrite `--trainer.callbacks.CLASS.OPTION VALUE` as the whole list of callbacks.

    The parser reads the recipe's own list; a class that is not in it is refused.
    """
    parts = _split(args, _CALLBACK)
    named = [part for part in parts if not isinstance(part, str)]
    others = [part for part in parts if isinstance(part, str)]
    if not named:
        return others
    config = parser.parse_args([arg for arg in others if not arg.startswith("--print_config")])
    plain = yaml.safe_load(parser.dump(config, skip_none=False, format="yaml"))
    listed = plain[config.subcommand]["trainer"]["callbacks"] or []
    listed = listed if isinstance(listed, list) else [listed]
    known = [own["class_path"].rpartition(".")[2] for own in listed]
    for match, value in named:
        name, option = match["name"], match["keys"]
        if name not in known:
            subcommands: Any = parser._subcommands_action
            subcommands.choices[config.subcommand].fail(
                f"--trainer.callbacks.{name}.{option}: the recipe has no {name}"
                f"{did_you_mean(name, known)} (it has {', '.join(known) or 'no callbacks'})"
            )
        *sections, last = option.split(".")
        for callback in (each for each, own in zip(listed, known, strict=True) if own == name):
            node = callback.setdefault("init_args", {})
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = _load_yaml(value)
    return [*others, "--trainer.callbacks", json.dumps(listed)]

"""Short error messages for the command line.

jsonargparse reports a mistake with the whole history of what it tried. The functions here keep
the part a user needs: which key, in which file, what was given, what is allowed. They only read
text and never raise, so that an unknown wording falls back to the message itself.
"""

import difflib
import itertools
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

MAX_LINE = 240

# What other projects call the same.
_SYNONYMS = {
    "learning_rate": "lr",
    "betas": "momentum",
    "beta1": "momentum",
    "wd": "weight_decay",
    "ns_steps": "polar_steps",
    "adjust_lr_fn": "scale",
}

_UNKNOWN_OPTION = re.compile(
    r"^(?:Option '(?P<option>[^']+)' is not accepted"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<member>[^']+)'"
    r"|Subcommand '[^']+' does not accept option '(?P<sub>[^']+)'"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+))"
)
_HINT = re.compile(r"\n(did you mean|allowed here:) ([^?]+)\??$")
_BEFORE_SUBCOMMAND = re.compile(r"^Option '([^']+)' is not accepted before subcommand")
_INVALID_CHOICE = re.compile(r"argument subcommand: invalid choice: '([^']+)' \(choose from (.+)\)")
_KEY = re.compile(r'^Parser key "([^"]+)":\s*')
_CLASS = re.compile(r"^( *)(?:- )?Problem with given class_path '([^']+)':\n", re.MULTILINE)
_NO_IMPORT_PATH = re.compile(r"Expected a dot import path string: (\S+)")
_WRONG_CLASS = re.compile(r"Import path does not correspond to a subclass of (\w+)")
_NO_CLASS = re.compile(r"Not a valid subclass of (\w+)")
_EXPECTED = re.compile(r"^Expected an? (.+?)\. Got value: (.*)$", re.DOTALL)
_UNION = re.compile(r"Subtypes: \[(.+?)\]\s*\n.*Given value: (.*)$", re.DOTALL)
_NO_FILE = re.compile(r"File does not exist: '?([^'\n]+)")


def one_line(text: object, limit: int = MAX_LINE) -> str:
    """Return `text` with all white space collapsed, cut to `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def unknown_option(message: str) -> str | None:
    """Return the dotted name of the option that `message` calls unknown, if it is about one."""
    if not (match := _UNKNOWN_OPTION.match(message)):
        return None
    found = match.groupdict()
    if found["group"]:
        return f"{found['group']}.{found['member']}"
    return found["option"] or found["sub"] or found["argument"]


def did_you_mean(given: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that `given` most likely stands for.

    A dotted name is compared as a whole, then by its last part (the same name in another
    section), then by its first part (a mistyped section).
    """
    names = [n for n in dict.fromkeys(known) if n != given and not n.endswith(".help")]
    prefix, dot, leaf = given.rpartition(".")
    if (synonym := f"{prefix}{dot}{_SYNONYMS.get(leaf)}") in names:
        return synonym
    if close := difflib.get_close_matches(given, names, n=1, cutoff=0.75):
        return close[0]
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    if close := difflib.get_close_matches(given.rpartition(".")[2], leaves, n=1, cutoff=0.8):
        return leaves[close[0]]
    root, dot, rest = given.partition(".")
    roots = {name.partition(".")[0] for name in names}
    if dot and root not in roots and (close := difflib.get_close_matches(root, roots, n=1)):
        return f"{close[0]}.{rest}"
    return None


def add_hint(message: str, names: Sequence[str]) -> str:
    """Append the closest of a parser's option `names` to its complaint about an unknown one."""
    option = unknown_option(message)
    if option is None or "\n" in message:
        return message
    if guess := did_you_mean(option, names):
        return f"{message}\ndid you mean {guess}?"
    prefix = option.rpartition(".")[0]
    siblings = [n for n in names if n.rpartition(".")[0] == prefix and n != "help"]
    return f"{message}\nallowed here: {', '.join(siblings)}" if 0 < len(siblings) <= 30 else message


def config_files(args: Sequence[str]) -> list[str]:
    """Return the configuration files named in a command line."""
    files = [b for a, b in itertools.pairwise(args) if a in ("-c", "--config")]
    return files + [a.partition("=")[2] for a in args if a.startswith("--config=")]


def locate(key: str, args: Sequence[str]) -> str:
    """Say where in `args`, or in a configuration file named there, the option `key` was given.

    The parsers of nested classes know only the end of a dotted name; this finds the rest.
    """
    for arg in args:
        name = arg.removeprefix("--").partition("=")[0]
        if arg.startswith("--") and (name == key or name.endswith(f".{key}")):
            return f"--{name}"
    for file in reversed(config_files(args)):
        for path in _dotted_paths(_read_yaml(file)):
            if path == key or path.endswith(f".{key}"):
                return f"{path} in {file}"
    return key


def explain(message: str, args: Sequence[str] = ()) -> list[str]:
    """Turn a parser's error into one or two lines: the mistake, and what helps.

    Args:
        message: What jsonargparse says, possibly ending in the line of `add_hint`.
        args: The command line, for the place of the mistake.
    """
    if match := _BEFORE_SUBCOMMAND.match(message):
        name = match[1].partition(".")[0]
        return [f"{name!r} is given before the subcommand", "write: SUBCOMMAND --config FILE"]
    if option := unknown_option(message):
        return _explain_option(option, message, args)
    if match := _INVALID_CHOICE.search(message):
        names = [*re.findall(r"[\w-]+", match[2]), "report"]
        return [f"unknown subcommand {match[1]!r}", _choices(match[1], names)]
    if 'expected "subcommand"' in message:
        names = re.findall(r"\{(.+?)\}", message)[0].split(",")
        return ["no subcommand given", f"allowed: {', '.join(names)}"]
    if message.startswith("the following arguments are required"):
        missing = re.findall(r"\w+\.(\w+)", message.partition(":")[2]) or [message]
        return [f"{' and '.join(missing)} not configured", "give a recipe: --config FILE"]
    if message.startswith("Problems parsing config"):
        bad = next((f for f in config_files(args) if _read_yaml(f) is None), "configuration")
        reason = message.partition(":")[2]
        reason = re.sub(r'in "<[\w ]+>", (line \d+), column \d+', r"(\1)", reason)
        return [one_line(f"{bad} is not valid YAML: {reason}")]
    if key := _KEY.match(message):
        return _explain_value(key[1], message[key.end() :], args)
    return [one_line(message)]


def _explain_option(option: str, message: str, args: Sequence[str]) -> list[str]:
    """Explain that there is no such option."""
    where = locate(option, args)
    lines = [f"unknown option {where}"]
    if hint := _HINT.search(message):
        # A nested parser does not know its own prefix; the place of the mistake shows it.
        is_guess = hint[1] == "did you mean"
        text = f"{where.partition(option)[0]}{hint[2]}?" if is_guess else hint[2]
        lines.append(one_line(f"{hint[1]} {text}"))
    return lines


def _explain_value(key: str, problem: str, args: Sequence[str]) -> list[str]:
    """Explain why the value given for `key` is not accepted."""
    where = locate(key, args)
    if match := _NO_FILE.search(problem):
        return _missing_file(where, match[1])
    if match := _CLASS.search(problem):
        inner = _indented_block(problem[match.end() :], deeper_than=len(match[1]))
        if _CLASS.match(inner):
            return _explain_value(key, inner, args)
        if unknown_option(inner) or _KEY.match(inner):
            return explain(inner, args)
        return _failed_import(where, match[2], inner)
    if match := _NO_IMPORT_PATH.search(problem):
        return [f"{where}: {match[1]!r} is not the path of a class", "write it as module.Class"]
    if match := _WRONG_CLASS.search(problem):
        return [f"{where}: the class given is no {match[1]}"]
    if match := _NO_CLASS.search(problem):
        return [
            f"{where}: this does not describe a {match[1]}",
            "write it as class_path: module.Class and init_args: {name: value, …}, nothing else",
        ]
    if match := _UNION.search(problem) or _EXPECTED.search(problem):
        allowed, given = _readable_types(match[1]), match[2].strip()
        wanted = " or ".join(allowed) if len(allowed) < 4 else f"one of {', '.join(allowed)}"
        line = f"{where}: expected {wanted}, got {one_line(given, 60)!r}"
        choices = [name for name in allowed if name not in ("int", "float", "bool", "str", "null")]
        close = difflib.get_close_matches(given.lower().replace("-", "_"), choices, n=1)
        return [line, f"did you mean {close[0]}?"] if close else [line]
    return [one_line(f"{where}: {problem}")]


def _indented_block(text: str, deeper_than: int) -> str:
    """Return the first lines of `text` that are indented by more than `deeper_than`."""
    lines = text.splitlines()
    inside = itertools.takewhile(lambda a: len(a) - len(a.lstrip()) > deeper_than, lines)
    return textwrap.dedent("\n".join(inside)).strip()


def _failed_import(where: str, class_path: str, reason: str) -> list[str]:
    """Report a class that cannot be found, with the name of a similar one."""
    module, _, name = class_path.rpartition(".")
    known = [n for n, v in vars(sys.modules.get(module, types)).items() if isinstance(v, type)]
    lines = [one_line(f"{where}: cannot import {class_path!r}: {reason}")]
    if module in sys.modules and (guess := did_you_mean(name, known)):
        lines.append(f"did you mean {module}.{guess}?")
    elif reason.startswith("No module named"):
        lines.append("classes come from installed packages and from the working directory")
    return lines


def _missing_file(where: str, path: str) -> list[str]:
    """Report a missing file, with the name of a similar one beside it."""
    file = Path(path)
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    lines = [f"{where}: file does not exist: {shown}"]
    beside = [str(f.name) for f in file.parent.iterdir()] if file.parent.is_dir() else []
    if guess := did_you_mean(file.name, beside):
        lines.append(f"did you mean {shown.parent / guess}?")
    return lines


def _choices(given: str, names: list[str]) -> str:
    """Return the likely choice, or else all of them."""
    close = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(names)}"


def _readable_types(text: str) -> list[str]:
    """Turn Python's notation of types into words: `<class 'int'>` into int, literals as such."""
    text = re.sub(r"typing\.Literal\[(.+?)\]", lambda m: m[1], text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    text = text.replace("NoneType", "null").replace("typing.", "").replace("'", "")
    return list(dict.fromkeys(part.strip() for part in re.split(r",(?![^\[]*\])", text)))


def _read_yaml(file: str) -> object:
    """Return the contents of a YAML file, or None where it cannot be read."""
    try:
        return yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _dotted_paths(tree: object, prefix: str = "") -> Iterable[str]:
    """Yield the dotted path of every key of a nested mapping."""
    if isinstance(tree, list):
        for item in tree:
            yield from _dotted_paths(item, prefix)
    if isinstance(tree, dict):
        for key, value in tree.items():
            path = f"{prefix}{key}"
            yield path
            yield from _dotted_paths(value, f"{path}.")

"""Short messages for mistakes in the command line or in a recipe.

jsonargparse reports a mistake with the history of everything it tried. The functions here show its
innermost message, where the option stands, and the likely name. They read the chain of exceptions
and the names in quotes but hardly any wording, so that another wording costs a hint at most.
"""

import difflib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from lit_fanions.checks import did_you_mean
from lit_fanions.optim.groups import OTHER_NAMES

MAX_LINE = 240

_MERGE = "tag:yaml.org,2002:merge"  # of the key <<, which may come several times


def one_line(text: object, limit: int = MAX_LINE) -> str:
    """Return `text` with all white space collapsed, cut to `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def explain(
    message: str,
    error: BaseException | None = None,
    args: Sequence[str] = (),
    names: Iterable[str] = (),
) -> str:
    """Return one line about a mistake: where it is, what is wrong, and the likely name.

    The option is looked up in the command line ``args``; ``names`` are those of all options, which
    an exception of a nested parser brings as its `option_names`.
    """
    for file in config_files(args):
        if isinstance(reason := _read_yaml(file), yaml.YAMLError):
            return one_line(f"{file} is not valid YAML: {reason}")
    errors = [error] if error else []
    while errors and (cause := errors[-1].__cause__):
        errors.append(cause)
    texts = [_simplify(text) for text in (message, *map(str, errors))]
    texts[-1] = _with_all_types(texts)
    given = list(_given_options(args))
    option = _find(texts, given)
    for nested in errors:
        names = getattr(nested, "option_names", names)
    odd = "" if option else next(filter(_is_no_mapping, config_files(args)), "")
    place = f"{option.place if option else odd}: " if option or odd else ""
    hint = _hint(errors[-1] if errors else None, texts[-1], option, args, list(names))
    return f"{place}{one_line(texts[-1].rstrip('.'))}{hint}"


def similar_file(path: str) -> str:
    """Return "; did you mean 'x'?" for a file beside the missing one, or ''."""
    folder = Path(path).parent
    beside = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(Path(path).name, beside)


def config_files(args: Sequence[str]) -> list[str]:
    """Return the configuration files named in a command line."""
    files = [b for a, b in itertools.pairwise(args) if a in ("-c", "--config")]
    return files + [a.partition("=")[2] for a in args if a.startswith("--config=")]


@dataclass(frozen=True)
class _Given:
    """An option that the user gave: its dotted name, where it stands, and its value."""

    name: str
    place: str
    value: Any

    def is_named(self, word: str) -> bool:
        """Return True if `word` is the name of this option or the end of it."""
        return self.name == word or self.name.endswith(f".{word}")


def _given_options(args: Sequence[str]) -> Iterator[_Given]:
    """Yield the options of a command line and of the recipes it names."""
    for arg, following in itertools.zip_longest(args, args[1:]):
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            yield _Given(name.removeprefix("--"), name, value if equals else following)
    for file in reversed(config_files(args)):
        for path, value in _dotted_paths(_read_yaml(file)):
            yield _Given(path, f"{path} in {file}", value)


def compose_yaml(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text; PyYAML alone would keep the last of two equal keys.

    Raises:
        yaml.YAMLError: If it is not YAML, or a mapping has a key twice.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes, visited = [root] if root else [], set[int]()  # anchors make a node reachable twice
    while nodes:
        node = nodes.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        known = set[tuple[str, str]]()  # types and texts: 1 is not "1"
        for key, value in node.value:
            nodes += key, value
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in known:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                known.add((key.tag, key.value))
    return root


def _is_no_mapping(file: str) -> bool:
    """Return True for a file whose contents are no mapping of names."""
    tree = _read_yaml(file)
    is_mapping = isinstance(tree, dict) and all(isinstance(key, str) for key in tree)
    return tree is not None and not is_mapping


def _read_yaml(file: str) -> object:
    """Return the contents of a YAML file, None if unreadable, the exception if not YAML."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        compose_yaml(text)
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError):
        return None
    except yaml.YAMLError as error:
        return error


def _dotted_paths(tree: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every key, the sections' own keys included."""
    if isinstance(tree, list):
        for item in tree:
            yield from _dotted_paths(item, prefix)
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}", value
            yield from _dotted_paths(value, f"{prefix}{key}.")


def _hint(
    error: BaseException | None,
    text: str,
    option: _Given | None,
    args: Sequence[str],
    names: list[str],
) -> str:
    """Return the likely name for what the innermost message complains about, or ''."""
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        classes = [name for name, value in vars(error.obj).items() if isinstance(value, type)]
        return did_you_mean(error.name, classes)
    if isinstance(error, ModuleNotFoundError):
        return "; classes come from installed packages and from the working directory"
    if _is_of_pytorch_lightning(text):
        return (
            "; it is written with pytorch_lightning, and this command line runs lightning.pytorch: "
            "import that instead, or call lit_fanions.configure_optimizers in a script of your own"
        )
    words = _quoted(text)
    for word in words:
        if option and option.is_named(word) and word not in names:
            hint = _suggest_option(word, names)
            if not option.place.startswith("--"):
                return hint
            # A nested parser leaves out the names of the sections above it.
            return hint.replace("'", f"'{option.name.removesuffix(word)}", 1)
        if os.path.isabs(word) and not os.path.exists(word):
            return similar_file(word)
    value = str(option.value) if option else next((arg for arg in args if arg in words), "")
    return did_you_mean(value.lower().replace("-", "_"), [word for word in words if word != value])


def _suggest_option(given: str, names: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the dotted name of an unknown option, or ''."""
    names = [name for name in names if not name.endswith(".help")]
    prefix, dot, leaf = given.rpartition(".")
    synonym = f"{prefix}{dot}{OTHER_NAMES.get(leaf, '').partition(' ')[0]}"
    if synonym in names:
        return did_you_mean(synonym, [synonym])
    sections = {name.partition(".")[0] for name in names}
    # Without sections it is given inside of one, and may stand in several of the names.
    known = names if dot else sections | {name.rpartition(".")[2] for name in names}
    segments = {segment for name in names for segment in name.split(".")}
    unknown = next((part for part in given.split(".")[:-1] if part not in segments), "")
    if close := difflib.get_close_matches(unknown, segments, 1):
        corrected = given.replace(unknown, close[0], 1)
        full = [name for name in names if f".{name}".endswith(f".{corrected}")]
        return did_you_mean(*(full[0], full) if full else (close[0], close))
    return did_you_mean(given, known) or did_you_mean(given.partition(".")[0], sections)


def _find(texts: Sequence[str], given: Sequence[_Given]) -> _Given | None:
    """Return the option that the innermost message that names one is about."""
    for text in reversed(texts):
        words = _quoted(text)
        named = [option for option in given if any(map(option.is_named, words))]
        members = [".".join(pair) for pair in itertools.pairwise(words)]

        def rank(own: _Given, members: Sequence[str] = members) -> tuple[bool, bool, bool, int]:
            # A member of the section that the message names comes first, then the option with the
            # value that it complains about. The command line wins over recipes, and a member over
            # its section.
            has_value = texts[-1].rstrip(".").endswith(f"got {own.value}")
            is_member = any(map(own.is_named, members))
            return is_member, has_value, own.place.startswith("-"), own.name.count(".")

        if named:
            return max(named, key=rank)
    return None


def _quoted(text: str) -> list[str]:
    """Return the words in quotes and the option names of a message."""
    return [a or b for a, b in re.findall(r"""['"`]([^'"`\s]+)['"`]|--([\w.]+)""", text)]


def _simplify(text: str) -> str:
    """Write types as in YAML, and leave out the contents of mappings."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[([^]]*)\]", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"^Expected an? (.*)\. Got value: ", r"expected \1, got ", text)
    return re.sub(r"""\{['"].*\}""", "{…}", text, flags=re.DOTALL)


def _with_all_types(texts: Sequence[str]) -> str:
    """Return the innermost message; it names one type of a union, the one around it knows all."""
    *_, outer, inner = ["", *texts]
    union = re.search(r"Union subtypes\n\s*Subtypes: \[(.*)\]", outer)
    got = re.match(r"expected .*?(, got .*)", inner, flags=re.DOTALL)
    if not union or not got:
        return inner
    types = " or ".join(union[1].rsplit(", ", 1))
    return f"expected {types}{got[1]}"


def _is_of_pytorch_lightning(text: str) -> bool:
    """Return True if a class named in a message is built on the other name of Lightning."""
    for path in re.findall(r"[\w.]+\.\w+", text):
        module, _, name = path.rpartition(".")
        bases = getattr(getattr(sys.modules.get(module), name, None), "__mro__", ())
        if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in bases):
            return True
    return False

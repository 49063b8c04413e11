"""`python -m lit_fanions list`: what there is to choose from, with a line each.

Nothing is imported to find it: modules and recipes are read as text, those of the package and
those of the working directory (the checkout, or a project of the same form).
"""

import argparse
import ast
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lit_fanions.checks import did_you_mean
from lit_fanions.cli.errors import one_line

Line = tuple[str, str]  # name, description

_WIDTH = 100
_CALLBACKS = Path(__file__).parents[1] / "callbacks"


def main(args: Sequence[str]) -> int:
    """Print the catalogue.

    Args:
        args: What to list; nothing for everything.

    Returns:
        The exit status.
    """
    from lit_fanions.lmo import PolarMethod
    from lit_fanions.optim.algorithms import Algorithm

    sections: dict[str, tuple[str, Callable[[], Iterator[Line]]]] = {
        "models": ("--model CLASS", lambda: _exported_classes(Path("models"))),
        "data": ("--data CLASS", lambda: _exported_classes(Path("datamodules"))),
        "recipes": ("--config FILE", lambda: _recipes(Path("configs"))),
        "algorithms": ("--model.optimizer.matrix.algorithm NAME", lambda: _choices(Algorithm)),
        "presets": ("--model.optimizer.matrix.polar NAME", lambda: _choices(PolarMethod)),
        "callbacks": (
            "--trainer.callbacks+ CLASS",
            lambda: _exported_classes(_CALLBACKS),
        ),
    }
    command = argparse.ArgumentParser(
        prog="python -m lit_fanions list", description="Print what there is to choose from."
    )
    command.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(sections))
    kinds = command.parse_args(list(args)).kinds or list(sections)
    for kind in kinds:
        if kind not in sections:
            hint = did_you_mean(kind, sections)
            command.error(f"{kind!r} is none of {', '.join(sections)}{hint}")
        option, find = sections[kind]
        print(f"{kind} ({option})")
        lines = sorted(find())
        width = max((len(name) for name, _ in lines), default=0)
        for name, text in lines:
            print(f"  {name:{width}}  {text}".rstrip())
        if not lines:
            print("  none in this working directory")
    return 0


def _choices(literal: object) -> Iterator[Line]:
    """Yield the names that a Literal allows."""
    for name in typing.get_args(literal):
        yield name, ""


def _exported_classes(package: Path) -> Iterator[Line]:
    """Yield the classes that a package exports, with the first line of their docstrings."""
    prefix = "lit_fanions." if package == _CALLBACKS else ""
    face = _parse(package / "__init__.py")
    for node in face.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = _parse(package / f"{node.module.rpartition('.')[2]}.py")
            names = {alias.name for alias in node.names}
            for cls in module.body:
                # A decorated class is a dataclass of options, not something to train.
                if isinstance(cls, ast.ClassDef) and cls.name in names and not cls.decorator_list:
                    text = (ast.get_docstring(cls) or "").partition("\n")[0]
                    yield f"{prefix}{package.name}.{cls.name}", text


def _recipes(folder: Path) -> Iterator[Line]:
    """Yield the YAML files below a folder, with the start of their first comment."""
    for path in folder.rglob("*.yaml"):
        comment = re.match(r"(?:#.*\n)*", path.read_text()).group()  # type: ignore[union-attr]
        text = " ".join(line.strip("# ") for line in comment.partition("\n#\n")[0].splitlines())
        yield str(path), one_line(text, _WIDTH)


def _parse(file: Path) -> ast.Module:
    """Return the syntax tree of a Python file, an empty one if there is no such file."""
    return ast.parse(file.read_text() if file.is_file() else "")

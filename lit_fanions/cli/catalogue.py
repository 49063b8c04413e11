"""`python -m lit_fanions list`: what there is to choose from, with a line each.

Nothing is imported to find models, data and callbacks: modules and recipes are read as text, those
of the package and those of the working directory (the checkout, or a project of the same form).
"""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lit_fanions.checks import check_choice
from lit_fanions.cli.console import CommandParser
from lit_fanions.cli.errors import one_line
from lit_fanions.cli.messages import print_warning
from lit_fanions.lmo.presets import SUMMARIES
from lit_fanions.optim.algorithms import ALGORITHMS, describe_step

Line = tuple[str, str]  # name, description

_WIDTH = 100
_CALLBACKS = Path(__file__).parents[1] / "callbacks"


def main(args: Sequence[str]) -> int:
    """Print the catalogue, or the kinds named in ``args``; return the exit status."""
    command = CommandParser("list", "Print what there is to choose from.")
    command.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(_SECTIONS))
    for kind in command.parse_args(list(args)).kinds or _SECTIONS:
        try:
            check_choice("kind", kind, _SECTIONS)
        except ValueError as error:
            command.error(str(error))
        option, find = _SECTIONS[kind]
        print(f"{kind} ({option})")
        lines = sorted(find())
        width = max((len(name) for name, _ in lines), default=0)
        for name, text in lines:
            print(f"  {name:{width}}  {text}".rstrip())
        if not lines:
            print("  none in this working directory")
    return 0


def _algorithms() -> Iterator[Line]:
    """Yield the algorithms, with the ball that each steps in, its direction and its rank."""
    for name, entry in ALGORITHMS.items():
        if entry.kind != "matrix":
            yield name, "for any parameters: torch's own step"
            continue
        ball, direction = describe_step({"algorithm": name, **entry.options})
        rank = entry.options["rank"]
        yield name, f"{ball}: {direction}" + (f", rank {rank}" if rank != "full" else "")


def _exported_classes(package: Path) -> Iterator[Line]:
    """Yield the classes that a package exports, with the first line of their docstrings."""
    prefix = "lit_fanions." if package == _CALLBACKS else ""
    for node in _parse(package / "__init__.py").body:
        # Callbacks and data are imported below `if TYPE_CHECKING`.
        for face in node.body if isinstance(node, ast.If) else [node]:
            if not isinstance(face, ast.ImportFrom) or not face.module:
                continue
            inside = face.module.rpartition(f"{package.name}.")[2].split(".")
            module = _parse(package.joinpath(*inside).with_suffix(".py"))
            names = {alias.name for alias in face.names}
            for cls in module.body:
                # A decorated class is a dataclass of options, not something to train.
                if isinstance(cls, ast.ClassDef) and cls.name in names and not cls.decorator_list:
                    text = (ast.get_docstring(cls) or "").partition("\n")[0]
                    yield f"{prefix}{package.name}.{cls.name}", text


def _recipes(folder: Path) -> Iterator[Line]:
    """Yield the YAML files below a folder, with the start of their first comment."""
    for path in filter(Path.is_file, folder.rglob("*.yaml")):
        content = path.read_text(encoding="utf-8", errors="replace")
        comment = re.match(r"(?:#.*\n)*", content).group()  # type: ignore[union-attr]
        text = " ".join(line.strip("# ") for line in comment.partition("\n#\n")[0].splitlines())
        yield str(path), one_line(text, _WIDTH)


def _parse(file: Path) -> ast.Module:
    """Return the syntax tree of a Python file, an empty one if there is none or it is not Python.

    A module that is being edited must not hide the others.
    """
    try:
        return ast.parse(file.read_bytes() if file.is_file() else "")
    except (SyntaxError, ValueError) as error:
        print_warning(f"{file} is left out, it is not valid Python: {error}")
        return ast.parse("")


_SECTIONS: dict[str, tuple[str, Callable[[], Iterator[Line]]]] = {
    "models": ("--model CLASS", lambda: _exported_classes(Path("models"))),
    "data": ("--data CLASS", lambda: _exported_classes(Path("datamodules"))),
    "recipes": ("--config FILE", lambda: _recipes(Path("configs"))),
    "algorithms": ("--model.optimizer.matrix.algorithm NAME", _algorithms),
    "presets": (
        "--model.optimizer.matrix.polar NAME",
        lambda: iter(SUMMARIES.items()),
    ),
    "callbacks": ("--trainer.callbacks+ CLASS", lambda: _exported_classes(_CALLBACKS)),
}

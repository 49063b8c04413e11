"""Copy definitions of this package, with all that they use of it, into the text of one file."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]


class Bundle:
    """Source of definitions and of what they use, in an order that runs.

    Args:
        parts: Name of a module with names that stand for others.
        aliases: These names, with the definitions of the module that are copied under them.
        constants: Names of the module, with the source of values to write instead of theirs.
    """

    def __init__(
        self, parts: str, aliases: Mapping[str, str], constants: Mapping[str, str]
    ) -> None:
        self._parts, self._aliases, self._constants = parts, aliases, constants
        self._sources: dict[ast.stmt, str] = {}
        self._origins: dict[str, str] = {}  # module of each name that is copied
        self._imports: dict[str, set[str]] = {}  # names by module; "" for the module itself

    def add(self, module: str, name: str) -> None:
        """Add a definition after those that it uses; refuse modules and ambiguous names."""
        source = _read(module)
        if module == self._parts:
            name = self._aliases.get(name, name)
        if name in source.imports:
            origin, imported = source.imports[name]
            if (origin, imported) == (module, name):
                raise ValueError(f"{module}.{name} is a module: import names from it")
            if origin.partition(".")[0] == _PACKAGE:
                self.add(origin, imported)
            else:
                self._imports.setdefault(origin, set()).add(imported)
            return
        if self._origins.setdefault(name, module) != module:
            raise ValueError(f"{name} is defined in {module} and in {self._origins[name]}")
        node = source.definitions[name]
        if node in self._sources:
            return
        if module == self._parts and name in self._constants:
            self._sources[node] = f"{source.comment(node)}{name} = {self._constants[name]}"
            return
        self._sources[node] = ""  # so that a definition that uses itself ends
        for used in _names(node):
            if used in source.definitions or used in source.imports:
                self.add(module, used)
        del self._sources[node]
        self._sources[node] = source.text(node)

    def text(self) -> str:
        """Return the text of the file."""
        lines = sorted(f"import {module}" for module, names in self._imports.items() if "" in names)
        for module, names in sorted(self._imports.items()):
            if named := ", ".join(sorted(names - {""})):
                lines.append(f"from {module} import {named}")
        standard = [line for line in lines if "torch" not in line]
        blocks = ["from __future__ import annotations", "\n".join(standard)]
        text = "\n\n".join([*blocks, "\n".join(line for line in lines if line not in standard)])
        was_constant = True
        for node, source in self._sources.items():
            is_constant = isinstance(node, (ast.Assign, ast.AnnAssign))
            text += ("\n\n" if is_constant and was_constant else "\n\n\n") + source
            was_constant = is_constant
        for alias, name in self._aliases.items():
            text = re.sub(rf"\b{name}\b", alias, text)
        return f"{text}\n"


class _Module:
    """The definitions and imports of a module, by name."""

    def __init__(self, name: str) -> None:
        file = importlib.import_module(name).__file__
        assert file is not None
        text = Path(file).read_text(encoding="utf-8")
        self._lines = text.splitlines()
        self.imports: dict[str, tuple[str, str]] = {}  # module and name there
        self.definitions: dict[str, ast.stmt] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {alias.asname or alias.name: alias.name for alias in node.names}
                self.imports |= {own: (node.module, there) for own, there in names.items()}
            elif isinstance(node, ast.Import):
                self.imports |= {alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.definitions |= {own: node for target in targets for own in _names(target)}

    def comment(self, node: ast.stmt) -> str:
        """Return the lines of the comment above a definition."""
        start = end = self._start(node)
        while start and self._lines[start - 1].startswith("#"):
            start -= 1
        return "".join(f"{line}\n" for line in self._lines[start:end])

    def text(self, node: ast.stmt) -> str:
        """Return a definition with its decorators and the comment above it."""
        return self.comment(node) + "\n".join(self._lines[self._start(node) : node.end_lineno])

    @staticmethod
    def _start(node: ast.stmt) -> int:
        """Return the index of the first line of a definition, or of its first decorator."""
        decorators = getattr(node, "decorator_list", [])
        return min([node.lineno, *(own.lineno for own in decorators)]) - 1


_read = functools.cache(_Module)


def _names(node: ast.AST) -> Iterator[str]:
    """Yield the names in a syntax tree, each once."""
    yield from dict.fromkeys(own.id for own in ast.walk(node) if isinstance(own, ast.Name))

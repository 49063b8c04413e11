"""`python -m lit_fanions export --algorithm f_muon --output FILE`: an optimizer in one file.

The file needs nothing but torch, and takes the steps that Fanion takes with the same options, up to
rounding where Fanion stacks matrices: it is made of the same functions. It has no Lightning, no
splits of fused layers, no error feedback and no other optimizer: give it matrices, and
torch.optim.AdamW the rest.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_fanions import Fanion, __version__
from lit_fanions.checks import check_choice
from lit_fanions.cli import export_parts
from lit_fanions.cli.console import CommandParser
from lit_fanions.cli.messages import PROGRAM
from lit_fanions.lmo import BALLS
from lit_fanions.lmo.presets import METHODS, check_polar, polynomials, rescales
from lit_fanions.optim.algorithms import ALGORITHMS, AlgorithmEntry
from lit_fanions.optim.options import argument_docs

_PACKAGE = __name__.partition(".")[0]
_PARTS = export_parts.__name__
_BASIC = ("lr", "momentum", "nesterov", "weight_decay", "scale")
_DIRECTIONS = {  # by ball and whether it is blended
    ("fanion", False): "polar_direction",
    ("fanion", True): "blended_polar_direction",
    ("frobenius", False): "normalised_direction",
    ("sign", False): "normalised_direction",
}
_METHODS = tuple(name for name in METHODS if name != "exact")


def exportable() -> list[str]:
    """Return the names of the algorithms that can be exported."""
    return [
        name
        for name, entry in ALGORITHMS.items()
        if entry.kind == "matrix"
        and (entry.ball, _is_blended(entry)) in _DIRECTIONS
        and "adapt" not in entry.options  # whose state the file does not have
    ]


def _is_blended(entry: AlgorithmEntry) -> bool:
    return entry.options["alpha"] != 1


def single_file(algorithm: str, polar: str = "auto", polar_steps: int | None = None) -> str:
    """Return the text of a Python file that defines one optimizer of ``exportable``."""
    check_choice("algorithm", algorithm, exportable())
    check_choice("polar method", polar, _METHODS)
    check_polar(polar, polar_steps)
    entry = ALGORITHMS[algorithm]
    has_rank = entry.ball == "fanion" and entry.options["rank"] != "full"
    partner = entry.options["blend"] if entry.ball == "fanion" else entry.ball
    name = _DIRECTIONS[entry.ball, _is_blended(entry)]
    aliases = {
        "direction": name.replace("polar", "rank_k") if has_rank else name,
        "partner": f"{partner}_partner",
        "prepare": "prepare_basis" if has_rank else "no_basis",
    }
    options = [*_BASIC, *(["alpha"] if _is_blended(entry) else [])]
    options += ["sign_scale"] if partner == "sign" else []
    options += ["rank", "oversampling", "seed"] if has_rank else []
    values = Fanion([torch.nn.Parameter(torch.ones(2, 2))], algorithm=algorithm).param_groups[0]
    constants = {
        "POLAR": polar,
        "POLYNOMIALS": polynomials(polar, polar_steps),
        "RESCALE": rescales(polar),
    }
    bundle = Bundle(_PARTS, aliases, {key: _literal(value) for key, value in constants.items()})
    bundle.add(_PARTS, "Exported")
    title = "".join(map(str.capitalize, algorithm.split("_")))
    command = f"{PROGRAM} export --algorithm {algorithm}"
    if polar != "auto" or polar_steps:
        command += f" --polar {polar}" + (f" --polar-steps {polar_steps}" if polar_steps else "")
    text = _header(title, algorithm, entry, command) + bundle.text()
    defaults = {key: 0 if key == "seed" else values[key] for key in options}
    if entry.ball == partner == "sign":
        defaults["sign_scale"] = 1.0
    old = inspect.getsource(export_parts.Exported).partition("\n\n")[0]
    assert old in text
    return text.replace(old, _class_head(title, algorithm, defaults))


def _header(title: str, algorithm: str, entry: AlgorithmEntry, command: str) -> str:
    formula = BALLS["spectral" if entry.options["rank"] == "full" else entry.ball].direction
    if _is_blended(entry):
        formula = f"α {formula} + (1 - α) {BALLS[entry.options['blend']].direction}"
    return f'''"""{title}: steps matrices along {formula}, for the momentum M = U Σ Vᵀ.

    M ← μ M + (1 - μ) G,    W ← (1 - lr·weight_decay) W - lr·scale·D(N)

with N = M, or its Nesterov form. One file that needs torch alone, written by

    {command}

of lit_fanions {__version__}. Its ``Fanion(params, algorithm="{algorithm}")`` takes the same steps,
up to rounding where it stacks matrices.

SPDX-License-Identifier: Apache-2.0
"""

'''


def _class_head(title: str, algorithm: str, defaults: dict[str, Any]) -> str:
    """Return the first lines of the class, with a constructor of its options."""
    types = {"rank": "Rank", "sign_scale": "float | None"}
    arguments = "".join(
        f"        {key}: {types.get(key, type(value).__name__)} = {_literal(value)},\n"
        for key, value in defaults.items()
    )
    chosen = "".join(f'            "{key}": {key},\n' for key in defaults)
    return f'''class {title}(torch.optim.Optimizer):
    """Steps of ``Fanion(params, algorithm="{algorithm}")``, for matrices and convolutions.

    Args:
        params: Parameters or groups of them.
{argument_docs(defaults)}
    """

    def __init__(
        self,
        params: Any,
{arguments}    ) -> None:
        options = {{
{chosen}        }}
        super().__init__(params, options)'''


def _literal(value: Any) -> str:
    """Return a constant as it stands in Python; the rows of a table one a line."""
    if isinstance(value, tuple):
        return "".join(["(\n", *(f"    {row!r},\n" for row in value), ")"])
    return json.dumps(value) if isinstance(value, str) else repr(value)


def main(args: Sequence[str]) -> int:
    """Write the file, and return the exit status 0; wrong arguments exit with status 2."""
    parser = CommandParser("export", __doc__)
    parser.add_argument("--algorithm", required=True, metavar="NAME", help=", ".join(exportable()))
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: standard output)")
    parser.add_argument("--polar", default="auto", metavar="METHOD", help=", ".join(_METHODS))
    parser.add_argument("--polar-steps", type=int, metavar="N", help="Newton-Schulz steps")
    options = parser.parse_args(args)
    try:
        text = single_file(options.algorithm, options.polar, options.polar_steps)
        if options.output is None:
            sys.stdout.write(text)
        else:
            options.output.write_text(text, encoding="utf-8")
            print(f"{options.output}: {len(text.splitlines())} lines")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


# -- copying definitions of this package, with all that they use of it, into one text --


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

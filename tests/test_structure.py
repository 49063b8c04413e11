"""The rules of the house that a script can check (docs/extending.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TESTS, subprocess_environment

ROOT = TESTS.parent
FILES = sorted(
    path
    for room in ("lit_fanions", "models", "datamodules", "experiments")
    for path in (ROOT / room).rglob("*.py")
)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_no_file_has_more_than_400_lines():
    long = [path for path in FILES if len(path.read_text().splitlines()) > 400]
    assert names(long) == []


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_functions_are_short_and_are_not_called_as_their_module(path):
    for function in functions(path):
        start = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        assert function.end_lineno - start < 60, f"{function.name} is too long"
    tree = ast.parse(path.read_text())
    own = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert path.stem not in own


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=subprocess_environment(),
        cwd=ROOT,
    )
    return done.stdout


HEAVY = (
    "lightning", "pytorch_lightning", "torchvision", "torchmetrics", "matplotlib", "tensorboard",
    "jsonargparse", "rich", "optuna", "scipy", "triton",
)  # fmt: skip


def test_the_optimizer_loads_torch_alone():
    code = f"import sys; from lit_fanions import Fanion; print({{*sys.modules}} & {{*{HEAVY!r}}})"
    assert run(code) == "set()\n"


@pytest.mark.slow
def test_import_takes_little_beyond_torch():
    code = (
        "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); "
        "from lit_fanions import Fanion; print((time.perf_counter() - start) / (middle - start))"
    )
    ratios = sorted(float(run(code)) for _ in range(5))
    assert ratios[2] <= 1.15

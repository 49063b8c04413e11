"""Random command lines and recipes: read, or refused in a few lines; never a traceback."""

import contextlib
import copy
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_fanions.cli.app import Reader
from tests.cli.recipes import FIT
from tests.conftest import toy_recipe

# Hypothesis' default would draw "" for most.
WORDS = st.sampled_from(
    [
        "",
        "nan",
        "inf",
        "-1",
        "1e999",
        "null",
        "~",
        "yes",
        "{",
        "[1,",
        "a: b",
        "é",
        "\x00",
        "toy_zoo.ToyNet",
    ]
)
SCALARS = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-1, 3),
        st.floats(),
        st.text(max_size=8),
    ),
    WORDS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6) | WORDS, inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(tree: Any, prefix: tuple = ()) -> list[tuple]:
    """Return the path of every key of nested mappings."""
    if not isinstance(tree, dict):
        return []
    return [
        p for key, value in tree.items() for p in [(*prefix, key), *paths(value, (*prefix, key))]
    ]


RECIPE = toy_recipe()
RECIPE["model"]["init_args"]["optimizer"] |= {
    "other": {"algorithm": "adamw"},
    "overrides": {"head": {"lr": 0.1}},
    "schedule": {"shape": "linear"},
}
RECIPE["trainer"]["callbacks"] = {
    "class_path": "lit_fanions.callbacks.SpectralMonitor",
    "init_args": {"every_n_steps": 5},
}
PATHS = paths(RECIPE)
OPTIONS = ["--" + ".".join(path).replace(".init_args", "") for path in PATHS] + [
    *(
        "--config",
        "--ckpt_path",
        "--print_config",
        "--help",
        "--model.help",
        "--nonfinite_patience",
    ),
    *(
        "--trainer.callbacks+",
        "--trainer.callbacks.SpectralMonitor.every_n_steps",
        "--",
        "-c",
        "---",
    ),
]


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """A recipe with a few changes, or text that is none."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
    recipe = copy.deepcopy(RECIPE)
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=3)):
        node = recipe
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if not isinstance(node, dict) or path[-1] not in node:
            continue
        change = draw(st.sampled_from(["set", "delete", "rename", "repeat"]))
        if change == "set":
            node[path[-1]] = draw(VALUES)
        elif change == "delete":
            del node[path[-1]]
        elif change == "rename":
            node[path[-1][:-1] + draw(st.text(max_size=2))] = node.pop(path[-1])
        else:
            node[path[-1] + "s"] = node[path[-1]]
    text = yaml.safe_dump(recipe, allow_unicode=True)
    cut = draw(st.integers(0, len(text)) | st.none())
    return text[:cut].encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-8-sig"])))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Arguments of fit: options with values, and other text."""
    args = [*FIT]
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=3)):
        value = str(draw(SCALARS | VALUES.map(yaml.safe_dump)))
        form = draw(st.sampled_from(["two", "one", "bare", "typo"]))
        args += {
            "two": [option, value],
            "one": [f"{option}={value}"],
            "bare": [option],
            "typo": [option[:-1], value],
        }[form]
    return args + draw(st.lists(st.text(max_size=5) | WORDS, max_size=1))


def assert_read_or_refused(reader: Reader, args: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO()  # which `-` reads
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            reader.read(args)
            return
        except SystemExit as stop:
            status = stop.code
    if status == 0:  # --help, --print_config
        return
    assert status == 2
    lines = err.getvalue().splitlines()
    assert len(lines) <= 3, err.getvalue()
    assert lines[0].startswith("error: "), err.getvalue()
    assert len(lines[0]) < 700


def fuzz(count: int) -> None:
    reader = Reader(FIT)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes() | st.none(), command_lines())
    def check(recipe: bytes | None, args: list[str]) -> None:
        content = yaml.safe_dump(RECIPE).encode() if recipe is None else recipe
        Path("recipe.yaml").write_bytes(content)
        assert_read_or_refused(reader, args)

    before = set(os.listdir())
    check()
    assert set(os.listdir()) == before


@pytest.mark.parametrize(
    "count", [100, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_random_command_lines_and_recipes_are_read_or_refused(project, monkeypatch, count):
    monkeypatch.setattr(sys, "stdin", sys.stdin)  # restored afterwards
    fuzz(count)

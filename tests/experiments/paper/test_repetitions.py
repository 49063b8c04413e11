"""Commands that train recipes with several seeds check their options before they train."""

import argparse
from pathlib import Path

import pytest

from experiments.paper import repetitions
from lit_fanions.cli.console import Refused


def options(*args):
    parser = argparse.ArgumentParser()
    repetitions.add_arguments(parser, ["*.yaml"], seeds=3)
    return argparse.Namespace(quick=False, **vars(parser.parse_args(args)))


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_counts_must_be_positive(option):
    with pytest.raises(Refused, match=f"{option} must be a whole number of at least 1, got 0"):
        repetitions.plan(options(option, "0"), [], {}, ())


def test_recipes_that_are_not_here_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"^no \*.yaml here: start the command in a checkout"):
        repetitions.plan(options(), [], {}, ())


def test_defaults_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").touch()
    chosen = options()
    assert repetitions.plan(chosen, [], {}, ()) == ({"a": Path("a.yaml")}, [])
    assert chosen.seeds == 3

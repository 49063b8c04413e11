"""Options that a command sets itself, and mistyped ones, are refused."""

import argparse

import pytest

from lit_fanions.cli import fit_options
from lit_fanions.cli.app import Reader
from lit_fanions.cli.console import Refused

RESERVED = {"--model.optimizer.matrix.lr": "use --factors", "--trainer.logger": "they are in --out"}


@pytest.mark.parametrize(
    "arg",
    [
        "--model.optimizer.matrix.lr",
        "--model.init_args.optimizer.matrix.lr=0.1",
        "--trainer.logger=false",
        "--trainer.logger.init_args.name=x",
        "--trainer.logger+=CSVLogger",
    ],
)
def test_reserved_options_are_refused(arg):
    with pytest.raises(Refused, match=r"^--\S+[a-z] cannot be used here: "):
        fit_options.refuse(["--trainer.max_steps", "3", arg, "1"], RESERVED)


def test_options_that_only_begin_alike_are_accepted():
    args = ["--model.optimizer.matrix.lr_min=1", "--trainer.logger_x", "--model.optimizer.other.lr"]
    fit_options.refuse(args, RESERVED)


def test_mistyped_options_of_the_command_are_refused():
    parser = argparse.ArgumentParser()
    for option in ("--config", "--seeds", "--jobs", "--metric", "--out", "--set", "--tune"):
        parser.add_argument(option)
    typos = {"--seed": "--seeds", "--job=2": "--jobs", "--metrics": "--metric"}
    for given, meant in typos.items():
        with pytest.raises(Refused, match=f"unknown option --.*; did you mean '{meant}'"):
            fit_options.refuse_mistyped(["--trainer.max_steps=2", given, "2"], parser)
    given = [*sorted(fit_options.FIT_OPTIONS), "--data.seed", "--model.metric", "--trainer.logger"]
    fit_options.refuse_mistyped(given, parser)


def test_all_options_of_fit_are_known(project):
    fit = Reader(["fit", "--config=recipe.yaml"]).parser._subcommands_action.choices["fit"]
    options = {option for action in fit._actions for option in action.option_strings}
    assert {option for option in options if option[1:2] == "-" and "." not in option} - {
        "--help"
    } <= fit_options.FIT_OPTIONS

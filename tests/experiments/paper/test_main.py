"""The command line around the commands."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.paper import __main__ as paper
from experiments.paper.__main__ import COMMANDS, TRAINING, main
from experiments.paper.outcome import Outcome
from lit_fanions.cli.console import Refused
from lit_fanions.cli.runner import Stopped


def test_list_names_every_command(capfd):
    assert main(["--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS, "all", "claims"]
    assert all(line.endswith(")") for line in lines[:-2])  # how long it takes


def test_missing_command_is_refused_with_the_choices(capfd):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert f"name a command: {', '.join([*COMMANDS, 'claims', 'all'])}" in capfd.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capfd):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  python -m experiments.paper {command}" in capfd.readouterr().out


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_missing_package_is_named(package, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        main(["nanogpt", "--config", "a.yaml", "--out", "out"])
    assert stop.value.code == 2
    assert f"nanogpt needs {package}: pip install {package}" in capfd.readouterr().err


@pytest.mark.parametrize("command", TRAINING)
def test_training_outside_a_checkout_is_refused(command, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([command, "--quick"])
    assert stop.value.code == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert (
        f"{tmp_path} has no configs/, datamodules/: start it in the root of a checkout" in message
    )
    root = Path(paper.__file__).parents[2]
    assert message.endswith(f"(cd {root})")


def test_arguments_for_fit_are_refused_by_commands_that_do_not_train(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["norms", "--trainer.max_steps=1"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --trainer.max_steps=1" in capfd.readouterr().err


def fake_command(run):
    """A command that consists of its `run(options)`."""
    return SimpleNamespace(__doc__="", TIME="", add_arguments=lambda parser: None, run=run)


def test_outcome_keeps_the_command_line_that_was_given(monkeypatch, tmp_path):
    def run(options):
        Outcome([], ["x"], [], {}, arguments=options.arguments).save(options.out, "first")
        return 0

    monkeypatch.setattr(sys, "argv", ["paper", "of", "another", "program"])
    monkeypatch.setattr(paper, "COMMANDS", {"first": fake_command(run)})

    def saved_command(folder):
        return json.loads((folder / "first.json").read_text())["command"]

    assert main(["first", "--out", str(tmp_path)]) == 0
    assert saved_command(tmp_path) == f"python -m experiments.paper first --out {tmp_path}"
    assert main(["all", "--quick", "--out", str(tmp_path)]) == 0
    own = tmp_path / "first"
    assert saved_command(own) == f"python -m experiments.paper first --out {own} --quick"
    assert sys.argv == ["paper", "of", "another", "program"]


def test_all_continues_after_a_failure(monkeypatch, tmp_path, capfd):
    asked = []

    def ends_with(status):
        def run(options):
            asked.append((options.out.name, options.out, options.quick))
            if status == 2:
                raise Refused("no data")
            return status

        return fake_command(run)

    commands = {f"c{status}": ends_with(status) for status in (2, 1, 0)}
    monkeypatch.setattr(paper, "COMMANDS", commands)
    assert main(["all", "--quick", "--out", str(tmp_path)]) == 1
    assert asked == [(name, tmp_path / name, True) for name in commands]
    printed = capfd.readouterr()
    assert printed.err.endswith("c2: error: no data\n")
    outcomes = [line.split()[:2] for line in printed.out.splitlines()[-4:-1]]
    assert outcomes == [["c2", "failed"], ["c1", "failed"], ["c0", "done"]]


def test_signal_stops_all(monkeypatch, tmp_path):
    asked = []

    def run(options):
        asked.append(options.out.name)
        raise Stopped(signal.SIGTERM)

    commands = {"first": fake_command(run), "second": fake_command(run)}
    monkeypatch.setattr(paper, "COMMANDS", commands)
    assert main(["all", "--out", str(tmp_path)]) == 143
    assert asked == ["first"]


def test_all_ends_with_the_page_of_claims(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(paper, "COMMANDS", {"nothing": fake_command(lambda options: 0)})
    assert main(["all", "--quick", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "claims.md").exists()
    assert "claims: not written, because --quick proves nothing" in capfd.readouterr().out
    assert main(["all", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "claims.md").exists()

"""The command line around the paper's commands."""

import signal
import sys
from types import SimpleNamespace

import pytest

from experiments.paper import __main__ as paper
from experiments.paper.__main__ import COMMANDS, main
from lit_fanions.cli.console import Refused
from lit_fanions.cli.runner import Stopped


def test_list_names_every_command(capfd):
    assert main(["--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS, "all", "claims"]
    assert all(line.endswith(")") for line in lines[:-2])  # how long it takes


def test_no_command(capfd):
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


def test_missing_matplotlib_is_named(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        main(["nanogpt", "--config", "a.yaml", "--out", "out"])
    assert stop.value.code == 2
    assert "nanogpt needs matplotlib: pip install matplotlib" in capfd.readouterr().err


def test_all_goes_on_after_a_failure(monkeypatch, tmp_path, capfd):
    asked = []

    def command(name, status):
        def run(options):
            asked.append((name, options.out, options.quick))
            assert sys.argv[1:] == [name, "--out", str(options.out), "--quick"]  # for the JSON
            if status == 2:
                raise Refused("no data")
            return status

        return SimpleNamespace(__doc__=name, TIME="", add_arguments=lambda parser: None, run=run)

    monkeypatch.setattr(sys, "argv", ["paper", "all"])
    commands = {f"c{status}": command(f"c{status}", status) for status in (2, 1, 0)}
    monkeypatch.setattr(paper, "COMMANDS", commands)
    assert main(["all", "--quick", "--out", str(tmp_path)]) == 1
    assert asked == [(name, tmp_path / name, True) for name in commands]
    printed = capfd.readouterr()
    assert printed.err.endswith("c2: error: no data\n")
    outcomes = [line.split()[:2] for line in printed.out.splitlines()[-4:-1]]
    assert outcomes == [["c2", "failed"], ["c1", "failed"], ["c0", "done"]]


def test_all_stops_when_stopped(monkeypatch, tmp_path):
    asked = []

    def run(options):
        asked.append(options.out.name)
        raise Stopped(signal.SIGTERM)

    command = SimpleNamespace(__doc__="", TIME="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(sys, "argv", ["paper", "all"])
    monkeypatch.setattr(paper, "COMMANDS", {"first": command, "second": command})
    assert main(["all", "--out", str(tmp_path)]) == 143
    assert asked == ["first"]

"""The command line around the paper's commands."""

import sys

import pytest

from lit_fanions.paper.__main__ import COMMANDS, main


def test_list_names_every_command(capfd):
    assert main(["--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.endswith(")") for line in lines)  # how long it takes


def test_no_command(capfd):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "name a command: nanogpt" in capfd.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capfd):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  python -m lit_fanions.paper {command} --config" in capfd.readouterr().out


def test_missing_matplotlib_is_named(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        main(["nanogpt", "--config", "a.yaml", "--out", "out"])
    assert stop.value.code == 2
    assert "nanogpt needs matplotlib: pip install matplotlib" in capfd.readouterr().err

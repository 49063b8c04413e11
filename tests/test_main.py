"""The door of the command line: what it does without Lightning, and what it says first."""

import errno
import io
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lit_fanions import __main__ as door
from lit_fanions.cli.messages import OTHER_COMMANDS, SUBCOMMANDS
from tests.cli.recipes import FIT
from tests.conftest import subprocess_environment


def test_version(capfd):
    assert door.start(["--version"]) == 0
    assert torch.__version__.partition("+")[0] in capfd.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        *(["list"], ["--version"], ["--help"], ["report", "logs"], ["compare", "logs", "logs"]),
        *(["lst"],),
    ],
    ids=" ".join,
)
def test_light_commands_do_not_load_lightning(args, project):
    with SummaryWriter("logs") as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['lit_fanions', *{args!r}]\n"
        "try:\n    runpy.run_module('lit_fanions', run_name='__main__')\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "loaded = {'lightning', 'pytorch_lightning', 'jsonargparse'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "raise SystemExit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_environment())
    assert done.returncode == (2 if args == ["lst"] else 0)


COMMANDS = [
    *(f"lit_fanions {name}".strip() for name in ("", *OTHER_COMMANDS)),
    *("experiments.bench", "experiments.bench overhead", "experiments.bench monitor"),
    *("experiments.paper", "experiments.paper nanogpt", "experiments.gpu", "experiments.gpu.kit"),
    *("experiments.faults", "experiments.same_numbers", "experiments.splits"),
    *("experiments.width_transfer", "datamodules.fineweb", "datamodules.fineweb tokenize"),
]
SLOW_IMPORTS = ("lightning", "torch._dynamo", "torchvision", "torchmetrics", "scipy", "sklearn",
                "matplotlib", "transformers", "optuna", "tensorboard", "pandas")  # fmt: skip


def test_no_help_needs_a_slow_import():
    """Modules are counted, not seconds: with torch alone a help takes a second or two."""
    code = (
        "import runpy, sys\n"
        f"for command in {COMMANDS!r}:\n"
        "    module, *args = command.split()\n"
        "    sys.argv = [module, *args, '--help']\n"
        "    try:\n        runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop:\n        assert not stop.code, (command, stop.code)\n"
        f"    loaded = {{*{SLOW_IMPORTS!r}}} & set(sys.modules)\n"
        "    assert not loaded, (command, loaded)\n"
    )
    environment = subprocess_environment()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-300:]
    assert done.stdout.count(b"usage: ") >= len(COMMANDS)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("lst", "list"), ("reprot", "report"), ("sweeps", "sweep"), ("ftt", "fit")],
)
def test_mistyped_subcommand_gets_the_likely_one(typo, meant, capfd):
    assert door.start([typo, "--config", "recipe.yaml"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: '{typo}' is none of fit, ")
    assert line.endswith(f"; did you mean '{meant}'?")


def test_help_names_every_command(capfd):
    assert door.start(["--help"]) == 0
    printed = capfd.readouterr().out
    assert {f"  {name} " in printed for name in (*SUBCOMMANDS, *OTHER_COMMANDS)} == {True}
    assert "examples:" in printed


def test_sweep_is_a_subcommand(capfd):
    with pytest.raises(SystemExit) as stop:
        door.start(["sweep", "--help"])
    assert stop.value.code == 0
    assert "--tune" in capfd.readouterr().out


def test_recipe_is_named_before_lightning_is_imported(project, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "lit_fanions.cli.app", None)  # its import fails
    with pytest.raises(ImportError):
        door.start(FIT)
    assert capfd.readouterr().err == "fit: reading recipe.yaml\n"


@pytest.mark.parametrize("args", [[*FIT, "--help"], ["fit"]])
def test_nothing_is_said_before_help_or_a_mistake(args, project, capfd):
    with pytest.raises(SystemExit):
        door.start(args)
    assert "reading" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_closed_standard_streams_end_no_run(name, project, monkeypatch):
    monkeypatch.setattr(sys, name, None)  # as Python leaves it after `>&-`
    assert door.start([*FIT, "--trainer.fast_dev_run", "true"]) == 0


def test_terminal_without_unicode_ends_no_command(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert door.start(["list", "algorithms"]) == 0
    sys.stdout.flush()
    assert rb"u\u2081 v\u2081\u1d40" in written.getvalue()


def test_file_in_the_place_of_a_folder_is_one_line(project, capfd):
    with SummaryWriter("logs") as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    assert door.start(["compare", "logs", "logs", "--out", "recipe.yaml"]) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "'recipe.yaml'" in line, line


def test_full_disk_is_one_line(capfd):
    def write() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert door.exit_status(write) == 1
    assert "No space left on device" in capfd.readouterr().err

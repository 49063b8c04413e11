"""Mistakes on the command line end in one line."""

import runpy
import sys

import pytest
import torch

from experiments.bench.__main__ import COMMANDS
from tests.experiments.bench.outcomes import refused


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("topk --repeats -1", "--repeats: '-1' is no whole number of at least 1"),
        ("polar --repeats 0", "--repeats: '0' is no whole number of at least 1"),
        ("step --repeats two", "--repeats: 'two' is no whole number of at least 1"),
        ("topk --device tpu", "--device: 'tpu' is none of auto, cpu, cuda"),
        ("polar --longest 0", "--longest: '0' is no number above 0"),
        ("polar --json nowhere/out.json", "'nowhere/out.json' is no file in an existing folder"),
        ("step --plot nowhere/out.png", "'nowhere/out.png' is no file in an existing folder"),
        ("topk --plot out.xyz", "'out.xyz' does not end in .png, .pdf or .svg"),
        ("polar --epochs 3", "unrecognized arguments: --epochs 3"),
        ("overhead --epochs 0", "--epochs: '0' is no whole number of at least 1"),
    ],
)
def test_races_refuse_impossible_options(command, message, capfd, project):
    assert message in refused(capfd, *command.split(), "--quick")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused(capfd):
    line = refused(capfd, "polar", "--quick", "--device", "cuda")
    assert "torch finds no GPU for 'cuda'" in line


def test_missing_packages_are_named(capfd, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(capfd, "step", "--quick", "--plot", str(tmp_path / "out.png"))
    assert line == "--plot needs matplotlib: pip install matplotlib"
    monkeypatch.setitem(sys.modules, "scipy", None)
    line = refused(capfd, "topk", "--quick")
    assert line == "this race needs scipy: pip install scipy"


def test_races_need_no_jsonargparse(capfd, monkeypatch):
    # A machine with a GPU may have torch and Lightning, and none of our other dependencies.
    for name in ("jsonargparse", "lit_fanions.cli.app"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "experiments.bench.recipe", raising=False)
    for module in COMMANDS.values():
        runpy.run_path(module.__file__, run_name=module.__name__)
    line = refused(capfd, "overhead", "--epochs", "1")
    assert line == "training a recipe needs jsonargparse: pip install jsonargparse"


@pytest.mark.parametrize("command", ["polar", "step"])
def test_torch_without_muon_is_refused(command, capfd, monkeypatch):
    monkeypatch.delattr(torch.optim, "_muon")
    monkeypatch.setitem(sys.modules, "torch.optim._muon", None)
    line = refused(capfd, command, "--quick")
    assert "needs torch.optim.Muon of torch 2.9 or later" in line

"""The report of splits, on models that need no library."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from experiments import splits
from lit_fanions.optim.parameters import assign


class Guess(nn.Module):
    """A network with two blocks, each of which holds a parameter of unknown use."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.kernel = nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(6, 3)


def test_report_counts_guesses_of_repeated_blocks_once(capsys):
    assert splits.report(iter([("guess", Guess), ("plain", lambda: nn.Linear(4, 3))])) == 1
    out = capsys.readouterr().out
    assert "  matrix     blocks.*.kernel  4x6  doubtful: " in out
    assert "  head       head.weight  3x6  output head by name" in out
    assert out.splitlines()[-1] == "2 models, 0 not built, 1 guesses"


def test_report_continues_after_a_model_that_cannot_be_built(capsys):
    def broken() -> nn.Module:
        raise ImportError("no such package")

    splits.report(iter([("broken", broken), ("plain", lambda: nn.Linear(4, 3))]))
    out = capsys.readouterr().out
    assert "broken: not built: ImportError" in out and "1 not built" in out


def test_report_stops_a_model_that_takes_too_long(capsys, monkeypatch):
    monkeypatch.setattr(splits, "_TIMEOUT", 1)
    splits.report(iter([("slow", lambda: time.sleep(30))]))
    assert "slow: not built: TimeoutError" in capsys.readouterr().out


def test_only_matching_models_are_built(capsys):
    models: list[tuple[str, Callable]] = [("a", Guess), ("b", lambda: nn.Linear(4, 3))]
    assert splits.report(iter(models), match="b") == 0
    assert "1 models" in capsys.readouterr().out


def test_models_are_built_without_memory_where_they_allow_it():
    assert {a.parameter.device.type for a in splits.split_of(lambda: nn.Linear(4, 3))} == {"meta"}

    def measured() -> nn.Module:
        layer = nn.Linear(4, 3)
        layer.size = layer.weight.norm().item()
        return layer

    assert {a.parameter.device.type for a in splits.split_of(measured)} == {"cpu"}


def test_verbose_lines_show_decisions_by_name():
    module = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 3)})
    brief, verbose = (splits.describe(assign(module), v) for v in (False, True))
    assert len(brief) == 1 and len(verbose) == 2


@pytest.mark.parametrize("library", splits.LIBRARIES)
def test_every_library_names_its_models(library):
    pytest.importorskip(library)
    name, build = next(iter(splits.LIBRARIES[library]()))
    assert name and callable(build)

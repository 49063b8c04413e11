"""The check of learning rates across widths tells rules that transfer from others."""

import json
from pathlib import Path

import pytest

from experiments import width_transfer


def test_features_change_equally_where_learning_rates_transfer(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    widths = ["--widths", "32", "64", "128", "--steps", "2"]
    assert width_transfer.main(["coordinates", *widths, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["results"]
    transferred, given = (found[rule]["slopes"] for rule in width_transfer.RULES)
    assert transferred.keys() == given.keys() == {"embedding", "block 0", "block 1", "logits"}
    for name in ("block 0", "block 1"):
        assert abs(transferred[name]) < 0.15 < 0.5 < given[name]
    assert abs(transferred["logits"]) < 0.4 < 0.6 < given["logits"]


def test_sweep_shows_the_best_factor_of_each_width(tmp_path, capsys, monkeypatch) -> None:
    """The loss is least where the factor is 1 at every width; nothing is trained."""

    def loss(module, options) -> float:
        return abs(module.fanion_config.matrix.lr - width_transfer.LR["matrix"])

    monkeypatch.setattr(width_transfer, "validation_loss", loss)
    assert width_transfer.main(["sweep", "--widths", "32", "64", "--factors", "0.5", "1", "2"]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[-1] for line in table] == ["1"] * 4
    given = ["sweep", "--widths", "32", "--factors", "1", "2", "--rules", "transferred"]
    assert width_transfer.main(given) == 0
    assert "as given" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_is_trained_on_pythons_documentation(capsys) -> None:
    given = ["sweep", "--widths", "32", "--factors", "1", "--steps", "4"]
    assert width_transfer.main(given) == 0
    losses = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert all(2 < loss < 5.6 for loss in losses)


def test_widths_that_heads_do_not_divide_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        width_transfer.main(["coordinates", "--widths", "40"])
    assert "choose multiples of 32" in capsys.readouterr().err

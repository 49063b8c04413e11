"""The sizes of the command sizes, and the lines through their gaps."""

import math
from pathlib import Path

import pytest

from experiments.paper import sizes
from experiments.paper.repetitions import check
from lit_fanions.cli.console import Refused
from models import NanoGPT


def recipes(*names):
    return {name: Path(f"configs/nanogpt/{name}.yaml") for name in names}


def test_every_variant_is_a_recipe_that_fit_takes():
    variants = sizes.make_variants(recipes(sizes.REFERENCE, *sizes.RIVALS))
    assert len(variants) == 4 * len(sizes.SIZES)
    assert {*sizes.BESIDE, *sizes.BESIDE.values()} == variants.keys()
    for variant in variants.values():
        check([f"--config={variant.path}", *variant.args])


def test_parameters_are_those_of_the_matrices_of_the_blocks():
    size = sizes.SIZES["2x64"]
    config = {"vocab_size": 257, "layers": 2, "width": 64, "heads": 1, "mlp_width": 256}
    blocks = NanoGPT(network=config).network.blocks
    assert sum(p.numel() for p in blocks.parameters() if p.ndim == 2) == size.parameters


def test_quick_recipe_keeps_its_own_number_of_steps():
    variants = sizes.make_variants(recipes("quickstart"))
    assert not any("max_steps" in arg for v in variants.values() for arg in v.args)


def test_other_recipes_are_refused():
    with pytest.raises(Refused, match="neon_cpu is not compared; give some of muon_cpu"):
        sizes.make_variants(recipes("neon_cpu"))


def finals(gap):
    """Losses of F-Muon that are behind Muon's by ``gap(log10 of the parameters)`` and noise."""
    noise = (-0.01, 0.01)
    losses = {}
    for name, size in sizes.SIZES.items():
        behind = gap(math.log10(size.parameters))
        losses[f"muon_cpu-{name}"] = {0: 2.0, 1: 2.1}
        losses[f"f_muon_cpu-{name}"] = {0: 2.0 + behind + noise[0], 1: 2.1 + behind + noise[1]}
    return losses


def test_trend_is_the_slope_and_what_it_gives_at_the_papers_size():
    (table,) = sizes.tabulate_trends(finals(lambda decades: 0.5 - 0.06 * decades))
    (row,) = table.rows
    assert row[0] == "f_muon_cpu"
    assert row[1].startswith("-0.0600 ± 0.0000")
    expected = 0.5 - 0.06 * math.log10(276e6)
    assert float(row[2].split()[0]) == pytest.approx(expected, abs=1e-4)
    assert "± 0.1271 (95 %)" in row[2]  # t(1) * .01 * sqrt(2) / sqrt(2)


def test_one_size_or_longer_trainings_give_no_trend():
    losses = finals(lambda decades: 0.1)
    for left in (("6x192",), ("4x128", "4x128-600-steps")):
        some = {name: x for name, x in losses.items() if name.split("-", 1)[1] in left}
        assert sizes.tabulate_trends(some) == []
    assert sizes.tabulate_trends({"f_muon_cpu-2x64": {0: 1.0}}) == []


def test_the_picture_has_a_line_for_each_rival_that_was_trained():
    from matplotlib.figure import Figure

    figure = Figure()
    sizes.draw(figure, finals(lambda decades: 0.1))
    (axes,) = figure.axes
    containers = {c.get_label(): c for c in axes.containers}
    assert [*containers["f_muon_cpu"][0].get_xdata()] == [98304, 786432, 2654208]

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
    """Losses of F-Muon that are behind Muon's by ``gap(log10 of the parameters, seed)``."""
    losses = {}
    for name, size in sizes.SIZES.items():
        decades = math.log10(size.parameters)
        muon = {seed: 2.0 + 0.1 * seed for seed in range(3)}
        losses[f"muon_cpu-{name}"] = muon
        losses[f"f_muon_cpu-{name}"] = {s: loss + gap(decades, s) for s, loss in muon.items()}
    return losses


def test_trend_is_the_slope_and_what_it_gives_at_the_papers_size():
    slopes = (-0.07, -0.06, -0.05)
    (table,) = sizes.tabulate_trends(finals(lambda decades, seed: 0.5 + slopes[seed] * decades))
    (row,) = table.rows
    assert row[0] == "f_muon_cpu"
    half = 4.302653 * 0.01 / 3**0.5  # t of two degrees of freedom
    assert row[1] == f"-0.0600 ± {half:.4f} (95 %)"
    decades = math.log10(12 * 12 * 768**2)
    assert row[2] == f"{0.5 - 0.06 * decades:+.4f} ± {half * decades:.4f} (95 %)"
    assert row[3] == "0.0000"


def test_gaps_that_are_on_no_line_say_so():
    (table,) = sizes.tabulate_trends(finals(lambda decades, seed: 0.1 * (decades - 5.5) ** 2))
    assert float(table.rows[0][3]) > 0.02


def test_one_size_or_longer_trainings_give_no_trend():
    losses = finals(lambda decades, seed: 0.1)
    for left in (("6x192",), ("4x128", "4x128-600-steps")):
        some = {name: x for name, x in losses.items() if name.split("-", 1)[1] in left}
        assert sizes.tabulate_trends(some) == []
    assert sizes.tabulate_trends({"f_muon_cpu-2x64": {0: 1.0}}) == []


def test_the_picture_has_a_line_for_each_rival_that_was_trained():
    from matplotlib.figure import Figure

    figure = Figure()
    sizes.draw(figure, finals(lambda decades, seed: 0.1))
    (axes,) = figure.axes
    containers = {c.get_label(): c for c in axes.containers}
    assert [*containers["f_muon_cpu"][0].get_xdata()] == [98304, 786432, 2654208]

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


def test_every_size_is_in_a_series_at_equal_steps_or_equal_tokens_per_parameter():
    equal, proportional = ([sizes.SIZES[name] for name in own] for own in sizes.SERIES.values())
    assert len({size.steps for size in equal}) == 1
    assert len({size.parameters / size.steps for size in proportional}) == 1
    assert [*equal, *proportional] == [*sizes.SIZES.values()]


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
    half = 4.302653 * 0.01 / 3**0.5  # t of two degrees of freedom
    decades = math.log10(12 * 12 * 768**2)
    there = f"{0.5 - 0.06 * decades:+.4f} ± {half * decades:.4f} (95 %)"
    assert table.rows == [
        ["f_muon_cpu", series, f"-0.0600 ± {half:.4f} (95 %)", there, "0.0000"]
        for series in sizes.SERIES
    ]


def test_gaps_that_are_on_no_line_say_so():
    (table,) = sizes.tabulate_trends(finals(lambda decades, seed: 0.1 * (decades - 5.5) ** 2))
    assert all(float(row[-1]) > 0.01 for row in table.rows)


def test_one_size_of_a_series_gives_no_trend():
    losses = finals(lambda decades, seed: 0.1)
    for left in (("6x192",), ("4x128", "4x128-600-steps")):
        some = {name: x for name, x in losses.items() if name.split("-", 1)[1] in left}
        assert sizes.tabulate_trends(some) == []
    assert sizes.tabulate_trends({"f_muon_cpu-2x64": {0: 1.0}}) == []


def test_the_picture_has_a_panel_for_each_series_that_was_trained():
    losses = finals(lambda decades, seed: 0.1)
    first, second = draw(losses)
    for axes, names in zip((first, second), sizes.SERIES.values(), strict=True):
        (line,) = (c[0] for c in axes.containers if c.get_label() == "f_muon_cpu")
        assert [*line.get_xdata()] == [sizes.SIZES[name].parameters for name in names]
    (only,) = draw({name: x for name, x in losses.items() if name.endswith("-steps")})
    assert only.get_title() == second.get_title()
    (empty,) = draw({})
    assert not empty.containers


def draw(losses):
    from matplotlib.figure import Figure

    figure = Figure()
    sizes.draw(figure, losses)
    return figure.axes

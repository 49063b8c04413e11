"""Charts and figures: one line a colour, names of matrices, sizes that can be read."""

import re
from pathlib import Path

import pytest
import yaml

from lit_fanions.callbacks import figures
from lit_fanions.callbacks.quantities import QUANTITIES, Tag, parse_tag

LONG = "a." * 40 + "weight"
SAMPLE = figures.Sample([1.0, 0.5, 0.1], [1.0, 1.0, 1.0], "momentum")


@pytest.mark.parametrize("is_group", [False, True])
def test_tags_are_parsed_to_their_parts(is_group):
    tag = Tag("update_rms", "blocks.0/x", is_group)
    assert str(tag).startswith("spectral/update_rms/")
    assert parse_tag(str(tag)) == parse_tag(str(tag).removeprefix("spectral/")) == tag
    for other in ("train/loss", "update_rms", "spectral/nothing/x", "spectral/update_rms/"):
        assert parse_tag(other) is None


def test_a_chart_of_custom_scalars_has_one_line_a_run_and_a_title():
    groups = ["matrix", "my.group+"]
    tags = [str(Tag(q, g, True)) for q in QUANTITIES for g in groups]
    layout = figures.custom_scalars([*tags, "train/loss", str(Tag("update_rms", "down"))])
    charts = [item for section in layout.values() for item in section.items()]
    assert len(charts) == len(groups) * sum(map(len, figures.SECTIONS.values()))
    for title, (kind, patterns) in charts:
        assert kind == "Multiline" and title != "norm"
        (matched,) = [t for t in tags for pattern in patterns if re.search(pattern, t)]
        assert QUANTITIES[parse_tag(matched).quantity].title in title
    assert len({title for title, _ in charts}) == len(charts)
    assert figures.custom_scalars(["train/loss"]) == {}


def test_every_quantity_has_a_title_and_a_meaning():
    assert all(quantity.title and quantity.meaning for quantity in QUANTITIES.values())
    assert set().union(*figures.SECTIONS.values()) <= set(QUANTITIES)


def test_a_legend_names_at_most_thirty_matrices():
    for count, shown in ((3, 3), (100, 25)):
        samples = {f"layer{i}${i}_{{": SAMPLE for i in range(count)}
        figure = figures.spectra(samples)
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert len(names) == shown and set(names) <= set(samples)
        assert figures.pixels(figure).shape[1] == 1000


def test_long_names_leave_space_for_the_plot():
    figure = figures.stable_ranks({0: {LONG: 1.0, "b": 2.0}, 5: {LONG: 1.5, "b": 2.5}})
    pixels = figures.pixels(figure)
    assert pixels.shape[1] == 900
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names[0]) == 48 and names[0].endswith("a.weight") and names[1] == "b"
    assert axes.get_window_extent().width > 300


def test_the_overlay_adds_the_monitor_alone():
    overlay = yaml.safe_load((Path(__file__).parents[2] / "configs/monitor.yaml").read_text())
    (callback,) = overlay["trainer"]["callbacks+"]
    assert callback["class_path"] == "lit_fanions.callbacks.SpectralMonitor"

"""The split as a table."""

import re

import pytest
from torch import nn

from lit_fanions import split_parameters
from lit_fanions.optim.split_table import Row, format_summary, format_table
from tests.optim.networks import GPT, body


def test_table_has_a_line_for_each_kind_of_parameter():
    module = body()
    header, *lines = str(split_parameters(module)).splitlines()
    assert header.split() == [
        "parameter", "shape", "group", "algorithm", "ball", "lr", "radius", "size",
        "reason",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "embed.weight", "layers.0..2.weight", "layers.0..2.bias", "conv.weight", "conv.bias",
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    ]  # fmt: skip
    cells = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert cells["layers.0..2.weight"] == [
        "layers.0..2.weight", "8x8", "matrix", "muon", "spectral", "0.02", "0.02", "192",
        "weight of Linear",
    ]  # fmt: skip
    assert cells["embed.weight"][1:5] == ["9x8", "embedding", "adamw", "0.001"]


@pytest.mark.parametrize("algorithm", ["f_muon", "kyfan", "dion", "s_neon"])
def test_radius_that_depends_on_the_momentum_is_a_tilde(algorithm):
    options = {"algorithm": algorithm, "scale": "match_rms_adamw"}
    split = split_parameters(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), {"matrix": options})
    assert re.split(r"  +", str(split).splitlines()[1])[6] == "~"


def test_unequal_parts_show_a_radius_each():
    module = nn.Sequential(nn.Linear(4, 12, bias=False), nn.Linear(12, 3))
    split = split_parameters(module, {"matrix": {"splits": [8, 4]}})
    assert re.split(r"  +", str(split).splitlines()[1])[6] == "0.02828 0.02"


def test_table_shows_options_that_the_algorithm_does_not_imply():
    split = split_parameters(body(), {"matrix": {"algorithm": "muon", "alpha": 0.5}})
    assert "muon(alpha=0.5)" in str(split)
    assert "alpha" not in str(split_parameters(body(), {"matrix": {"algorithm": "f_muon"}}))


def row(name: str, reason: str = "weight of Linear", size: int = 12) -> Row:
    return Row(name, "4x3", "matrix", "muon", "spectral", "0.02", "0.02", size, reason)


def names(*rows: Row) -> list[str]:
    return [line.split()[0] for line in format_table(list(rows)).splitlines()[1:]]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["b.0.w", "b.1.w", "b.2.w"], ["b.0..2.w"]),
        (["b.0.w", "b.2.w", "b.4.w"], ["b.0,2,4.w"]),
        (["b.0.w", "b.0.v", "b.1.w", "b.1.v"], ["b.0..1.w", "b.0..1.v"]),
        (["s.0.b.0.w", "s.0.b.1.w", "s.1.b.0.w", "s.1.b.1.w"], ["s.0..1.b.0..1.w"]),
        (["s.0.b.0.w", "s.1.b.0.w", "s.1.b.1.w"], ["s.0.b.0.w", "s.1.b.0..1.w"]),
        (["w"], ["w"]),
        (["l1.w", "l2.w"], ["l1.w", "l2.w"]),
    ],
)
def test_numbers_in_names_are_folded(given, want):
    assert names(*map(row, given)) == want


def test_blocks_that_differ_are_not_folded():
    assert names(row("b.0.w"), row("b.1.w", "gain of LayerNorm"), row("b.2.w")) == [
        "b.0,2.w", "b.1.w"
    ]  # fmt: skip


def test_size_is_the_sum_over_the_folded_parameters():
    assert " 3,000 " in format_table([row(f"b.{i}.w", size=1000) for i in range(3)])


def test_table_stays_within_120_columns_and_keeps_names_whole():
    long = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rows = [row(long, "doubtful: " + "a long reason, " * 12), row("head.weight")]
    lines = format_table(rows).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[1] == long
    assert all(line.startswith(" ") for line in lines[2:-1])
    assert lines[-1].startswith("head.weight ")


def test_twenty_four_blocks_are_as_long_as_one():
    few, many = (str(split_parameters(GPT(layers=layers))) for layers in (12, 24))
    assert len(many.splitlines()) == len(few.splitlines())
    assert "blocks.0..23.attention.in_proj_weight" in many


def test_summary_of_a_long_table_has_a_line_for_each_group():
    rows = [row(f"layer{chr(97 + i)}.w", size=10) for i in range(30)]
    rows.append(row("guess.w", "doubtful: no module uses it", size=5))
    rows += [row(f"z{chr(97 + i)}.w", f"reason {i}") for i in range(4)]
    rows.append(row("bias", "1-D")._replace(group="vector", algorithm="adamw", ball="", shape="4"))
    lines = format_summary(rows).splitlines()
    assert sum(not line.startswith(" ") for line in lines) == 4
    assert lines[1].split()[:7] == ["layera.w", "and", "34", "more", "4x3", "matrix", "muon"]
    text = " ".join(lines[2].split())
    assert text == "doubtful: no module uses it; weight of Linear; reason 0; and 3 other reasons"
    assert lines[1].endswith(" 353")
    assert "print(split_parameters(module))" in lines[-1]


def test_short_table_is_its_own_summary():
    split = split_parameters(body())
    assert split.summary() == str(split)


def test_table_shows_the_matrices_and_the_ball():
    module = nn.ModuleDict({"body": nn.MultiheadAttention(8, 2), "conv": nn.Conv2d(4, 6, 3)})
    table = str(split_parameters(module, {"matrix": {"algorithm": "f_neon", "heads": "auto"}}))
    for text in ("24x8: 6 of 4x8", "8x8: 2 of 8x4", "nuclear + Frobenius"):
        assert text in table

"""Every trainable parameter exactly once; tags and overrides."""

import re
import warnings

import pytest
import torch
from torch import nn

from lit_fanions import configure_optimizers, split_parameters
from tests.optim.networks import GPT, Raw, before_a_head, body, run, table

# Sharing, freezing, laziness, parametrisations.


def test_shared_module_is_split_once():
    shared = nn.Linear(8, 8)
    module = nn.ModuleDict(
        {"a": shared, "b": nn.ModuleList([shared, nn.Sequential(shared)]), "c": nn.Linear(8, 3)}
    )
    assert table(module) == {
        "a.weight": "matrix", "a.bias": "vector", "c.weight": "head", "c.bias": "vector"
    }  # fmt: skip


def test_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    assert table(module) == {"1.weight": "matrix", "2.weight": "head", "2.bias": "vector"}
    module.requires_grad_(False)
    assert split_parameters(module) == []
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        configure_optimizers(module)


def test_lazy_module_needs_a_batch_first():
    module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"0.weight has no shape yet: run one batch"):
        split_parameters(module)
    module(torch.ones(2, 5))
    assert table(module)["0.weight"] == "matrix"


@pytest.mark.slow  # importing the compiler
def test_compiled_module_keeps_its_names():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    want = table(module)
    module.compile()
    assert table(module) == want


def test_modules_without_parameters_give_an_empty_split():
    module = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.ReLU())
    assert split_parameters(module) == []


# Overrides and tags.


def overridden(module: nn.Module, **overrides: dict) -> dict[str, str]:
    for value in overrides.values():
        value.setdefault("lr", 0.1)
    return table(module, {"overrides": overrides})


def test_override_selects_by_name_pattern():
    groups = overridden(body(), deep={"parameters": ["layers.[12].weight"]})
    assert [groups[f"layers.{i}.weight"] for i in range(3)] == ["matrix", "deep", "deep"]
    assert groups["layers.1.bias"] == "vector"


def test_override_selects_by_module_class():
    groups = overridden(body(), gains={"modules": ["LayerNorm", "Embedding"]})
    assert {n for n, g in groups.items() if g == "gains"} == {
        "embed.weight", "norm.weight", "norm.bias"
    }  # fmt: skip


def test_override_selects_by_base_class():
    assert overridden(body(), mine={"modules": ["_ConvNd"]})["conv.weight"] == "mine"


def test_a_standard_group_may_be_given_more():
    groups = overridden(body(), matrix={"parameters": ["head.weight", "conv.weight"]})
    assert groups["head.weight"] == groups["conv.weight"] == "matrix"
    run(configure_optimizers(body(), {"overrides": {"matrix": {"parameters": ["head.weight"]}}})[
        "optimizer"
    ])  # fmt: skip


def test_tied_parameter_is_selected_by_any_of_its_names():
    model = GPT(tied="head last")
    assert overridden(model, mine={"parameters": ["lm_head.weight"]})["wte.weight"] == "mine"


def test_first_override_wins():
    both = {
        "first": {"parameters": ["layers.0.*"]},
        "second": {"parameters": ["layers.*.weight"]},
    }
    groups = overridden(body(), **both)
    assert (groups["layers.0.weight"], groups["layers.1.weight"]) == ("first", "second")


def test_tag_wins_over_overrides():
    module = body()
    module["layers"][0].weight.fanion_group = "mine"
    module["layers"][1].weight.fanion_group = "head"
    groups = overridden(module, deep={"parameters": ["layers.*.weight"]}, mine={})
    assert [groups[f"layers.{i}.weight"] for i in range(3)] == ["mine", "head", "deep"]


def test_reasons_name_what_decided():
    module = body()
    module["layers"][0].weight.fanion_group = "head"
    overrides = {
        "a": {"parameters": ["layers.1.*"], "lr": 0.1},
        "b": {"modules": ["LayerNorm"], "lr": 0.1},
    }
    reasons = {a.name: a.reason for a in split_parameters(module, {"overrides": overrides})}
    assert reasons["layers.0.weight"] == "tagged fanion_group"
    assert reasons["layers.1.weight"] == "name matches 'layers.1.*'"
    assert reasons["norm.weight"] == "parameter of LayerNorm"
    assert reasons["head.weight"] == "output head by name"
    assert reasons["conv.weight"].startswith("depthwise Conv2d")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"parameters": ["layer.*"]}, "no parameter's name matches 'layer.*'"),
        ({"modules": ["Linaer"]}, "the model has no module 'Linaer'"),
        ({}, "overrides.mine: no parameter is in that group"),
    ],
)
def test_override_that_selects_nothing_is_refused(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_parameters(body(), {"overrides": {"mine": override}})


def test_vector_cannot_be_put_into_a_matrix_group():
    config = {"overrides": {"matrix": {"parameters": ["norm.weight"]}}}
    with pytest.raises(ValueError, match=r"norm.weight has shape \(8,\), which is no matrix"):
        configure_optimizers(body(), config)


# Marks against weight decay.


def test_marked_parameters_have_no_weight_decay():
    module = body()
    module["layers"][0].weight._no_weight_decay = True
    module["norm"].weight._no_weight_decay = True
    config = {"matrix": {"weight_decay": 0.1}, "other": {"weight_decay": 0.2}}
    split = split_parameters(module, config)
    decays = {a.name: split.group_options(a)["weight_decay"] for a in split}
    names = {a.name: split.group_name(a) for a in split}
    assert decays["layers.0.weight"] == decays["norm.weight"] == 0
    assert (decays["layers.1.weight"], decays["norm.bias"]) == (0.1, 0.2)
    assert names["layers.0.weight"] == "matrix.no_decay"
    assert names["norm.weight"] == "vector.no_decay"
    assert (names["layers.1.weight"], names["norm.bias"]) == ("matrix", "vector")


def test_mark_changes_nothing_where_nothing_decays():
    module = body()
    module["layers"][0].weight._no_weight_decay = True
    split = split_parameters(module)
    assert split.group_name(split[1]) == "matrix"
    assert "weight_decay" not in split.group_options(split[1])


def test_group_names_tell_the_forms_of_matrices_apart():
    module = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2), "up": nn.ConvTranspose2d(4, 6, 3, groups=2)}
    )
    split = split_parameters(before_a_head(**module))
    names = {a.name: split.group_name(a) for a in split}
    assert names["attention.in_proj_weight"] == "matrix.splits3"
    assert names["up.weight"] == "matrix.transposed.splits2"


# Warnings.


def test_one_warning_names_all_guesses_and_the_option():
    module = before_a_head(a=Raw("w1", 4, 6), b=Raw("w2", 4, 6))
    with pytest.warns(UserWarning) as caught:
        split_parameters(module)
    (warning,) = caught
    assert str(warning.message).startswith("the groups of 2 parameters are guesses, such as")
    assert "overrides" in str(warning.message) and "fanion_group" in str(warning.message)


@pytest.mark.parametrize("way", ["tag", "override"])
def test_choosing_the_group_ends_the_warning(way):
    module, config = before_a_head(a=Raw("w1", 4, 6)), {}
    if way == "tag":
        module["a"].w1.fanion_group = "matrix"
    else:
        config = {"overrides": {"matrix": {"parameters": ["a.w1"]}}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_parameters(module, config)

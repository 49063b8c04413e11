"""Which parameter goes where: tables of modules, and every trainable parameter exactly once."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from lit_fanions import Fanion, configure_optimizers, split_parameters


def table(module: nn.Module, config: dict | None = None) -> dict[str, str]:
    """Name -> group, with layout and splits where they say more than that."""
    split = split_parameters(module, config)
    assert_complete(module, split)
    described = {}
    for a in split:
        layout, splits = a.options.get("layout", "flatten"), a.options.get("splits")
        words = [a.group, *([layout] if layout != "flatten" else []), *([splits] if splits else [])]
        described[a.name] = " ".join(map(str, words))
    return described


def assert_complete(module: nn.Module, split) -> None:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert [a.name for a in split] == [*trainable]
    assert all(a.parameter is trainable[a.name] for a in split)
    assert all(a.reason and a.group for a in split)


def before_a_head(**modules: nn.Module) -> nn.Module:
    """The modules, followed by a classifier, which is no matrix."""
    return nn.ModuleDict({**modules, "head": nn.Linear(4, 3, bias=False)})


# Kind of module -> where its own parameters go.
KINDS = {
    "linear": (nn.Linear(6, 4), {"weight": "matrix", "bias": "vector"}),
    "conv1d": (nn.Conv1d(4, 6, 3), {"weight": "matrix", "bias": "vector"}),
    "conv2d": (nn.Conv2d(4, 6, 3), {"weight": "matrix", "bias": "vector"}),
    "conv3d": (nn.Conv3d(4, 6, 3), {"weight": "matrix", "bias": "vector"}),
    "conv_stem": (nn.Conv2d(1, 6, 3, bias=False), {"weight": "matrix"}),
    "conv_pointwise": (nn.Conv2d(4, 6, 1, bias=False), {"weight": "matrix"}),
    "conv_to_one": (nn.Conv2d(4, 1, 3, bias=False), {"weight": "other"}),
    "conv_grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), {"weight": "matrix 2"}),
    "conv_depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), {"weight": "other"}),
    "conv_multiplier": (nn.Conv2d(4, 8, 3, groups=4, bias=False), {"weight": "other"}),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), {"weight": "matrix transposed"}),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, bias=False), {"weight": "matrix transposed"}),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), {"weight": "matrix transposed"}),
    "transposed_grouped": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), {"weight": "matrix transposed 2"}
    ),
    "attention": (
        nn.MultiheadAttention(4, 2),
        {"in_proj_weight": "matrix 3", "in_proj_bias": "vector", "out_proj.weight": "matrix",
         "out_proj.bias": "vector"},
    ),
    "attention_of_other_widths": (
        nn.MultiheadAttention(4, 2, kdim=6, vdim=8, bias=False),
        {"q_proj_weight": "matrix", "k_proj_weight": "matrix", "v_proj_weight": "matrix",
         "out_proj.weight": "matrix"},
    ),
    "attention_with_biases": (
        nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True),
        {"in_proj_weight": "matrix 3", "bias_k": "other", "bias_v": "other",
         "out_proj.weight": "matrix"},
    ),
    "lstm": (
        nn.LSTM(4, 6),
        {"weight_ih_l0": "matrix 4", "weight_hh_l0": "matrix 4", "bias_ih_l0": "vector",
         "bias_hh_l0": "vector"},
    ),
    "lstm_with_projection": (
        nn.LSTM(4, 6, proj_size=3, bias=False),
        {"weight_ih_l0": "matrix 4", "weight_hh_l0": "matrix 4", "weight_hr_l0": "matrix"},
    ),
    "gru_both_ways": (
        nn.GRU(4, 6, bias=False, bidirectional=True),
        {f"weight_{part}h_l0{way}": "matrix 3" for way in ("", "_reverse") for part in "ih"},
    ),
    "rnn": (nn.RNN(4, 6, bias=False), {"weight_ih_l0": "matrix", "weight_hh_l0": "matrix"}),
    "lstm_cell": (
        nn.LSTMCell(4, 6, bias=False), {"weight_ih": "matrix 4", "weight_hh": "matrix 4"}
    ),
    "gru_cell": (nn.GRUCell(4, 6, bias=False), {"weight_ih": "matrix 3", "weight_hh": "matrix 3"}),
    "rnn_cell": (nn.RNNCell(4, 6, bias=False), {"weight_ih": "matrix", "weight_hh": "matrix"}),
    "bilinear": (nn.Bilinear(3, 4, 5, bias=False), {"weight": "other"}),
    "embedding": (nn.Embedding(9, 4), {"weight": "embedding"}),
    "embedding_bag": (nn.EmbeddingBag(9, 4), {"weight": "embedding"}),
    "layer_norm": (nn.LayerNorm(4), {"weight": "vector", "bias": "vector"}),
    "layer_norm_2d": (nn.LayerNorm((4, 5)), {"weight": "vector", "bias": "vector"}),
    "rms_norm_2d": (nn.RMSNorm((4, 5)), {"weight": "vector"}),
    "batch_norm": (nn.BatchNorm2d(4), {"weight": "vector", "bias": "vector"}),
    "group_norm": (nn.GroupNorm(2, 4), {"weight": "vector", "bias": "vector"}),
    "prelu": (nn.PReLU(4), {"weight": "vector"}),
    "one_row": (nn.Linear(6, 1, bias=False), {"weight": "other"}),
    "one_column": (nn.Linear(1, 6, bias=False), {"weight": "other"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module(kind):
    module, want = KINDS[kind]
    got = table(before_a_head(part=module))
    assert got.pop("head.weight") == "head"
    assert got == {f"part.{name}": group for name, group in want.items()}
    run(configure_optimizers(before_a_head(part=module))["optimizer"])


def run(optimizer: Fanion) -> None:
    """What was decided can be stepped."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for g in optimizer.param_groups for p in g["params"])


class MyLSTM(nn.LSTM):
    pass


class MyGRUCell(nn.GRUCell):
    pass


class MyLinear(nn.Linear):
    pass


class MyEmbedding(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("module", "name", "want"),
    [
        (MyLSTM(4, 6, bias=False), "weight_ih_l0", "matrix 4"),
        (MyGRUCell(4, 6, bias=False), "weight_ih", "matrix 3"),
        (MyLinear(4, 6, bias=False), "weight", "matrix"),
        (MyEmbedding(4, 6), "weight", "embedding"),
    ],
)
def test_subclasses_are_what_they_are_derived_from(module, name, want):
    assert table(before_a_head(part=module))[f"part.{name}"] == want


class Raw(nn.Module):
    """A module that holds a parameter of its own."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("w1", (4, 6), "matrix"),
        ("kernel", (6, 4), "matrix"),
        ("experts", (3, 4, 6), "matrix batch"),
        ("gate_up_proj", (8, 4, 6), "matrix batch"),
        ("scale", (4,), "vector"),
        ("temperature", (), "vector"),
        ("cls_token", (1, 1, 6), "other"),
        ("mask_token", (3, 6), "other"),
        ("pos_embed", (1, 5, 6), "other"),
        ("position", (5, 6), "other"),
        ("wpe", (5, 6), "other"),
        ("embedding_table", (5, 6), "other"),
        ("query", (1, 4, 6), "other"),
        ("gamma", (1, 6, 1, 1), "other"),
        ("row", (1, 6), "other"),
        ("column", (6, 1), "other"),
        ("filters", (4, 3, 2, 2), "other"),
    ],
)
def test_parameters_of_a_users_own_modules(name, shape, want):
    assert table(before_a_head(part=Raw(name, *shape)))[f"part.{name}"] == want


# Language models.


class Block(nn.Module):
    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Sequential(
            nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width)
        )


class GPT(nn.Module):
    """A decoder; its head is tied before or after the embedding is made, or not."""

    def __init__(self, vocabulary=50, width=8, tied="", head="lm_head", layers=2) -> None:
        super().__init__()
        if tied == "head first":
            setattr(self, head, nn.Linear(width, vocabulary, bias=False))
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        if tied != "head first":
            setattr(self, head, nn.Linear(width, vocabulary, bias=False))
        if tied == "head first":
            self.wte.weight = getattr(self, head).weight
        elif tied:
            getattr(self, head).weight = self.wte.weight


def blocks_are_matrices(groups: dict[str, str]) -> bool:
    weights = {n: g for n, g in groups.items() if n.startswith("blocks") and "norm" not in n}
    weights = {n: g for n, g in weights.items() if "bias" not in n}
    return bool(weights) and {g.split()[0] for g in weights.values()} == {"matrix"}


@pytest.mark.parametrize("head", ["lm_head", "output", "classifier"])
@pytest.mark.parametrize("tied", ["", "head first", "head last"])
def test_a_language_model(tied, head):
    groups = table(GPT(tied=tied, head=head))
    assert blocks_are_matrices(groups)
    assert groups["wpe.weight"] == "embedding" and groups["norm.weight"] == "vector"
    if tied:
        shared = groups.get(f"{head}.weight") or groups.get("wte.weight")
        assert shared == "embedding"
        assert len({f"{head}.weight", "wte.weight"} & groups.keys()) == 1
    else:
        assert (groups[f"{head}.weight"], groups["wte.weight"]) == ("head", "embedding")


@pytest.mark.parametrize("tied", ["", "head first", "head last"])
def test_a_byte_level_model_whose_hidden_layer_is_as_wide_as_its_vocabulary(tied):
    """64 x 4 = 256 is no reason to take an up-projection for an output head."""
    assert blocks_are_matrices(table(GPT(vocabulary=256, width=64, tied=tied)))


def test_positions_are_no_vocabulary():
    model = GPT(vocabulary=50, width=4)  # 16 positions, hidden layers of 16
    assert blocks_are_matrices(table(model))


def test_tying_is_named_in_the_reason():
    (shared,) = (a for a in split_parameters(GPT(tied="head last")) if a.name == "wte.weight")
    assert shared.reason == "Embedding, tied to lm_head.weight"


def test_torchs_own_transformer():
    groups = table(before_a_head(body=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    want = {
        "self_attn.in_proj_weight": "matrix 3", "self_attn.out_proj.weight": "matrix",
        "linear1.weight": "matrix", "linear2.weight": "matrix", "norm1.weight": "vector",
        "self_attn.in_proj_bias": "vector",
    }  # fmt: skip
    assert want.items() <= {n.removeprefix("body."): g for n, g in groups.items()}.items()


# Heads.


def test_the_last_linear_is_the_head():
    groups = table(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)))
    assert (groups["0.weight"], groups["1.weight"], groups["2.weight"]) == (
        "matrix", "matrix", "head"
    )  # fmt: skip


def test_the_projection_of_attention_is_no_head():
    groups = table(nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2)))
    assert groups["1.out_proj.weight"] == "matrix"
    assert groups["0.weight"] == "head"  # the last Linear that is not inside attention


def test_an_adapter_after_the_last_layer_is_no_head():
    with pytest.warns(UserWarning, match="low-rank adapter"):
        groups = table(nn.ModuleDict({"fc": nn.Linear(8, 5), "lora_A": nn.Linear(8, 2)}))
    assert (groups["fc.weight"], groups["lora_A.weight"]) == ("head", "matrix")


# Sharing, freezing, laziness, parametrisations.


def test_a_shared_module_is_one_set_of_parameters():
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


def test_a_lazy_module_must_have_seen_a_batch():
    module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"0.weight has no shape yet: run one batch"):
        split_parameters(module)
    module(torch.ones(2, 5))
    assert table(module)["0.weight"] == "matrix"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
@pytest.mark.parametrize(
    "part", [lambda: nn.Linear(8, 6, bias=False), lambda: nn.Conv2d(8, 6, 3, bias=False)]
)
def test_weight_norm_leaves_the_direction_a_matrix_and_the_gain_a_vector(norm, part):
    module = before_a_head(part=norm(part()))
    groups = {n: g for n, g in table(module).items() if n.startswith("part")}
    gain, direction = (groups[name] for name in sorted(groups, key=gains_first))
    assert gain in ("other", "vector") and direction == "matrix"
    run(configure_optimizers(module)["optimizer"])


def gains_first(name: str) -> bool:
    return not name.endswith(("weight_g", "original0"))


@pytest.mark.parametrize(
    "parametrise", [parametrizations.orthogonal, parametrizations.spectral_norm, spectral_norm]
)
def test_other_parametrised_weights_are_matrices_too(parametrise):
    module = before_a_head(part=parametrise(nn.Linear(6, 6, bias=False)))
    assert [g for n, g in table(module).items() if n.startswith("part")] == ["matrix"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "parametrise",
    [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm],
)
def test_a_parametrised_head_is_a_head(parametrise):
    module = nn.Sequential(nn.Linear(8, 8), parametrise(nn.Linear(8, 3)))
    assert "matrix" not in {g for n, g in table(module).items() if n.startswith("1.")}


@pytest.mark.slow  # importing the compiler
def test_the_names_of_a_compiled_module_are_its_own():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    want = table(module)
    module.compile()
    assert table(module) == want


def test_buffers_and_empty_modules_are_nothing():
    module = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.ReLU())
    assert split_parameters(module) == []


# Overrides and tags.


def body() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 8),
            "layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),
            "conv": nn.Conv2d(8, 8, 3, groups=8),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 3),
        }
    )


def overridden(module: nn.Module, **overrides: dict) -> dict[str, str]:
    for value in overrides.values():
        value.setdefault("lr", 0.1)
    return table(module, {"overrides": overrides})


def test_a_group_of_ones_own_by_name_pattern():
    groups = overridden(body(), deep={"parameters": ["layers.[12].weight"]})
    assert [groups[f"layers.{i}.weight"] for i in range(3)] == ["matrix", "deep", "deep"]
    assert groups["layers.1.bias"] == "vector"


def test_a_group_of_ones_own_by_module():
    groups = overridden(body(), gains={"modules": ["LayerNorm", "Embedding"]})
    assert {n for n, g in groups.items() if g == "gains"} == {
        "embed.weight", "norm.weight", "norm.bias"
    }  # fmt: skip


def test_module_classes_may_be_base_classes():
    assert overridden(body(), mine={"modules": ["_ConvNd"]})["conv.weight"] == "mine"


def test_a_standard_group_may_be_given_more():
    groups = overridden(body(), matrix={"parameters": ["head.weight", "conv.weight"]})
    assert groups["head.weight"] == groups["conv.weight"] == "matrix"
    run(configure_optimizers(body(), {"overrides": {"matrix": {"parameters": ["head.weight"]}}})[
        "optimizer"
    ])  # fmt: skip


def test_a_name_of_a_tied_parameter_may_be_any_of_its_names():
    model = GPT(tied="head last")
    assert overridden(model, mine={"parameters": ["lm_head.weight"]})["wte.weight"] == "mine"


def test_the_first_override_wins():
    both = {
        "first": {"parameters": ["layers.0.*"]},
        "second": {"parameters": ["layers.*.weight"]},
    }
    groups = overridden(body(), **both)
    assert (groups["layers.0.weight"], groups["layers.1.weight"]) == ("first", "second")


def test_a_tag_wins_over_overrides():
    module = body()
    module["layers"][0].weight.fanion_group = "mine"
    module["layers"][1].weight.fanion_group = "head"
    groups = overridden(module, deep={"parameters": ["layers.*.weight"]}, mine={})
    assert [groups[f"layers.{i}.weight"] for i in range(3)] == ["mine", "head", "deep"]


def test_reasons_say_who_decided():
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
def test_an_override_that_selects_nothing_is_refused(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_parameters(body(), {"overrides": {"mine": override}})


def test_a_vector_cannot_be_made_a_matrix():
    config = {"overrides": {"matrix": {"parameters": ["norm.weight"]}}}
    with pytest.raises(ValueError, match=r"norm.weight has shape \(8,\), which is no matrix"):
        configure_optimizers(body(), config)


# The table.


def test_the_table_has_a_line_for_each_parameter():
    module = body()
    header, *lines = str(split_parameters(module)).splitlines()
    assert header.split() == ["parameter", "shape", "group", "algorithm", "lr", "factor", "reason"]
    assert [line.split()[0] for line in lines] == [name for name, _ in module.named_parameters()]
    cells = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert cells["layers.0.weight"] == [
        "layers.0.weight", "8x8", "matrix", "muon", "0.02", "1", "weight of Linear"
    ]  # fmt: skip
    assert cells["embed.weight"][1:5] == ["9x8", "embedding", "adamw", "0.001"]


@pytest.mark.parametrize("algorithm", ["f_muon", "kyfan", "dion", "s_neon"])
def test_a_factor_that_depends_on_the_momentum_is_a_tilde(algorithm):
    options = {"algorithm": algorithm, "scale": "match_rms_adamw"}
    split = split_parameters(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), {"matrix": options})
    assert re.split(r"  +", str(split).splitlines()[1])[5] == "~"


def test_unequal_parts_have_a_factor_each():
    module = nn.Sequential(nn.Linear(4, 12, bias=False), nn.Linear(12, 3))
    split = split_parameters(module, {"matrix": {"splits": [8, 4]}})
    assert re.split(r"  +", str(split).splitlines()[1])[5] == "1.414 1"


class Everything(nn.Module):
    """One of each, nested."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {name: module for name, (module, _) in KINDS.items()}
        self.kinds = nn.ModuleDict(kinds)
        self.gpt = GPT(tied="head last")
        self.experts = nn.Parameter(torch.randn(2, 4, 6))
        self.scalar: Tensor = nn.Parameter(torch.ones(()))


def test_every_parameter_of_everything_is_in_the_optimizer_exactly_once():
    module = Everything()
    assert_complete(module, split_parameters(module))
    optimizer = configure_optimizers(module)["optimizer"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(module.parameters())
    names = {n: p for g in optimizer.param_groups
             for n, p in zip(g["param_names"], g["params"], strict=True)}  # fmt: skip
    assert all(names[name] is p for name, p in module.named_parameters())
    run(optimizer)


def test_the_table_shows_what_the_name_does_not_say():
    split = split_parameters(body(), {"matrix": {"algorithm": "muon", "alpha": 0.5}})
    assert "muon(alpha=0.5)" in str(split)
    assert "alpha" not in str(split_parameters(body(), {"matrix": {"algorithm": "f_muon"}}))

"""Which layers are output heads."""

import pytest
from torch import nn

from lit_fanions import split_parameters
from tests.optim.networks import GPT, before_a_head, table


def blocks_are_matrices(groups: dict[str, str]) -> bool:
    weights = {n: g for n, g in groups.items() if n.startswith("blocks") and "norm" not in n}
    weights = {n: g for n, g in weights.items() if "bias" not in n}
    return bool(weights) and {g.split()[0] for g in weights.values()} == {"matrix"}


@pytest.mark.parametrize("head", ["lm_head", "output", "classifier"])
@pytest.mark.parametrize("tied", ["", "head first", "head last"])
def test_language_model_has_one_head_or_a_tied_embedding(tied, head):
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
def test_hidden_layer_as_wide_as_the_vocabulary_is_no_head(tied):
    """64 x 4 = 256 is no reason to take an up-projection for an output head."""
    assert blocks_are_matrices(table(GPT(vocabulary=256, width=64, tied=tied)))


def test_number_of_positions_is_no_vocabulary():
    model = GPT(vocabulary=50, width=4)  # 16 positions, hidden layers of 16
    assert blocks_are_matrices(table(model))


def test_reason_names_the_tied_weight():
    (shared,) = (a for a in split_parameters(GPT(tied="head last")) if a.name == "wte.weight")
    assert shared.reason == "Embedding, tied to lm_head.weight"


def test_transformer_layer_of_torch_has_no_head():
    groups = table(before_a_head(body=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    want = {
        "self_attn.in_proj_weight": "matrix 3", "self_attn.out_proj.weight": "matrix",
        "linear1.weight": "matrix", "linear2.weight": "matrix", "norm1.weight": "vector",
        "self_attn.in_proj_bias": "vector",
    }  # fmt: skip
    assert want.items() <= {n.removeprefix("body."): g for n, g in groups.items()}.items()


# Heads.


def test_last_linear_is_the_head():
    groups = table(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)))
    assert (groups["0.weight"], groups["1.weight"], groups["2.weight"]) == (
        "matrix", "matrix", "head"
    )  # fmt: skip


def test_projection_of_attention_is_no_head():
    groups = table(nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2)))
    assert groups["1.out_proj.weight"] == "matrix"
    assert groups["0.weight"] == "head"  # the last Linear that is not inside attention


def test_adapter_after_the_last_layer_is_no_head():
    with pytest.warns(UserWarning, match="low-rank adapter"):
        groups = table(nn.ModuleDict({"fc": nn.Linear(8, 5), "lora_A": nn.Linear(8, 2)}))
    assert (groups["fc.weight"], groups["lora_A.weight"]) == ("head", "matrix")


class TwoLayers(nn.Module):
    """A head as RoBERTa, ELECTRA and BART have it."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(width, width), nn.Linear(width, labels)


def network(**heads: nn.Module) -> nn.Module:
    """Two blocks of width 16, followed by heads."""
    blocks = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        for _ in range(2)
    )
    return nn.ModuleDict({"embed": nn.Embedding(50, 16), "blocks": blocks, **heads})


def heads_of(module: nn.Module) -> set[str]:
    return {a.name.removesuffix(".weight") for a in split_parameters(module) if a.group == "head"}


@pytest.mark.parametrize(
    ("heads", "want"),
    [
        ({"classifier": TwoLayers(16, 3)}, {"classifier.out_proj"}),
        ({"classifier": TwoLayers(16, 16)}, {"classifier.out_proj"}),
        ({"fc": nn.Linear(16, 3)}, {"fc"}),
        ({"top": TwoLayers(16, 3)}, {"top.out_proj"}),
        ({"head": nn.Linear(16, 5), "head_dist": nn.Linear(16, 5)}, {"head", "head_dist"}),
        ({"lm_head": nn.Linear(16, 50), "mc_head": TwoLayers(16, 2)},
         {"lm_head", "mc_head.out_proj"}),
        ({"policy": nn.Linear(16, 5), "value": nn.Linear(16, 3)}, {"policy", "value"}),
        ({"pooler": nn.Linear(16, 16), "tags": nn.Linear(16, 7), "spans": nn.Linear(16, 2)},
         {"tags", "spans"}),
        ({"heads": nn.ModuleList(nn.Linear(16, 5) for _ in range(3))},
         {"heads.0", "heads.1", "heads.2"}),
        ({"classifier": nn.Conv2d(16, 5, 1)}, {"classifier"}),
        ({"classifier": nn.Sequential(nn.Dropout(), nn.Conv2d(16, 5, 1), nn.ReLU())},
         {"classifier.1"}),
        ({"conv_head": nn.Conv2d(16, 24, 1), "bn": nn.BatchNorm2d(24), "fc": nn.Linear(24, 5)},
         {"fc"}),
        ({"box_head": nn.Linear(16, 32), "box_predictor": nn.Linear(32, 12)}, {"box_predictor"}),
        ({"to_qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)}, set()),
    ],
)  # fmt: skip
def test_heads_behind_repeated_blocks(heads, want):
    assert heads_of(network(**heads)) - {"proj"} == want


def test_second_head_beside_a_tied_one_is_a_head():
    module = network(decoder=nn.Linear(16, 50, bias=False), relationship=nn.Linear(16, 2))
    module["decoder"].weight = module["embed"].weight
    assert heads_of(module) == {"relationship"}


def test_heads_of_a_convolutional_network_without_linear_layers():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16),
        nn.Conv2d(16, 10, 1),
    )  # fmt: skip
    assert heads_of(module) == {"4"}
    assert heads_of(module[:4]) == set()


def test_convolution_alone_is_no_head():
    assert heads_of(nn.Conv2d(3, 8, 3)) == set()


def test_convolution_at_the_end_is_a_head_beside_linear_layers_inside():
    squeeze = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    assert heads_of(nn.Sequential(nn.Conv2d(3, 8, 3), squeeze, nn.Conv2d(8, 10, 1))) == {"2"}


def test_convolution_before_a_flattening_layer_is_no_head():
    module = nn.Sequential(nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 10))
    assert heads_of(module) == {"2"}


def test_two_unnamed_heads_beside_each_other():
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 8)
            self.actor, self.critic = nn.Linear(8, 5), nn.Linear(8, 3)

    assert heads_of(ActorCritic()) == {"actor", "critic"}


def test_output_as_wide_as_the_input_is_a_head_beside_another():
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 8)
            self.policy, self.value = nn.Linear(8, 4), nn.Linear(8, 1)

    assert heads_of(ActorCritic()) == {"policy", "value"}


def test_last_convolution_is_a_head_beside_one_by_name():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3))
    module = nn.ModuleDict(
        {"body": body, "aux": nn.Conv2d(8, 10, 1), "final": nn.Conv2d(16, 10, 1)}
    )
    assert heads_of(module) == {"aux", "final"}


def test_layer_that_may_be_a_second_head_is_a_guess():
    module = nn.ModuleDict({"policy": nn.Linear(8, 5), "value_head": nn.Linear(8, 3)})
    with pytest.warns(UserWarning, match=r"policy.weight \(doubtful: another output head beside"):
        assert heads_of(module) == {"value_head"}


def test_backbone_without_a_head_has_none():
    assert heads_of(network(norm=nn.LayerNorm(16))) == set()


def test_last_linear_as_wide_as_the_hidden_layers_is_a_guess():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"2.weight \(doubtful: output head\?"):
        assert heads_of(module) == {"2"}


def test_projection_added_to_embeddings_is_no_head():
    module = network(per_layer=nn.Embedding(50, 24), projection=nn.Linear(16, 24),
                     lm_head=nn.Linear(16, 50))  # fmt: skip
    assert heads_of(module) == {"lm_head"}

"""What parameters of each kind of module are used as."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from lit_fanions import configure_optimizers, split_parameters
from tests.optim.networks import GPT, Raw, assert_complete, before_a_head, run, table

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
def test_parameters_of_torch_modules(kind):
    module, want = KINDS[kind]
    got = table(before_a_head(part=module))
    assert got.pop("head.weight") == "head"
    assert got == {f"part.{name}": group for name, group in want.items()}
    run(configure_optimizers(before_a_head(part=module))["optimizer"])


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
def test_subclasses_are_used_like_their_base_class(module, name, want):
    assert table(before_a_head(part=module))[f"part.{name}"] == want


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
        ("A_log", (16, 4), "other"),
        ("log_decay", (16, 4), "other"),
        ("attention_biases", (4, 16), "other"),
        ("rel_height", (31, 16), "other"),
        ("relative_k", (9, 16), "other"),
        ("rpb_table", (49, 4), "other"),
        ("latents", (8, 16), "other"),
        ("layer_scale", (2, 16), "other"),
        ("filters", (4, 3, 2, 2), "other"),
        ("q", (32, 4, 8), "matrix"),  # XLNet: a matrix whose columns are heads
    ],
)
def test_parameters_of_unknown_modules(name, shape, want):
    assert table(before_a_head(part=Raw(name, *shape)))[f"part.{name}"] == want


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
@pytest.mark.parametrize(
    "part", [lambda: nn.Linear(8, 6, bias=False), lambda: nn.Conv2d(8, 6, 3, bias=False)]
)
def test_weight_norm_makes_the_direction_a_matrix_and_the_gain_a_vector(norm, part):
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
def test_parametrised_weights_are_matrices(parametrise):
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


# Weights normalised along another dimension.


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: nn.Conv1d(16, 16, 4, groups=2), {"dim": 2}),  # Wav2Vec2, HuBERT
        (lambda: nn.Conv1d(16, 16, 4), {"dim": 2}),
        (lambda: nn.LSTM(4, 4), {"name": "weight_hh_l0", "dim": 1}),
        (lambda: nn.LSTM(4, 4), {"name": "weight_hh_l0", "dim": None}),
        (lambda: nn.MultiheadAttention(4, 1), {"name": "in_proj_weight", "dim": 1}),
    ],
)
def test_gains_of_weight_norm_are_vectors_along_any_dimension(norm, make, options):
    module = norm(make(), **options)
    split = split_parameters(before_a_head(part=module))
    gains = [a for a in split if a.name.endswith(("_g", "original0"))]
    directions = [a for a in split if a.name.endswith(("_v", "original1"))]
    assert [a.group for a in gains] == ["vector"]
    assert [a.group for a in directions] == ["matrix"]
    run(configure_optimizers(before_a_head(part=module))["optimizer"])


def test_parameters_that_only_look_like_weight_norm_are_themselves():
    module = before_a_head(part=Raw("weight_v", 4, 6))
    assert table(module)["part.weight_v"] == "matrix"


# Parameters without entries.


@pytest.mark.parametrize(
    "module", [nn.Linear(0, 5), nn.Linear(5, 0), nn.Embedding(0, 4), nn.Conv1d(0, 4, 3)]
)
def test_parameters_without_entries_are_no_matrices(module):
    network = nn.Sequential(module, nn.Linear(5, 5), nn.Linear(5, 2))
    split = split_parameters(network)
    assert split[0].group == "other" and split[0].reason.endswith("has no entries")
    assert "has no entries" in str(split)


# Weights stored in x out.


class Conv1D(nn.Module):
    """A linear layer as transformers' GPT-2 has it: x @ weight + bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Named(nn.Module):
    """A linear layer of somebody's own, with or without a bias."""

    def __init__(self, rows: int, cols: int, bias: int | None = None, **sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, cols))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias))
        vars(self).update(sizes)


@pytest.mark.parametrize(
    ("module", "want"),
    [
        (Conv1D(32, 8), "matrix transposed"),
        (Conv1D(8, 8), "matrix transposed"),
        (Named(8, 32, bias=32), "matrix transposed"),
        (Named(32, 8, bias=32), "matrix"),
        (Named(8, 32, in_features=8, out_features=32), "matrix transposed"),
        (Named(32, 8, in_features=8, out_features=32), "matrix"),
        (Named(8, 32, input_size=8, output_size=32), "matrix transposed"),
    ],
)
def test_orientation_is_read_from_the_sizes_and_the_bias(module, want):
    assert table(before_a_head(part=module))["part.weight"] == want


@pytest.mark.parametrize("scale", ["original", "spectral_unclamped", "match_rms_adamw"])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 32), (32, 8)])
def test_step_of_a_transposed_weight_equals_that_of_the_linear_layer(scale, inputs, outputs):
    linear, conv = nn.Linear(inputs, outputs), Conv1D(outputs, inputs)
    grad = torch.randn(outputs, inputs)
    steps = []
    for layer, direction in ((linear, grad), (conv, grad.T)):
        network = nn.Sequential(layer, nn.Linear(outputs, 2))
        optimizer = configure_optimizers(network, scale=scale, polar="exact")["optimizer"]
        before = layer.weight.detach().clone()
        layer.weight.grad = direction.clone()
        optimizer.step()
        steps.append(layer.weight.detach() - before)
    torch.testing.assert_close(steps[1].T, steps[0])


# Experts.


class Experts(nn.Module):
    """Stacks of expert matrices, in x out or out x in, with or without biases."""

    def __init__(self, stored: str, bias: bool = False, experts: int = 4) -> None:
        super().__init__()
        width, hidden = 16, 24
        up, down = (width, 2 * hidden), (hidden, width)
        if stored == "out x in":
            up, down = up[::-1], down[::-1]
        self.gate_up_proj = nn.Parameter(torch.randn(experts, *up))
        self.down_proj = nn.Parameter(torch.randn(experts, *down))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * hidden))
            self.down_proj_b = nn.Parameter(torch.zeros(experts, width))


@pytest.mark.parametrize("stored", ["in x out", "out x in"])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_stacks_whose_orientation_is_known(stored, bias):
    split = split_parameters(before_a_head(part=Experts(stored, bias)))
    reasons = {a.name.removeprefix("part."): (a.group, a.reason) for a in split}
    for name in ("gate_up_proj", "down_proj"):
        assert reasons[name] == ("matrix", f"stack of 4 {stored} matrices of Experts")
    if bias:
        assert reasons["gate_up_proj_bias"] == ("other", "biases of Experts")
        assert reasons["down_proj_b"] == ("other", "biases of Experts")


def test_stack_of_queries_keys_and_values_is_known_by_its_name():
    (qkv, *_) = split_parameters(before_a_head(part=Raw("qkv", 3, 6, 6)))
    assert (qkv.reason, qkv.options) == ("stack of 3 matrices of Raw", {"layout": "batch"})


def test_stack_of_unknown_orientation_is_a_guess():
    with pytest.warns(UserWarning, match="part.kernels.*overrides"):
        split = split_parameters(before_a_head(part=Raw("kernels", 3, 4, 6)))
    assert split[0].reason.startswith("doubtful: ")


def test_parameters_in_a_list_are_known_by_the_name_of_the_list():
    axes = nn.Module()  # axial positions of Reformer
    axes.weights = nn.ParameterList([torch.randn(8, 1, 8), torch.randn(9, 7, 8)])
    groups = table(before_a_head(position_embeddings=axes))
    names = [f"position_embeddings.weights.{i}" for i in range(2)]
    assert [groups[name] for name in names] == ["other", "other"]


def test_marked_parameter_of_an_unknown_module_is_no_matrix():
    module = Raw("state", 16, 4)
    module.state._no_weight_decay = True
    assert table(before_a_head(part=module))["part.state"] == "other"


def test_custom_norms_and_embeddings_are_known_by_their_class():
    norm = type("ScaledNorm", (Raw,), {})("weight", 4, 6)
    embedding = type("VocabularyEmbedding", (Raw,), {})("weight", 9, 6)
    groups = table(before_a_head(norm=norm, table=embedding))
    assert (groups["norm.weight"], groups["table.weight"]) == ("vector", "embedding")


def test_weight_that_does_not_fit_its_layer_is_a_guess():
    conv = nn.Conv1d(16, 16, 4, groups=2)
    conv.weight = nn.Parameter(torch.randn(15, 8, 4))
    with pytest.warns(UserWarning, match="15x8x4 does not fit the weight of a Conv1d"):
        assert table(before_a_head(part=conv))["part.weight"] == "other"


def test_weight_that_contradicts_its_module_is_a_guess():
    rotation = Named(2, 276, in_features=48)
    with pytest.warns(UserWarning, match="guesses"):
        assert table(before_a_head(part=rotation))["part.weight"] == "other"


def test_linear_layer_of_relative_position_biases_is_no_matrix():
    groups = table(before_a_head(rel_pos_bias=nn.Linear(32, 12), relu_bias=nn.Linear(4, 4)))
    assert (groups["rel_pos_bias.weight"], groups["relu_bias.weight"]) == ("other", "matrix")

"""Heads of attention as matrices of their own."""

import types
from typing import Any

import pytest
import torch
from torch import nn

from lit_fanions import Fanion, configure_optimizers, split_parameters
from lit_fanions.optim.matrices import from_matrices, matrix_shapes, to_matrices
from tests.matrices import gaussian, parameter64

HEADS = {"matrix": {"heads": "auto"}}


def stepped(start: torch.Tensor, algorithm: str, **options: Any) -> torch.Tensor:
    """Return a weight after two steps along itself."""
    p = nn.Parameter(start.clone())
    optimizer = Fanion([p], algorithm=algorithm, lr=0.1, scale="none", **options)
    for i in range(2):
        p.grad = gaussian(*start.shape, seed=i).double()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("algorithm", ["muon", "nsgd", "f_fanion"])
@pytest.mark.parametrize(
    ("heads", "dim", "options"),
    [
        (2, 0, {}),
        ({"count": 4}, 0, {}),
        ({"count": 3, "dim": 1}, 1, {}),
        (2, 0, {"splits": 2}),
        (2, 0, {"splits": [4, 2, 2]}),
        ({"count": 2, "dim": 1}, 0, {"layout": "transposed"}),
    ],
)
def test_heads_are_stepped_as_separate_weights(algorithm, heads, dim, options):
    start = parameter64(8, 6).detach()
    count = heads if isinstance(heads, int) else heads["count"]
    count *= 2 if options.get("splits") else 1
    whole = stepped(start, algorithm, heads=heads, polar="exact", solver="exact", **options)
    layout = {"layout": options["layout"]} if "layout" in options else {}
    for i, block in enumerate(start.chunk(count, dim)):
        p = nn.Parameter(block.clone())
        optimizer = Fanion(
            [p], algorithm=algorithm, lr=0.1, scale="none", polar="exact", solver="exact", **layout
        )
        for seed in range(2):
            p.grad = gaussian(8, 6, seed=seed).double().chunk(count, dim)[i].contiguous()
            optimizer.step()
        torch.testing.assert_close(whole.chunk(count, dim)[i], p.detach())


@pytest.mark.parametrize("layout", ["flatten", "batch", "batch_transposed", "transposed"])
def test_columns_of_every_matrix_can_be_cut_and_joined(layout):
    x = torch.arange(96.0).view(2, 4, 12) if layout.startswith("batch") else torch.randn(8, 12)
    splits = {"count": 4, "dim": 1}
    parts = to_matrices(x, layout, splits)
    assert [part.shape for part in parts] == matrix_shapes(x.shape, layout, splits)
    assert torch.equal(from_matrices(parts, x.shape, layout, splits), x)
    whole = to_matrices(x, layout)[0]
    assert torch.equal(parts[0][1], whole[0].chunk(4, -1)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "splits 3 does not divide the 8 rows"),
        ({"heads": {"count": 5, "dim": 1}}, "5 heads do not divide the columns"),
        ({"heads": {"count": 2, "dim": 1}, "splits": 2}, "by columns of a parameter with splits"),
        ({"heads": 3, "splits": [4, 4]}, "do not fall into heads"),
        ({"heads": 0}, "heads must be a number"),
        ({"heads": {"count": 2, "dim": 2}}, "heads must be a number"),
        ({"heads": {"dim": 1}}, "heads must be a number"),
        ({"heads": "all"}, "heads must be a number"),
        ({"heads": "auto"}, "needs the module"),
        ({"splits": {"count": 2}}, "splits must be"),
    ],
)
def test_impossible_heads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Fanion([parameter64(8, 6)], **options)


def attention(kind: str, **attributes: Any) -> nn.Module:
    """Return an attention of 4 heads, with keys and values of 2, of width 16."""
    module = type(kind, (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def llama() -> nn.Module:
    config = types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    shapes = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}
    layers = {name: nn.Linear(16, rows, bias=False) for name, rows in shapes.items()}
    return attention("LlamaAttention", config=config, **layers)


def fused(**layers: nn.Module) -> nn.Module:
    return attention("Attention", num_heads=4, num_key_value_heads=2, **layers)


class Conv1D(nn.Module):
    """As transformers has it: in x out."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (
            lambda: nn.MultiheadAttention(16, 4, bias=False),
            {"in_proj_weight": (12, 4, 16), "out_proj.weight": (4, 16, 4)},
        ),
        (
            lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=10, bias=False),
            {
                "q_proj_weight": (4, 4, 16), "k_proj_weight": (4, 4, 12),
                "v_proj_weight": (4, 4, 10), "out_proj.weight": (4, 16, 4),
            },
        ),
        (
            llama,
            {
                "q_proj.weight": (4, 4, 16), "k_proj.weight": (2, 4, 16),
                "v_proj.weight": (2, 4, 16), "o_proj.weight": (4, 16, 4),
            },
        ),
        (
            lambda: fused(qkv_proj=nn.Linear(16, 32), out_proj=nn.Linear(16, 16)),
            {"qkv_proj.weight": (8, 4, 16), "out_proj.weight": (4, 16, 4)},
        ),
        (
            lambda: attention("GPT2", num_heads=4, c_attn=Conv1D(48, 16), c_proj=Conv1D(16, 16)),
            {"c_attn.weight": (12, 4, 16), "c_proj.weight": (4, 16, 4)},
        ),
        # Not of attention, or without a projection of queries, or of a size that does not fit.
        (lambda: fused(out_proj=nn.Linear(16, 16)), {"out_proj.weight": (1, 16, 16)}),
        (lambda: fused(qkv=nn.Linear(16, 30)), {"qkv.weight": (1, 30, 16)}),
        (lambda: attention("Mixer", q_proj=nn.Linear(16, 16)), {"q_proj.weight": (1, 16, 16)}),
    ],
)  # fmt: skip
def test_heads_are_found_in_attention_modules(make, want):
    module = nn.ModuleDict({"body": make(), "more": nn.Linear(16, 16), "head": nn.Linear(16, 3)})
    shapes = {}
    for group in configure_optimizers(module, HEADS)["optimizer"].param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name.startswith("body") and p.ndim > 1:
                ((shape),) = matrix_shapes(p.shape, group["layout"], group["splits"])
                shapes[name.removeprefix("body.")] = tuple(shape)
    assert shapes == want


def test_heads_are_off_by_default():
    module = nn.ModuleDict({"body": nn.MultiheadAttention(16, 4), "head": nn.Linear(16, 3)})
    groups = configure_optimizers(module)["optimizer"].param_groups
    splits = {name: g["splits"] for g in groups if "splits" in g for name in g["param_names"]}
    assert splits == {"body.in_proj_weight": 3, "body.out_proj.weight": None}


def test_the_table_and_the_groups_show_heads():
    split = split_parameters(nn.ModuleDict({"body": llama(), "head": nn.Linear(16, 3)}), HEADS)
    assert [split.group_name(a) for a in split] == [
        "matrix.splits4", "matrix.splits2", "matrix.splits2", "matrix.columns4", "head", "vector",
    ]  # fmt: skip


def test_heads_of_a_checkpoint_go_on_bit_equal():
    p, q = parameter64(8, 6), parameter64(8, 6)
    first, second = (Fanion([x], heads={"count": 2, "dim": 1}, algorithm="dion") for x in (p, q))
    for i in range(4):
        p.grad = gaussian(8, 6, seed=i).double()
        first.step()
        if i == 1:
            q.data.copy_(p.data)
            second.load_state_dict(first.state_dict())
        if i > 1:
            q.grad = p.grad
            second.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("entries", [None, 0], ids=["whole", "slices"])
@pytest.mark.parametrize(
    "scale", ["original", "spectral_unclamped", "match_rms_adamw", "none"], ids=str
)
def test_heads_by_columns_step_as_far_as_the_whole_matrix(scale, entries):
    def length(heads: dict[str, int] | None) -> float:
        p = nn.Parameter(torch.zeros(24, 24, dtype=torch.float64))
        options = {"heads": heads} if heads else {}
        if entries is not None:
            options["stack_entries"] = entries
        optimizer = Fanion([p], lr=1.0, scale=scale, polar="exact", **options)
        p.grad = gaussian(24, 24).double()
        optimizer.step()
        return p.detach().norm().item()

    # Each of 6 directions of 24 x 4 has the norm 2, that of 24 x 24 has sqrt(24).
    assert length({"count": 6, "dim": 1}) == pytest.approx(length(None), rel=1e-6)


@pytest.mark.parametrize("entries", [None, 0], ids=["whole", "slices"])
def test_heads_by_columns_are_renormalised_to_the_norm_of_the_whole(entries):
    p = nn.Parameter(gaussian(24, 18).double())
    options = {} if entries is None else {"stack_entries": entries}
    heads = {"count": 6, "dim": 1}
    optimizer = Fanion([p], lr=1e-12, renormalize=True, heads=heads, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.detach().norm().item() == pytest.approx(24**0.5)


@pytest.mark.parametrize("scale", ["original", "spectral_unclamped"])
def test_the_table_shows_the_radius_of_the_whole_output_projection(scale):
    net = nn.ModuleDict({"body": llama(), "head": nn.Linear(16, 3)})
    config = {"matrix": {"heads": "auto", "scale": scale, "lr": 0.25}}
    (line,) = (x for x in str(split_parameters(net, config)).splitlines() if "o_proj" in x)
    lr_and_radius = "0.25 0.25"
    assert f"16x16: 4 of 16x4 matrix muon spectral {lr_and_radius}" in " ".join(line.split())

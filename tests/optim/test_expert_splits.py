"""Split networks of torchvision and transformers, and check them against an expert's tables.

``test_known_splits`` rebuilds such networks in plain torch; here they are the libraries' own.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision import models

from lit_fanions import split_parameters

WIDTH, INNER, STATE, STEP_RANK, EXPERTS = 16, 32, 4, 2, 4


class Experts(nn.Module):
    """A mixture of experts with a router and stacks of weights, stored out x in."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, INNER))
        self.down_bias = nn.Parameter(torch.empty(EXPERTS, WIDTH))


class Mamba(nn.Module):
    """The parameters of a selective state space layer (Mamba, arXiv 2312.00752)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, 4, groups=INNER)
        self.x_proj = nn.Linear(INNER, STEP_RANK + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(STEP_RANK, INNER)
        self.A_log = nn.Parameter(torch.empty(INNER, STATE))
        self.D = nn.Parameter(torch.empty(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)


def language_model(block: type[nn.Module]) -> nn.Module:
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(50, WIDTH),
            "blocks": nn.ModuleList([block(), block()]),
            "norm": nn.LayerNorm(WIDTH),
            "head": nn.Linear(WIDTH, 50, bias=False),
        }
    )


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=4
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# Pattern of a name -> algorithm, what is not plain of its form (layout, splits, and with heads:
# auto the heads by rows or columns), and a word of the reason. The first match counts.
Table = dict[str, tuple[str, str, str]]
LANGUAGE_MODEL: Table = {
    "embedding.weight": ("adamw", "", "Embedding"),
    "head.weight": ("adamw", "", "output head"),
}
VECTORS: Table = {r".*(bias|norm\w*\.weight|bn\d\.weight|ln_\w*\.weight|layernorm\.weight)":
                  ("adamw", "", "1-D")}  # fmt: skip
TABLES: dict[str, tuple[Callable[[], nn.Module], Table]] = {
    "resnet50": (models.resnet50, {
        r"(.*\.)?conv\d\.weight": ("muon", "", "Conv2d"),
        r".*downsample\.0\.weight": ("muon", "", "Conv2d"),
        r".*downsample\.1\.weight": ("adamw", "", "1-D"),
        r"fc\.weight": ("adamw", "", "output head"),
    }),
    "vit_b_16": (models.vit_b_16, {
        "class_token": ("adamw", "", "vector"),
        r"encoder\.pos_embedding": ("adamw", "", "broadcast"),
        r"conv_proj\.weight": ("muon", "", "Conv2d"),
        r".*in_proj_weight": ("muon", "splits 3 heads 12x0", "q, k, v"),
        r".*out_proj\.weight": ("muon", "heads 12x1", "Linear"),
        r".*mlp\.[03]\.weight": ("muon", "", "Linear"),
        r"encoder\.ln\.weight": ("adamw", "", "1-D"),
        r"heads\.head\.weight": ("adamw", "", "output head"),
    }),
    "swin_t": (models.swin_t, {
        r"features\.0\.0\.weight": ("muon", "", "Conv2d"),
        r"features\.0\.2\.weight": ("adamw", "", "1-D"),
        r".*relative_position_bias_table": ("adamw", "", "biases"),
        r"features\.1.*qkv\.weight": ("muon", "heads 9x0", "Linear"),
        r"features\.1.*attn\.proj\.weight": ("muon", "heads 3x1", "Linear"),
        r".*qkv\.weight": ("muon", "heads *x0", "Linear"),
        r".*attn\.proj\.weight": ("muon", "heads *x1", "Linear"),
        r".*(mlp\.[03]|reduction)\.weight": ("muon", "", "Linear"),
        r"head\.weight": ("adamw", "", "output head"),
    }),
    "convnext_tiny": (models.convnext_tiny, {
        r"features\.(0\.0|[246]\.1)\.weight": ("muon", "", "Conv2d"),
        r"features\.(0\.1|[246]\.0)\.weight": ("adamw", "", "1-D"),
        r".*layer_scale": ("adamw", "", "vector"),
        r".*block\.0\.weight": ("adamw", "", "depthwise"),
        r".*block\.2\.weight": ("adamw", "", "1-D"),
        r".*block\.[35]\.weight": ("muon", "", "Linear"),
        r"classifier\.0\.weight": ("adamw", "", "1-D"),
        r"classifier\.2\.weight": ("adamw", "", "output head"),
    }),
    "GPT-2": (gpt2, {
        r"transformer\.wte\.weight": ("adamw", "", "tied to lm_head"),
        r"transformer\.wpe\.weight": ("adamw", "", "Embedding"),
        r".*attn\.c_attn\.weight": ("muon", "transposed heads 12x0", "in x out"),
        r".*attn\.c_proj\.weight": ("muon", "transposed heads 4x1", "in x out"),
        r".*mlp\.c_(fc|proj)\.weight": ("muon", "transposed", "in x out"),
    }),
    "Llama": (llama, {
        r"model\.embed_tokens\.weight": ("adamw", "", "Embedding"),
        r".*q_proj\.weight": ("muon", "heads 4x0", "Linear"),
        r".*[kv]_proj\.weight": ("muon", "heads 2x0", "Linear"),
        r".*o_proj\.weight": ("muon", "heads 4x1", "Linear"),
        r".*(gate|up|down)_proj\.weight": ("muon", "", "Linear"),
        r"lm_head\.weight": ("adamw", "", "output head"),
    }),
    "mixture of experts": (lambda: language_model(Experts), {
        **LANGUAGE_MODEL,
        r".*router\.weight": ("muon", "", "Linear"),
        r".*\.up": ("muon", "batch", "stack of 4"),
        r".*\.down": ("muon", "batch", "stack of 4"),
        r".*\.down_bias": ("adamw", "", "biases"),
    }),
    "Mamba": (lambda: language_model(Mamba), {
        **LANGUAGE_MODEL,
        r".*(in|x|dt|out)_proj\.weight": ("muon", "", "Linear"),
        r".*conv1d\.weight": ("adamw", "", "depthwise"),
        r".*A_log": ("adamw", "", "logarithms"),
        r".*\.D": ("adamw", "", "1-D"),
    }),
}  # fmt: skip


@pytest.mark.filterwarnings("error:the groups of")  # no guesses
@pytest.mark.parametrize("network", TABLES)
def test_network_is_split_as_an_expert_would(network):
    build, table = TABLES[network]
    with torch.device("meta"):
        module = build()
    table, used = {**table, **VECTORS}, set()
    split = split_parameters(module)
    for a in split:
        pattern = next(p for p in table if re.fullmatch(p, a.name))
        used.add(pattern)
        algorithm, form, reason = table[pattern]
        words = [] if a.options.get("layout", "flatten") == "flatten" else [a.options["layout"]]
        words += [f"splits {a.options['splits']}"] if "splits" in a.options else []
        if heads := a.options.get("heads"):
            words.append(f"heads {'*' if '*' in form else heads['count']}x{heads['dim']}")
        got = split.group_options(a)["algorithm"], " ".join(words)
        assert got == (algorithm, form), (a.name, a.reason)
        assert reason in a.reason, a.name
    assert used >= table.keys() - VECTORS.keys(), "a pattern matches nothing"

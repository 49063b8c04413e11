"""Networks, and how they are split, for the tests of the split."""

import torch
from torch import nn

from lit_fanions import Fanion, split_parameters


def table(module: nn.Module, config: dict | None = None) -> dict[str, str]:
    """Return the group of each parameter, with layout and splits unless they are the default."""
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
    """Return the modules, followed by a classifier, which is no matrix."""
    return nn.ModuleDict({**modules, "head": nn.Linear(4, 3, bias=False)})


def run(optimizer: Fanion) -> None:
    """Step once on random gradients, and assert that all weights stay finite."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for g in optimizer.param_groups for p in g["params"])


class Raw(nn.Module):
    """A module that holds a parameter of its own."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


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


def small_network() -> nn.Module:
    """A layer of each kind, for every standard group."""
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 8),
            "conv": nn.Conv2d(4, 8, 3),
            "body": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 3),
        }
    )

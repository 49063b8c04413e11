"""A small language model trains as well with every polar method as with the exact factor."""

from pydoc_data.topics import topics
from statistics import fmean
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from lit_fanions import Fanion, lmo, norms
from tests.matrices import with_spectrum

pytestmark = pytest.mark.slow

WIDTH, LAYERS, HEADS, CONTEXT = 128, 3, 4, 32
BATCH, STEPS = 4, 100
SEEDS = (0, 1)
# With other initial weights, on the same text, the exact factor ends elsewhere: over six of them
# the standard deviation of the mean final loss was .007, that of a difference of two thus .010.
# This is three of the latter. Measured: the methods end .001 (convergent) to .004 (quintic) above
# the exact factor, the one by an eigendecomposition of the Gram matrix .165 above it.
NOISE = 0.03


class Block(nn.Module):
    """Attention and a perceptron, each matrix a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.norms
        heads = (layer(before(x)).unflatten(-1, (HEADS, -1)) for layer in self.qkv)
        q, k, v = (part.transpose(1, 2) for part in heads)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(after(x))))


class GPT(nn.Module):
    """A language model of ASCII characters."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)

    def loss(self, text: Tensor) -> Tensor:
        x = self.blocks(self.token(text[:, :-1]) + self.position.weight)
        return cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor]:
    """Python's own documentation, to train on and to test with."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    text = torch.tensor(list(text))
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def sample(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    start = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[start + torch.arange(CONTEXT + 1)]


def final_loss(method: str, texts: tuple[Tensor, Tensor]) -> float:
    """The mean over the seeds of the loss on text that was not trained on."""
    losses = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = GPT()
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        optimizer = Fanion(
            [
                # The smaller the momentum, the fewer gradients it is of and the smaller its last
                # singular values, on which methods differ.
                {"params": matrices, "lr": 0.02, "momentum": 0.5, "polar": method},
                {"params": rest, "algorithm": "adamw", "lr": 3e-3},
            ]
        )
        for _ in range(STEPS):
            optimizer.zero_grad()
            model.loss(sample(texts[0], BATCH, generator)).backward()
            optimizer.step()
        with torch.no_grad():
            held_out = sample(texts[1], 256, torch.Generator().manual_seed(99))
            losses.append(model.loss(held_out).item())
    return fmean(losses)


@pytest.fixture(scope="module")
def exact_loss(texts) -> float:
    return final_loss("exact", texts)


@pytest.mark.parametrize("method", [m for m in get_args(lmo.PolarMethod) if m != "exact"])
def test_every_polar_method_trains_like_the_exact_one(method, texts, exact_loss):
    assert abs(final_loss(method, texts) - exact_loss) < NOISE


def test_a_factor_that_loses_small_singular_values_does_not(texts, exact_loss, monkeypatch):
    def by_gram_matrix(self: norms.Norm, m: Tensor) -> Tensor:
        x = m.float() if m.shape[-2] >= m.shape[-1] else m.float().mT
        squares, v = torch.linalg.eigh(x.mT @ x)
        d = x @ (v * squares.clamp(min=1e-12).rsqrt().unsqueeze(-2)) @ v.mT
        return d if m.shape[-2] >= m.shape[-1] else d.mT

    m = with_spectrum(torch.linspace(1, 0.1, 30), 30, 40)
    wanted = norms.Spectral().lmo(m)
    monkeypatch.setattr(norms.Spectral, "lmo", by_gram_matrix)
    # It is one of these factors, as far as float32 goes.
    torch.testing.assert_close(lmo.polar(m, method="exact"), wanted, rtol=0, atol=1e-4)
    assert final_loss("exact", texts) - exact_loss > NOISE

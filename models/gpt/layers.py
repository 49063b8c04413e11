"""The layers of a GPT: rotary positions, attention with a cache, MLP, norm, block."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.gpt.config import GPTConfig
from models.gpt.masks import attend

ROTARY_BASE = 1024


def rotations(positions: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each pair of features' angle, 0 for the second half of the pairs.

    Both are (length, head_width / 2) in float32: bfloat16 could not tell far positions apart.
    """
    exponents = torch.linspace(0, 1, head_width // 4, device=positions.device)
    angles = positions[:, None] * torch.pow(1 / ROTARY_BASE, exponents)
    angles = F.pad(angles, (0, head_width // 2 - len(exponents)))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of features, one of each half: (..., length, features), see ``rotations``."""
    first, second = x.float().chunk(2, -1)
    rotated = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    return rotated.type_as(x)


class KVCache:
    """Keys and values of earlier tokens, so that generating computes the new tokens alone.

    Args:
        config: Shape of the network.
        like: A weight of the network, whose device and, without autocast, dtype the cache has.
        batch: Number of texts.
        length: Largest number of tokens of a text.
    """

    def __init__(self, config: GPTConfig, like: Tensor, batch: int, length: int) -> None:
        device = like.device
        mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else like.dtype
        shape = (config.layers, batch, config.head_count, length, config.head_width)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.tokens = torch.empty(batch, 0, dtype=torch.long, device=device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of the newest tokens; return those of all tokens."""
        end = self.tokens.shape[1]
        self.keys[layer, :, :, end - k.shape[2] : end] = k
        self.values[layer, :, :, end - v.shape[2] : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with normalised, then rotated queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.head_count, config.attention_scale
        width = config.width
        self.qkv: nn.Parameter | None = None
        if config.merged_qkv:
            self.qkv = nn.Parameter(torch.empty(3, width, width))
            self.qkv_bias = nn.Parameter(torch.zeros(3 * width)) if config.biases else None
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=config.biases) for _ in range(3))
        self.proj = nn.Linear(width, width, bias=config.biases)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        value_embedding: Tensor | None = None,
        value_weights: Tensor | None = None,
        extend_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Return the attention output of tokens, of the shape of x.

        Args:
            x: Input, already normalised, (batch, length, width).
            rotation: See ``rotations``.
            mask: See ``attend``.
            value_embedding: Embedding that is added to the values, of the shape of x.
            value_weights: Weights of the values and of the value embedding, (2,).
            extend_cache: ``KVCache.extend`` for this layer: stores the new keys and values and
                returns all, those of earlier tokens included.
        """
        if self.qkv is not None:
            q, k, v = F.linear(x, self.qkv.flatten(0, 1), self.qkv_bias).chunk(3, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        if value_weights is not None:
            v = value_weights[0].type_as(v) * v
            if value_embedding is not None:
                v = v + (value_weights[1] * value_embedding).type_as(v)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = (rotate(F.rms_norm(y, y.shape[-1:]), *rotation).type_as(v) for y in (q, k))
        if extend_cache is not None:
            k, v = extend_cache(k, v)
        return self.proj(attend(q, k, v, mask, self.scale).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a squared rectifier between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, config.hidden_width, bias=config.biases)
        self.proj = nn.Linear(config.hidden_width, config.width, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return self.proj(F.relu(self.fc(x)).square())


class Norm(nn.RMSNorm):
    """An RMS norm over the width that returns its input's dtype, whatever dtype its gains have."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.width, elementwise_affine=config.norm_gains)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        gains = None if self.weight is None else self.weight.type_as(x)
        # CUDA's autocast computes norms in float32; the residual stream stays in x's dtype.
        return F.rms_norm(x, self.normalized_shape, gains).type_as(x)


class Block(nn.Module):
    """Attention, unless the layer is without, and an MLP, each added to its input."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention: Attention | None = None
        if layer not in config.layers_without_attention:
            self.attention_norm, self.attention = Norm(config), Attention(config)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Map (batch, length, width) to the same shape; ``args`` are those of ``Attention``."""
        if self.attention is not None:
            x = x + self.attention(self.attention_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))

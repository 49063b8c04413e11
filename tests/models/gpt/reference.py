"""Small GPTs, and a second implementation of the network in plain loops."""

import dataclasses
import math

import torch

from models.gpt import (
    GPT,
    GPTConfig,
)

BOS = 16


SMALL = {"vocab_size": 17, "layers": 4, "width": 16, "heads": 2, "mlp_width": 24, "bos": BOS}


SHAPES = {
    "track3": dataclasses.replace(
        GPTConfig.track3(), **SMALL, context_length=400, embedding_dtype="float32"
    ),
    "speedrun": dataclasses.replace(
        GPTConfig.speedrun(),
        **SMALL,
        context_length=400,
        value_embeddings=1,
        layers_without_attention=(2,),
        long_window_layers=(0, 3),
        window=300,
        embedding_dtype="float32",
    ),
}


def texts(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(0, BOS, (batch, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOS
    for row in range(batch):
        tokens[row, 40 + 90 * row :: 110] = BOS
    return tokens


def allowed(tokens: list[int], query: int, key: int, window: int | None, by_document: bool) -> bool:
    """Return whether a query attends to a key, by the words of the definition."""
    if key > query:
        return False
    if by_document and BOS in tokens[key + 1 : query + 1]:
        return False
    return window is None or query // 128 - key // 128 < window


def brute_force_mask(tokens: torch.Tensor, window: int | None, by_document: bool) -> torch.Tensor:
    n = tokens.shape[1]
    rows = [
        [[allowed(row, q, k, window, by_document) for k in range(n)] for q in range(n)]
        for row in tokens.tolist()
    ]
    return torch.tensor(rows)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate the features of one head, (length, features), one pair at a time."""
    out, (length, size) = torch.empty_like(x), x.shape
    for position in range(length):
        for i in range(size // 2):
            turning = size // 4
            speed = 1024 ** -(i / (turning - 1)) if i < turning else 0.0
            cos, sin = math.cos(position * speed), math.sin(position * speed)
            a, b = x[position, i], x[position, i + size // 2]
            out[position, i] = a * cos + b * sin
            out[position, i + size // 2] = -a * sin + b * cos
    return out


def plain_logits(network: GPT, tokens: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
    """Return the logits of one sequence (length,), in the order of the published description."""
    c = network.config
    weights = dict(network.named_parameters())
    size = c.width // c.heads

    def norm(x: torch.Tensor, name: str = "") -> torch.Tensor:
        eps = torch.finfo(torch.float32).eps
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * weights[name] if name in weights else x

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    extra = [weights[f"value_embeddings.{i}.weight"][tokens] for i in range(c.value_embeddings)]
    values = [*extra, *[None] * (c.layers - 2 * len(extra)), *extra]
    x = x0 = norm(weights["embedding.weight"][tokens], "embedding_norm.weight")
    stack = []
    for layer in range(c.layers):
        if c.unet_skips and layer >= c.layers // 2:
            x = x + weights["scalars"][layer - c.layers // 2] * stack.pop()
        if c.embedding_skips:
            first, second = weights["scalars"][c.layers + 2 * layer :][:2]
            x = first * x + second * x0
        block = f"blocks.{layer}"
        if layer not in c.layers_without_attention:
            y = norm(x, f"{block}.attention_norm.weight")
            if c.merged_qkv:
                q, k, v = (y @ w.T for w in weights[f"{block}.attention.qkv"])
            else:
                q, k, v = (linear(y, f"{block}.attention.{part}") for part in "qkv")
            if c.value_embeddings:
                own, added = weights["scalars"][3 * c.layers + 2 * layer :][:2]
                v = own * v + (0 if values[layer] is None else added * values[layer])
            window = None
            if c.window is not None:
                blocks = math.ceil(c.window * progress / 128)
                window = max(1, blocks if layer in c.long_window_layers else blocks // 2)
            mask = brute_force_mask(tokens[None], window, c.document_mask)[0]
            heads = []
            for h in range(c.heads):
                part = slice(h * size, (h + 1) * size)
                scores = rotated(norm(q[:, part])) @ rotated(norm(k[:, part])).T
                scores = (scores * c.attention_scale).masked_fill(~mask, -math.inf)
                heads.append(scores.softmax(-1) @ v[:, part])
            x = x + linear(torch.cat(heads, -1), f"{block}.attention.proj")
        y = norm(x, f"{block}.mlp_norm.weight")
        x = x + linear(linear(y, f"{block}.mlp.fc").clamp(min=0) ** 2, f"{block}.mlp.proj")
        if c.unet_skips and layer < c.layers // 2:
            stack.append(x)
    z = linear(norm(x, "final_norm.weight"), "head")
    if c.softcap == "sqrt":
        return 15 * z / (z**2 + 225).sqrt()
    return 30 * torch.sigmoid(z / (7.5 * c.width**0.5))

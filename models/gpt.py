"""A GPT of two flavours: modded-nanogpt's fixed benchmark network and its speedrun network.

Both are decoder-only transformers with RMS norms, normalised queries and keys, half-truncated
rotary positions, squared rectifiers and capped logits; ``GPTConfig.track3`` and
``GPTConfig.speedrun`` are the two published networks. After Keller Jordan and others,
https://github.com/KellerJordan/modded-nanogpt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

Softcap = Literal["none", "sqrt", "sigmoid"]
Init = Literal["normal", "uniform"]
EmbeddingDtype = Literal["float32", "bfloat16"]

WINDOW_BLOCK = 128  # windows count in blocks of so many tokens, the block of FlexAttention
LARGEST_MASK = 2**31  # entries of a byte
ROTARY_BASE = 1024
IGNORED = -100  # a target that does not count


@dataclass(frozen=True)
class GPTConfig:
    """The network. The defaults are modded-nanogpt's optimizer benchmark ("track 3"), in float32.

    Args:
        vocab_size: Rows of the embedding and of the head; may exceed the tokenizer's vocabulary.
        context_length: Most tokens that a generated text may have, its prompt included.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Attention heads; width / heads must be a multiple of 4.
        mlp_width: Hidden features of the MLPs.
        biases: Whether the linear layers have biases, zero at the start.
        norm_gains: Whether the norms have gains, one at the start.
        merged_qkv: Keep query, key and value weights as one parameter (3, width, width).
        attention_scale: Factor on the attention scores. None: 1 / sqrt(width / heads).
        layers_without_attention: Blocks (from 0) that have only an MLP.
        softcap: How logits z are capped with c = softcap_limit: sqrt: c z / sqrt(z^2 + c^2);
            sigmoid: c sigmoid(z / (7.5 sqrt(width))); none.
        softcap_limit: That c.
        value_embeddings: Tables of token embeddings that are added to the values of the first so
            many layers and, again, of the last.
        unet_skips: Add the outputs of the first half's blocks, weighted, before the second half's.
        embedding_skips: Mix the embedding, weighted, into the input of every block.
        document_mask: Let tokens see their own document only; it starts with ``bos``.
        bos: The token that starts a document.
        window: Tokens back that attention reaches, in whole blocks of 128; it grows over the
            training from one block to this. None: everything.
        long_window_layers: Blocks with that window; the others have half of it.
        init: Distribution of the weights; output projections and head start at 0, embeddings from
            N(0, 1).
        init_gain: Their standard deviation times sqrt(fan_in).
        embedding_dtype: Of the embeddings' parameters.
    """

    vocab_size: int = 50304
    context_length: int = 1024
    layers: int = 12
    width: int = 768
    heads: int = 6
    mlp_width: int = 3072
    biases: bool = True
    norm_gains: bool = True
    merged_qkv: bool = False
    attention_scale: float | None = 0.12
    layers_without_attention: tuple[int, ...] = ()
    softcap: Softcap = "sqrt"
    softcap_limit: float = 15.0
    value_embeddings: int = 0
    unet_skips: bool = False
    embedding_skips: bool = False
    document_mask: bool = False
    bos: int = 50256
    window: int | None = None
    long_window_layers: tuple[int, ...] = ()
    init: Init = "normal"
    init_gain: float = 0.33**0.5
    embedding_dtype: EmbeddingDtype = "float32"

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name in ("vocab_size", "context_length", "layers", "width", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width={self.width} with heads={self.heads}: the width must be a multiple of "
                f"4 heads, {4 * self.heads}"
            )
        for name in ("layers_without_attention", "long_window_layers"):
            wrong = [i for i in getattr(self, name) if not 0 <= i < self.layers]
            if wrong:
                raise ValueError(
                    f"{name}: there is no block {wrong[0]}, choose from 0 to {self.layers - 1}"
                )
        if not 0 <= 2 * self.value_embeddings <= self.layers:
            raise ValueError(
                f"value_embeddings={self.value_embeddings}: choose 0 to {self.layers // 2}, half "
                "of the layers"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: give a number of tokens, or null for all")
        if self.document_mask and not 0 <= self.bos < self.vocab_size:
            raise ValueError(
                f"bos={self.bos}: it is not in the vocabulary of {self.vocab_size} tokens"
            )
        if self.softcap != "none" and self.softcap_limit <= 0:
            raise ValueError(f"softcap_limit={self.softcap_limit}: it must be positive")
        for name, choices in (("softcap", Softcap), ("init", Init)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}"
                )
        if self.embedding_dtype not in get_args(EmbeddingDtype):
            raise ValueError(
                f"embedding_dtype={self.embedding_dtype!r}: choose float32 or bfloat16"
            )

    @classmethod
    def track3(cls) -> "GPTConfig":
        """modded-nanogpt's records/track_3_optimization: 162,354,816 parameters."""
        return cls(embedding_dtype="bfloat16")

    @classmethod
    def speedrun(cls) -> "GPTConfig":
        """modded-nanogpt's track 1 of 2025-07-12 (BosAlign): 275,742,784 parameters."""
        return cls(
            context_length=48 * 1024,
            biases=False,
            norm_gains=False,
            merged_qkv=True,
            layers_without_attention=(7,),
            softcap="sigmoid",
            softcap_limit=30.0,
            value_embeddings=3,
            unet_skips=True,
            embedding_skips=True,
            document_mask=True,
            window=1728,
            long_window_layers=(0, 4, 11),
            init="uniform",
            init_gain=0.5,
            embedding_dtype="bfloat16",
        )

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads


# --- who sees whom ---


def documents(tokens: Tensor, bos: int) -> Tensor:
    """Number the documents of each sequence: (..., length) -> int64 (..., length)."""
    return (tokens == bos).cumsum(-1)


def visible(
    query: Tensor,
    key: Tensor,
    query_document: Tensor | int,
    key_document: Tensor | int,
    window: Tensor | int | None,
) -> Tensor:
    """Whether a token sees another: not after it, in its document, within the window.

    Args:
        query: Position of the token that looks.
        key: Position of the token that is looked at.
        query_document: Its document's number.
        key_document: Likewise.
        window: Blocks of 128 tokens that it reaches back, its own included; None: all.

    Returns:
        bool, the arguments broadcast.
    """
    seen = (key <= query) & (query_document == key_document)
    if window is None:
        return seen
    return seen & (query // WINDOW_BLOCK - key // WINDOW_BLOCK < window)


def dense_mask(document: Tensor, window: Tensor | int | None, queries: int | None = None) -> Tensor:
    """The whole mask, for scaled_dot_product_attention.

    Args:
        document: Number of each token's document, int64 (batch, keys).
        window: See ``visible``.
        queries: The last so many tokens look; None: all.

    Returns:
        bool (batch, 1, queries, keys).
    """
    position = torch.arange(document.shape[-1], device=document.device)
    first = 0 if queries is None else document.shape[-1] - queries
    mask = visible(
        position[first:, None], position, document[:, first:, None], document[:, None], window
    )
    return mask.unsqueeze(1)


def block_mask(document: Tensor, window: Tensor | int | None) -> BlockMask:
    """The same mask for FlexAttention, from the first and last document of each block alone.

    Args:
        document: int64 (batch, length), the length a multiple of 128.
        window: See ``visible``.
    """
    blocks = document.unflatten(-1, (-1, WINDOW_BLOCK))
    low, high = blocks[..., 0], blocks[..., -1]  # documents are numbered in order
    index = torch.arange(blocks.shape[-2], device=document.device)
    q, k = index[:, None], index
    some = (k <= q) & (low[..., :, None] <= high[..., None, :])
    some &= low[..., None, :] <= high[..., :, None]
    every = (k < q) & (low[..., :, None] == high[..., None, :])
    every &= low[..., None, :] == high[..., :, None]
    if window is not None:
        some, every = some & (q - k < window), every & (q - k < window)

    def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
        order = mask.int().argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(query, key, document[batch, query], document[batch, key], window)

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=WINDOW_BLOCK, mask_mod=seen
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)  # uncompiled it makes the whole matrix of scores


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, scale: float | None
) -> Tensor:
    """Attention of (batch, heads, queries, features) to (batch, heads, keys, features).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Who sees whom; None: every query the keys up to its own place.
        scale: Factor on the scores. None: 1 / sqrt(features).

    Returns:
        Of the shape of q.
    """
    if isinstance(mask, BlockMask):
        return _compiled_flex()(q, k, v, block_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )


# --- layers ---


def rotations(positions: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each pair of features; the second half of them stands still.

    Args:
        positions: int64 (length,).
        head_width: Features of a head.

    Returns:
        float32 (length, head_width / 2) each; in bfloat16 far positions would be one.
    """
    exponents = torch.linspace(0, 1, head_width // 4, device=positions.device)
    angles = positions[:, None] * torch.pow(1 / ROTARY_BASE, exponents)
    angles = F.pad(angles, (0, head_width // 2 - len(exponents)))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features, one of each half: (..., length, features), see ``rotations``."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    return turned.type_as(x)


class Cache:
    """Keys and values of the tokens so far, so that a longer text costs its new tokens only.

    Args:
        network: Whose.
        batch: Number of texts.
        length: Most tokens they will have.
    """

    def __init__(self, network: "GPT", batch: int, length: int) -> None:
        config, device = network.config, network.head.weight.device
        mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else network.head.weight.dtype
        shape = (config.layers, batch, config.heads, length, config.head_width)
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
        self.heads, self.scale = config.heads, config.attention_scale
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
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Mix the tokens of (batch, length, width).

        Args:
            x: Input, already normalised.
            rotation: See ``rotations``.
            mask: See ``attend``.
            value_embedding: What is mixed into the values, of the shape of x.
            value_weights: Weights of the values and of what is mixed in, (2,).
            remember: Takes the keys and values, returns those of earlier tokens with them.
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
        if remember is not None:
            k, v = remember(k, v)
        return self.proj(attend(q, k, v, mask, self.scale).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a squared rectifier between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, config.mlp_width, bias=config.biases)
        self.proj = nn.Linear(config.mlp_width, config.width, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x, (..., width)."""
        return self.proj(F.relu(self.fc(x)).square())


class Norm(nn.RMSNorm):
    """An RMS norm over the width, in the dtype of its input whatever its gains have."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.width, elementwise_affine=config.norm_gains)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x, (..., width)."""
        gains = None if self.weight is None else self.weight.type_as(x)
        return F.rms_norm(x, self.normalized_shape, gains).type_as(x)  # CUDA's autocast: float32


class Block(nn.Module):
    """Attention, where the layer has it, and an MLP, each added to its input."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention: Attention | None = None
        if layer not in config.layers_without_attention:
            self.attention_norm, self.attention = Norm(config), Attention(config)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """(batch, length, width) to the same; the rest is for ``Attention``."""
        if self.attention is not None:
            x = x + self.attention(self.attention_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The network of a ``GPTConfig``.

    Args:
        config: Its shape.
        activation_checkpointing: Keep the blocks' inputs only and compute the rest again in the
            backward pass.
        logits_chunk: Compute the losses of so many tokens at a time, and their logits again in the
            backward pass; None: of all at once.
    """

    def __init__(
        self,
        config: GPTConfig,
        activation_checkpointing: bool = False,
        logits_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if logits_chunk is not None and logits_chunk < 1:
            raise ValueError(f"logits_chunk={logits_chunk}: give a number of tokens, or null")
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.logits_chunk = logits_chunk
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.value_embeddings = nn.ModuleList(
            nn.Embedding(config.vocab_size, config.width) for _ in range(config.value_embeddings)
        )
        self.embedding_norm = Norm(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.final_norm = Norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=config.biases)
        self.scalars: nn.Parameter | None = None
        if config.unet_skips or config.embedding_skips or config.value_embeddings:
            self.scalars = nn.Parameter(torch.empty(-(-5 * config.layers // 8) * 8))
        matrices = [p for n, p in self.named_parameters() if p.ndim > 1 and "embedding" not in n]
        self._matrix_entries = sum(p.numel() for p in matrices)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: see ``GPTConfig.init``."""
        config = self.config
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            elif "embedding" in name:
                parameter.normal_()
            elif name.endswith("bias") or name.startswith("head.") or ".proj." in name:
                parameter.zero_()
            elif parameter.ndim > 1:
                std = config.init_gain / parameter.shape[-1] ** 0.5
                if config.init == "normal":
                    parameter.normal_(std=std)
                else:
                    parameter.uniform_(-(3**0.5) * std, 3**0.5 * std)
        if self.scalars is not None:
            # As the published runs have them in one vector, whose length 8 devices can share:
            # skips, (stream, embedding) and (values, value embedding) of each layer.
            n = config.layers
            self.scalars.fill_(1)
            self.scalars[n : 3 * n].view(n, 2)[:, 1] = 0
            self.scalars[3 * n : 5 * n] = 0.5
        for table in (self.embedding, *self.value_embeddings):
            table.to(getattr(torch, config.embedding_dtype))

    def windows(self, progress: float = 1.0) -> Tensor | None:
        """Blocks that attention reaches back, of layers with long and with short windows.

        Args:
            progress: Done part of the training, over which the windows grow.

        Returns:
            int64 (2,) on the network's device, or None without windows.
        """
        if self.config.window is None:
            return None
        blocks = math.ceil(self.config.window * progress / WINDOW_BLOCK)
        windows = torch.tensor([max(1, blocks), max(1, blocks // 2)])
        return windows.to(self.head.weight.device, non_blocking=True)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        windows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits, or the losses of targets.

        Args:
            tokens: int64 (batch, length); with a cache those that it does not have yet.
            targets: The token after each, int64 (batch, length); -100 does not count.
            windows: See ``windows``; None: those at the end of the training.
            cache: Keys and values of earlier tokens; it is extended.

        Returns:
            With targets their cross entropies in nats, float32 (batch, length), 0 where they do not
            count; otherwise logits, float32 (batch, length, vocab_size), with a cache those of the
            last token only, (batch, 1, vocab_size).
        """
        features = self._features(tokens, windows, cache)
        if targets is not None:
            return self._losses(features.flatten(0, 1), targets.flatten()).view_as(targets)
        return self._logits(features if cache is None else features[:, -1:])

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue texts.

        Args:
            prompt: int64 (batch, length), at least one token each.
            count: Number of tokens to add.
            temperature: Divides the logits; 0: always the likeliest token.
            top_k: Draw from the so many likeliest tokens; None: from all.
            vocab_size: Draw from the first so many tokens; None: from all.
            generator: Of the random numbers, on the CPU.

        Returns:
            int64 (batch, length + count).

        Raises:
            ValueError: If the prompt is empty or the text would exceed the context.
        """
        length = prompt.shape[1]
        if not length:
            raise ValueError("the prompt is empty: give at least one token")
        if length + count > self.config.context_length:
            raise ValueError(
                f"a prompt of {length} tokens and {count} more exceed the context of "
                f"{self.config.context_length}: shorten the prompt or generate fewer"
            )
        cache, text, new = Cache(self, len(prompt), length + count), prompt, prompt
        for _ in range(count):
            logits = self(new, cache=cache)[:, -1, :vocab_size]
            new = _drawn(logits, temperature, top_k, generator)
            text = torch.cat([text, new], 1)
        return text

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of a token's forward pass in sequences of a length.

        Two per weight of a matrix, and 4 x width per visible token and attention layer; the causal
        half is not discounted (PaLM, arXiv:2204.02311, appendix B), the windows at the end of the
        training are.
        """
        reach = {True: length, False: length}
        if self.config.window is not None:
            blocks = math.ceil(self.config.window / WINDOW_BLOCK)
            for long in reach:
                reach[long] = min(length, WINDOW_BLOCK * max(1, blocks if long else blocks // 2))
        seen = sum(
            reach[i in self.config.long_window_layers]
            for i, block in enumerate(self.blocks)
            if block.attention is not None
        )
        return 2 * self._matrix_entries + 4 * self.config.width * seen

    # -- private --

    def _features(self, tokens: Tensor, windows: Tensor | None, cache: Cache | None) -> Tensor:
        """What the head turns into logits: (batch, length) -> (batch, length, width)."""
        config, length = self.config, tokens.shape[1]
        if cache is not None:
            cache.tokens = torch.cat([cache.tokens, tokens], 1)
        everything = tokens if cache is None else cache.tokens
        first = everything.shape[1] - length
        position = torch.arange(first, first + length, device=tokens.device)
        rotation = rotations(position, config.head_width)
        windows = self.windows() if windows is None else windows
        masks = self._masks(everything, length, windows, flex=cache is None)

        x = self.embedding(tokens)
        if not torch.is_autocast_enabled(tokens.device.type):
            x = x.type_as(self.head.weight)  # of bfloat16 embeddings
        x = x0 = self.embedding_norm(x)
        extra = [table(tokens) for table in self.value_embeddings]
        middle = [None] * (config.layers - 2 * len(extra))
        values: Sequence[Tensor | None] = [*extra, *middle, *extra]
        skips, mixes, value_weights = self._scalars()
        kept: list[Tensor] = []
        half = config.layers // 2
        for i, block in enumerate(self.blocks):
            if config.unet_skips and i >= config.layers - half:
                x = x + skips[i - (config.layers - half)].type_as(x) * kept.pop()
            if config.embedding_skips:
                x = mixes[i, 0].type_as(x) * x + mixes[i, 1].type_as(x) * x0
            mask = masks[i in config.long_window_layers]
            weights = value_weights[i] if extra else None
            remember = None if cache is None else partial(cache.extend, i)
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, mask, values[i], weights, use_reentrant=False)
            else:
                x = block(x, rotation, mask, values[i], weights, remember)
            if config.unet_skips and i < half:
                kept.append(x)
        return self.final_norm(x)

    def _logits(self, features: Tensor) -> Tensor:
        """Capped: (..., width) -> float32 (..., vocab_size)."""
        z, limit = self.head(features).float(), self.config.softcap_limit
        if self.config.softcap == "sqrt":
            return z * torch.addcmul(z.new_ones(()), z, z, value=limit**-2).rsqrt()
        if self.config.softcap == "sigmoid":
            return limit * torch.sigmoid(z / (7.5 * self.config.width**0.5))
        return z

    def _losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Of (tokens, width) and (tokens,): (tokens,), some at a time if asked to."""

        def losses(features: Tensor, targets: Tensor) -> Tensor:
            logits = self._logits(features)
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

        if self.logits_chunk is None:
            return losses(features, targets)
        chunks = zip(
            features.split(self.logits_chunk), targets.split(self.logits_chunk), strict=True
        )
        return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])

    def _masks(
        self, tokens: Tensor, queries: int, windows: Tensor | None, flex: bool
    ) -> dict[bool, Tensor | BlockMask | None]:
        """Masks of the layers with short (False) and with long windows (True)."""
        config, length = self.config, tokens.shape[1]
        if not config.document_mask and windows is None:
            if queries == length:
                return {False: None, True: None}
            if queries == 1:  # sees all of them, which None would not say
                everything = torch.ones(1, length, dtype=torch.bool, device=tokens.device)
                return {False: everything, True: everything}
        document = documents(tokens, config.bos if config.document_mask else -1)
        flex = flex and tokens.is_cuda and length % WINDOW_BLOCK == 0
        if not flex and len(tokens) * queries * length > LARGEST_MASK:
            raise ValueError(
                f"the attention mask of {len(tokens)} sequences of {length} tokens would take "
                f"gigabytes: use shorter or fewer ones, or a GPU and lengths that are multiples of "
                f"{WINDOW_BLOCK}, where FlexAttention needs none"
            )

        def masked(window: Tensor | None) -> Tensor | BlockMask:
            return block_mask(document, window) if flex else dense_mask(document, window, queries)

        if windows is None:
            return dict.fromkeys((False, True), masked(None))
        return {False: masked(windows[1]), True: masked(windows[0])}

    def _scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of skips (layers,), of stream and embedding, and of values (layers, 2)."""
        n = self.config.layers
        # Nothing reads them where there are none.
        scalars = torch.empty(5 * n) if self.scalars is None else self.scalars
        return scalars[:n], scalars[n : 3 * n].view(n, 2), scalars[3 * n : 5 * n].view(n, 2)


def _drawn(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of logits: (batch, vocabulary) -> int64 (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # On the CPU, so that every device draws the same text.
    drawn = torch.multinomial(logits.softmax(-1).float().cpu(), 1, generator=generator)
    return drawn.to(logits.device)

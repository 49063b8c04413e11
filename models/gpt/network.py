"""The network of a GPTConfig: logits, losses, generated text."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from lit_fanions.checks import whole_number
from models.gpt.config import GPTConfig
from models.gpt.layers import Block, KVCache, Norm, rotations
from models.gpt.masks import WINDOW_BLOCK, block_mask, dense_mask, documents, has_flex_attention

LARGEST_MASK = 2**31  # bytes; one entry is one byte
IGNORED = -100  # target without a loss: the ignore_index of torch's cross_entropy


class GPT(nn.Module):
    """The network of a ``GPTConfig``.

    Args:
        config: Shape of the network.
        activation_checkpointing: Keep the blocks' inputs only and recompute the rest in the
            backward pass.
        logits_chunk: Number of tokens whose losses are computed at a time, with the logits
            recomputed in the backward pass; None: all at once.
    """

    def __init__(
        self,
        config: GPTConfig,
        activation_checkpointing: bool = False,
        logits_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if logits_chunk is not None:
            whole_number("logits_chunk", logits_chunk)
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
        """Draw new weights, see ``GPTConfig.init``."""
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
            # One vector as in the published runs, its length a multiple of their 8 devices. Per
            # layer: skip weight, (stream, embedding) weights, (values, value embedding) weights.
            n = config.layers
            self.scalars.fill_(1)
            self.scalars[n : 3 * n].view(n, 2)[:, 1] = 0
            self.scalars[3 * n : 5 * n] = 0.5
        for table in (self.embedding, *self.value_embeddings):
            table.to(getattr(torch, config.embedding_dtype))

    def windows(self, progress: float = 1.0) -> Tensor | None:
        """Return how many blocks attention reaches back in layers with long and short windows.

        They grow with the fraction of the training that is done: int64 (2,) on the network's
        device, or None without windows.
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
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits or, with targets, losses.

        Args:
            tokens: int64 (batch, length); with a cache, the tokens that it does not hold yet.
            targets: Next token of each, int64 (batch, length); -100 has no loss.
            windows: See ``windows``; None: the windows at the end of the training.
            cache: Keys and values of earlier tokens; it is extended.

        Returns:
            With targets, cross entropies in nats, float32 (batch, length), 0 where the target is
            -100. Without, logits, float32 (batch, length, vocab_size); with a cache, those of the
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
            temperature: Divisor of the logits; 0: always take the likeliest token.
            top_k: Number of likeliest tokens to sample from; None: all.
            vocab_size: Number of first tokens to sample from; None: all.
            generator: Source of randomness, on the CPU.

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
        cache = KVCache(self.config, self.head.weight, len(prompt), length + count)
        text = new = prompt
        for _ in range(count):
            logits = self(new, cache=cache)[:, -1, :vocab_size]
            new = sample(logits, temperature, top_k, generator)
            text = torch.cat([text, new], 1)
        return text

    def flops_per_token(self, length: int) -> int:
        """Return the floating-point operations of one token's forward pass.

        Two per weight of a matrix, and 4 x width per attention layer and token in the window at
        the end of the training. Half of those tokens are later ones, which causal attention skips;
        they count all the same, as is usual (PaLM, arXiv:2204.02311, appendix B).
        """
        reach = {True: length, False: length}
        if self.config.window is not None:
            blocks = math.ceil(self.config.window / WINDOW_BLOCK)
            for long in reach:
                reach[long] = min(length, WINDOW_BLOCK * max(1, blocks if long else blocks // 2))
        attended = sum(
            reach[i in self.config.long_window_layers]
            for i, block in enumerate(self.blocks)
            if block.attention is not None
        )
        return 2 * self._matrix_entries + 4 * self.config.width * attended

    # -- private --

    def _features(self, tokens: Tensor, windows: Tensor | None, cache: KVCache | None) -> Tensor:
        """Return the input of the head: (batch, length) -> (batch, length, width)."""
        config, length = self.config, tokens.shape[1]
        if cache is not None:
            cache.tokens = torch.cat([cache.tokens, tokens], 1)
        context = tokens if cache is None else cache.tokens
        first = context.shape[1] - length
        position = torch.arange(first, first + length, device=tokens.device)
        rotation = rotations(position, config.head_width)
        windows = self.windows() if windows is None else windows
        masks = self._masks(context, length, windows, flex=cache is None)

        x = self.embedding(tokens)
        if not torch.is_autocast_enabled(tokens.device.type):
            x = x.type_as(self.head.weight)  # embeddings may be bfloat16
        x = x0 = self.embedding_norm(x)
        extra = [table(tokens) for table in self.value_embeddings]
        middle = [None] * (config.layers - 2 * len(extra))
        values: Sequence[Tensor | None] = [*extra, *middle, *extra]
        skips, mixes, value_weights = self._scalars()
        unet: list[Tensor] = []  # outputs of the first half's blocks
        half = config.layers // 2
        for i, block in enumerate(self.blocks):
            if config.unet_skips and i >= config.layers - half:
                x = x + skips[i - (config.layers - half)].type_as(x) * unet.pop()
            if config.embedding_skips:
                x = mixes[i, 0].type_as(x) * x + mixes[i, 1].type_as(x) * x0
            mask = masks[i in config.long_window_layers]
            weights = value_weights[i] if extra else None
            extend_cache = None if cache is None else partial(cache.extend, i)
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, mask, values[i], weights, use_reentrant=False)
            else:
                x = block(x, rotation, mask, values[i], weights, extend_cache)
            if config.unet_skips and i < half:
                unet.append(x)
        return self.final_norm(x)

    def _logits(self, features: Tensor) -> Tensor:
        """Return capped logits: (..., width) -> float32 (..., vocab_size)."""
        z, limit = self.head(features).float(), self.config.softcap_limit
        if self.config.softcap == "sqrt":
            return z * torch.addcmul(z.new_ones(()), z, z, value=limit**-2).rsqrt()
        if self.config.softcap == "sigmoid":
            return limit * torch.sigmoid(z / (7.5 * self.config.width**0.5))
        return z

    def _losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the losses of (tokens, width) and targets (tokens,): (tokens,)."""

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
        """Return the masks of layers with short (False) and with long windows (True).

        The last ``queries`` tokens attend to all; ``flex`` allows FlexAttention.
        """
        config, length = self.config, tokens.shape[1]
        if not config.document_mask and windows is None:
            if queries == length:
                return {False: None, True: None}
            if queries == 1:  # attends to every key, while None would mean the first key alone
                all_keys = torch.ones(1, length, dtype=torch.bool, device=tokens.device)
                return {False: all_keys, True: all_keys}
        document = documents(tokens, config.bos if config.document_mask else -1)
        flex = flex and has_flex_attention(tokens)
        if not flex and len(tokens) * queries * length > LARGEST_MASK:
            raise ValueError(
                f"the attention mask of {len(tokens)} sequences of {length} tokens would take "
                f"gigabytes: use shorter or fewer ones, or a GPU and lengths that are multiples of "
                f"{WINDOW_BLOCK}, where FlexAttention needs none"
            )

        def mask(window: Tensor | None) -> Tensor | BlockMask:
            return block_mask(document, window) if flex else dense_mask(document, window, queries)

        if windows is None:
            return dict.fromkeys((False, True), mask(None))
        return {False: mask(windows[1]), True: mask(windows[0])}

    def _scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights of skips (layers,), of (stream, embedding) and of values (layers, 2)."""
        n = self.config.layers
        # A network without any of the three has no parameter for them, and reads none.
        scalars = torch.empty(5 * n) if self.scalars is None else self.scalars
        return scalars[:n], scalars[n : 3 * n].view(n, 2), scalars[3 * n : 5 * n].view(n, 2)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Sample one token for each row of logits: (batch, vocabulary) -> int64 (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # On the CPU, so that a seed gives the same text on every device.
    token = torch.multinomial(logits.softmax(-1).float().cpu(), 1, generator=generator)
    return token.to(logits.device)

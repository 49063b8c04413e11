"""Which tokens attend to which: causal, within a document, within a window."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

WINDOW_BLOCK = 128  # windows are counted in blocks of this many tokens, FlexAttention's block size


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
    """Return whether a query may attend to a key: not later, same document, within the window.

    All broadcast. The window is the number of blocks of 128 tokens that a query reaches back, its
    own block included; None: no limit.
    """
    allowed = (key <= query) & (query_document == key_document)
    if window is None:
        return allowed
    return allowed & (query // WINDOW_BLOCK - key // WINDOW_BLOCK < window)


def dense_mask(document: Tensor, window: Tensor | int | None, queries: int | None = None) -> Tensor:
    """Return the whole mask, for scaled_dot_product_attention: bool (batch, 1, queries, keys).

    Args:
        document: Number of each token's document, int64 (batch, keys).
        window: See ``visible``.
        queries: Number of last tokens that are queries; None: all.
    """
    position = torch.arange(document.shape[-1], device=document.device)
    first = 0 if queries is None else document.shape[-1] - queries
    mask = visible(
        position[first:, None], position, document[:, first:, None], document[:, None], window
    )
    return mask.unsqueeze(1)


def block_mask(document: Tensor, window: Tensor | int | None) -> BlockMask:
    """Return the mask for FlexAttention, computed from the first and last document of each block.

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

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(query, key, document[batch, query], document[batch, key], window)

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=WINDOW_BLOCK, mask_mod=allowed
    )


def has_flex_attention(tokens: Tensor) -> bool:
    """Return whether FlexAttention works for sequences, int64 (batch, length), on their device."""
    return tokens.is_cuda and tokens.shape[-1] % WINDOW_BLOCK == 0


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)  # uncompiled, it makes the whole matrix of scores


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, scale: float | None
) -> Tensor:
    """Return the attention of (batch, heads, queries, features) to (batch, heads, keys, features).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Which queries attend to which keys; None: each to the keys up to its own position.
        scale: Factor on the scores. None: 1 / sqrt(features).
    """
    if isinstance(mask, BlockMask):
        # Lightning wraps torch.compile; the wrapper would split the graph of a compiled network.
        compiling = torch.compiler.is_compiling()
        flex: Any = flex_attention if compiling else _compiled_flex()
        return flex(q, k, v, block_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )

"""A GPT in two variants: modded-nanogpt's fixed benchmark network and its speedrun network.

Both are decoder-only transformers with RMS norms, normalised queries and keys, half-truncated
rotary positions, squared rectifiers and capped logits; ``GPTConfig.track3`` and
``GPTConfig.speedrun`` are the two published networks. After Keller Jordan and others,
https://github.com/KellerJordan/modded-nanogpt.

A package because a readable file holds one of: the config, the masks, the layers, the network.
"""

from models.gpt.config import GPTConfig
from models.gpt.layers import KVCache, rotate, rotations
from models.gpt.masks import WINDOW_BLOCK, attend, block_mask, dense_mask, documents
from models.gpt.network import GPT, IGNORED

__all__ = [
    "GPT",
    "IGNORED",
    "WINDOW_BLOCK",
    "GPTConfig",
    "KVCache",
    "attend",
    "block_mask",
    "dense_mask",
    "documents",
    "rotate",
    "rotations",
]

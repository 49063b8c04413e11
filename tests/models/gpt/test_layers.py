"""Rotary positions, dtypes and the cache of keys and values."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.gpt import (
    GPT,
    KVCache,
    rotate,
    rotations,
)
from tests.models.gpt.reference import (
    texts,
)


def test_rotated_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 16)

    def score(at: int, other: int) -> torch.Tensor:
        rotated = rotate(torch.stack([q, k]), *rotations(torch.tensor([at, other]), 16))
        return rotated[0] @ rotated[1]

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


def test_rotation_is_exact_at_far_positions_and_in_bf16() -> None:
    cos, sin = rotations(torch.tensor([0, 40_001]), 16)
    speeds = torch.tensor([1024 ** -(i / 3) for i in range(4)] + [0.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(cos[1].double(), (40_001 * speeds).cos(), atol=3e-3, rtol=0)
    torch.testing.assert_close(sin[1].double(), (40_001 * speeds).sin(), atol=3e-3, rtol=0)
    x = torch.randn(2, 16).bfloat16()
    exact = rotate(x.float(), cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), exact.bfloat16(), atol=0, rtol=0)


def test_residual_stream_stays_in_bf16(network: GPT, monkeypatch) -> None:
    """The residual stream is bf16 even if autocast computes norms in float32, as on CUDA."""
    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *args: norm(x.float(), *args))
    saving = GPT(dataclasses.replace(network.config, embedding_dtype="bfloat16"))
    seen = []
    for block in saving.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        saving(texts(1, 20))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 130, 279])
def test_cached_logits_equal_uncached_logits(network: GPT, split: int) -> None:
    tokens = texts(2, 280)
    whole = network(tokens)
    cache = KVCache(network.config, network.head.weight, 2, 280)
    torch.testing.assert_close(
        network(tokens[:, :split], cache=cache)[:, 0], whole[:, split - 1], rtol=1e-4, atol=1e-4
    )
    for t in range(split, min(split + 3, 280)):
        step = network(tokens[:, t : t + 1], cache=cache)
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
    if split + 3 < 280:  # several tokens at once
        rest = network(tokens[:, split + 3 :], cache=cache)
        torch.testing.assert_close(rest[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)

"""Which tokens attend to which: against the definition, dense and by blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from models.gpt import (
    GPT,
    WINDOW_BLOCK,
    block_mask,
    dense_mask,
    documents,
)
from tests.models.gpt.reference import BOS, SHAPES, brute_force_mask, texts


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("by_document", [True, False])
def test_masks_equal_the_definition(window: int | None, by_document: bool) -> None:
    tokens = texts(2, 3 * WINDOW_BLOCK)
    document = documents(tokens, BOS if by_document else -1)
    expected = brute_force_mask(tokens, window, by_document)
    assert torch.equal(dense_mask(document, window)[:, 0], expected)
    assert torch.equal(dense_mask(document, window, 5)[:, 0], expected[:, -5:])

    sparse = block_mask(document, None if window is None else torch.tensor(window))
    blocks = expected.unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).movedim(3, 2)
    assert torch.equal(sparse.to_dense()[:, 0].bool(), blocks.flatten(3).any(-1))
    full = torch.zeros_like(sparse.to_dense()[:, 0], dtype=torch.bool)
    counts, indices = sparse.full_kv_num_blocks[:, 0], sparse.full_kv_indices[:, 0]
    for b, q in [(b, q) for b in range(2) for q in range(3)]:
        full[b, q, indices[b, q, : counts[b, q]].long()] = True
    assert torch.equal(full, blocks.flatten(3).all(-1))


@pytest.mark.filterwarnings("ignore:(?s)flex_attention called without:UserWarning")
@pytest.mark.parametrize("window", [None, 1, 2])
def test_flex_attention_equals_dense_attention(window: int | None) -> None:
    tokens = texts(2, 3 * WINDOW_BLOCK)
    document = documents(tokens, BOS)
    q, k, v = torch.randn(3, 2, 2, tokens.shape[1], 16)
    limit = None if window is None else torch.tensor(window)
    flexible = flex_attention(q, k, v, block_mask=block_mask(document, limit), scale=0.12)
    dense = F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense_mask(document, limit), scale=0.12
    )
    torch.testing.assert_close(flexible, dense)


@torch.no_grad()
def test_logits_ignore_later_tokens_and_other_documents(network: GPT) -> None:
    tokens = texts(1, 200)
    tokens[0, 100] = BOS
    logits = network(tokens)
    later = tokens.clone()
    later[0, 150:] = (later[0, 150:] + 1) % BOS
    torch.testing.assert_close(network(later)[:, :150], logits[:, :150])
    assert not torch.allclose(network(later)[:, 150:], logits[:, 150:])
    other = tokens.clone()
    other[0, 60:99] = (other[0, 60:99] + 1) % BOS
    apart = torch.allclose(network(other)[:, 100:], logits[:, 100:], atol=1e-5)
    assert apart == network.config.document_mask


def test_huge_dense_mask_is_refused() -> None:
    network = GPT(SHAPES["speedrun"])
    with pytest.raises(ValueError, match="attention mask of 1 sequences of 50000 tokens"):
        network(torch.zeros(1, 50_000, dtype=torch.long))

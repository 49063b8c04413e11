"""The GPT against its plain definition: logits, losses, weights, text, memory savers."""

import dataclasses
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from models.gpt import GPT, WINDOW_BLOCK, GPTConfig
from models.gpt import network as gpt_network
from tests.models.gpt.reference import (
    SHAPES,
    plain_logits,
    texts,
)


@torch.no_grad()
@pytest.mark.parametrize("progress", [0.3, 1.0])
def test_logits_equal_the_reference(network: GPT, progress: float) -> None:
    tokens = texts(1, 280)
    expected = plain_logits(network, tokens[0], progress)
    torch.testing.assert_close(
        network(tokens, windows=network.windows(progress))[0], expected, rtol=2e-4, atol=2e-4
    )


def test_losses_are_cross_entropies_of_the_logits(network: GPT) -> None:
    tokens = texts(2, 30)
    targets = tokens.roll(-1, 1)
    targets[1, 5:] = -100
    losses = network(tokens, targets)
    logits = network(tokens).log_softmax(-1)
    for row, column in [(0, 0), (0, 29), (1, 4)]:
        expected = -logits[row, column, targets[row, column]]
        torch.testing.assert_close(losses[row, column], expected)
    assert not losses[1, 5:].any()


@pytest.mark.parametrize("preset", [GPTConfig.track3, GPTConfig.speedrun])
def test_first_loss_is_of_a_uniform_guess(preset) -> None:
    config = dataclasses.replace(preset(), width=32, heads=2, mlp_width=64)
    network = GPT(config)
    tokens = torch.randint(0, 50257, (2, 200))
    losses = network(tokens, tokens.roll(-1, 1))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(50304)))


@pytest.mark.parametrize("preset", [GPTConfig.track3, GPTConfig.speedrun])
def test_weights_start_as_published(preset) -> None:
    config = dataclasses.replace(preset(), vocab_size=3000, width=256, heads=2, bos=0)
    torch.manual_seed(0)
    network = GPT(config)
    spread = {"normal": 0.33**0.5, "uniform": 0.5}[config.init]
    for name, p in network.named_parameters():
        p = p.detach().float()
        if ".proj." in name or name.startswith("head.") or name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "embedding" in name:
            assert abs(p.std() - 1) < 0.01, name
        elif name != "scalars":
            std = spread / p.shape[-1] ** 0.5
            assert abs(p.std() / std - 1) < 0.02, name
            largest = p.abs().max() / std
            assert (largest < 3**0.5 + 1e-4) == (config.init == "uniform"), name
    assert {e.weight.dtype for e in [network.embedding, *network.value_embeddings]} == {
        torch.bfloat16
    }
    if network.scalars is not None:
        assert len(network.scalars) == 64
        assert network.scalars[:60].tolist() == [1.0] * 12 + [1.0, 0.0] * 12 + [0.5] * 24


def test_windows_grow_to_the_next_multiple_of_128() -> None:
    network = GPT(SHAPES["speedrun"])
    for step in range(0, 1751, 50):
        progress = step / 1750
        blocks = next(w for w in range(99) if 128 * w >= 300 * progress)
        assert network.windows(progress).tolist() == [max(1, blocks), max(1, blocks // 2)]


def test_generate_continues_with_the_likeliest_tokens(network: GPT) -> None:
    text = network.generate(texts(2, 5), 6, temperature=0)
    assert text.shape == (2, 11)
    for length in range(5, 11):
        assert torch.equal(network(text[:, :length])[:, -1].argmax(-1), text[:, length])


def test_generate_samples_by_the_probabilities(network: GPT) -> None:
    prompt = texts(1, 4).expand(4000, -1)
    generator = torch.Generator().manual_seed(1)
    sampled = network.generate(prompt, 1, temperature=0.7, top_k=5, generator=generator)[:, -1]
    logits = network(prompt[:1])[0, -1].detach()
    best = logits.topk(5).indices
    expected = (logits[best] / 0.7).softmax(-1)
    seen = torch.stack([(sampled == token).float().mean() for token in best])
    assert seen.sum() == pytest.approx(1)
    torch.testing.assert_close(seen, expected, atol=0.04, rtol=0)
    few = network.generate(prompt[:50], 5, vocab_size=3, generator=generator)[:, 4:]
    assert few.max() <= 2


def test_generate_refuses_too_long_or_empty_prompts(network: GPT) -> None:
    with pytest.raises(ValueError, match=r"prompt of 390 tokens and 11 more exceed .* 400"):
        network.generate(texts(1, 390), 11)
    with pytest.raises(ValueError, match="empty"):
        network.generate(texts(1, 1)[:, :0], 1)


@pytest.mark.parametrize("saver", [{"activation_checkpointing": True}, {"logits_chunk": 7}])
def test_memory_savers_keep_the_gradients(network: GPT, saver: dict[str, object]) -> None:
    saving = GPT(network.config, **saver)
    saving.load_state_dict(network.state_dict())
    tokens = texts(2, 40)
    targets = tokens.roll(-1, 1)
    for each in (network, saving):
        each(tokens, targets).sum().backward()
    for (name, p), q in zip(network.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_logits_chunk_limits_the_size_of_logits(network: GPT, monkeypatch) -> None:
    saving = GPT(network.config, logits_chunk=7)
    sizes = []
    forward = type(saving.head).forward
    monkeypatch.setattr(
        saving.head, "forward", lambda x: sizes.append(len(x)) or forward(saving.head, x)
    )
    saving(texts(2, 10), texts(2, 10)).sum().backward()
    assert max(sizes) == 7
    assert sum(sizes) == 2 * 20  # once more in the backward pass


def test_activation_checkpointing_saves_less_for_backward(network: GPT) -> None:
    def kept(each: GPT) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            each(texts(2, 100), texts(2, 100))
        return sum(sizes)

    saving = GPT(network.config, activation_checkpointing=True)
    assert kept(saving) < 0.5 * kept(network)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [GPTConfig.track3, GPTConfig.speedrun])
def test_full_size_presets_train_a_step(preset) -> None:
    from lit_fanions import configure_optimizers

    torch.manual_seed(0)
    network = GPT(preset())
    optimizer = configure_optimizers(network, lr=0.02)["optimizer"]
    tokens = torch.randint(0, 50256, (2, 128))
    tokens[:, 0] = 50256
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(tokens, tokens.roll(-1, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(50304), abs=1e-4)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("preset", [GPTConfig.track3, GPTConfig.speedrun])
def test_published_networks_are_one_graph_for_the_compiler(preset, monkeypatch) -> None:
    config = dataclasses.replace(
        preset(), vocab_size=64, width=64, heads=2, mlp_width=128, bos=0, embedding_dtype="float32"
    )
    if config.window is not None:
        config = dataclasses.replace(config, window=300)
    network = GPT(config, logits_chunk=WINDOW_BLOCK)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.2)
    tokens = torch.randint(0, 64, (1, 4 * WINDOW_BLOCK))
    growing = [network.windows(progress) for progress in (0.1, 0.5, 1.0)]
    # FlexAttention, for which a CPU has no backward pass; the dense masks are the reference.
    with torch.set_grad_enabled(config.window is None):
        expected = [network(tokens, tokens, windows) for windows in growing]
        monkeypatch.setattr(gpt_network, "has_flex_attention", lambda tokens: True)
        graphs = CompileCounter()
        compiled = torch.compile(network, backend=graphs, fullgraph=True, dynamic=False)
        found = [compiled(tokens, tokens, windows) for windows in growing]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1

"""The GPT against its plain definition: numbers, masks, caches, memory savers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from models.gpt import (
    GPT,
    WINDOW_BLOCK,
    Cache,
    GPTConfig,
    block_mask,
    dense_mask,
    documents,
    rotate,
    rotations,
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


@pytest.fixture(params=SHAPES)
def network(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(0)
    network = GPT(SHAPES[request.param])
    for parameter in network.parameters():  # nothing zero, nothing one
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return network


def texts(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(0, BOS, (batch, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOS
    for row in range(batch):
        tokens[row, 40 + 90 * row :: 110] = BOS
    return tokens


def allowed(tokens: list[int], query: int, key: int, window: int | None, by_document: bool) -> bool:
    """Whether a token sees another, by the words of the definition."""
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


# --- a second writing-down of the network, token by token where it can be ---


def plain_logits(network: GPT, tokens: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
    """Logits of one sequence (length,), in the order of the published description."""
    c = network.config
    weights = dict(network.named_parameters())
    length, size = len(tokens), c.width // c.heads

    def norm(x: torch.Tensor, name: str = "") -> torch.Tensor:
        eps = torch.finfo(torch.float32).eps
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * weights[name] if name in weights else x

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def turned(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for position in range(length):
            for i in range(size // 2):
                turning = size // 4
                speed = 1024 ** -(i / (turning - 1)) if i < turning else 0.0
                cos, sin = math.cos(position * speed), math.sin(position * speed)
                a, b = x[position, i], x[position, i + size // 2]
                out[position, i] = a * cos + b * sin
                out[position, i + size // 2] = -a * sin + b * cos
        return out

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
                scores = turned(norm(q[:, part])) @ turned(norm(k[:, part])).T
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


@torch.no_grad()
@pytest.mark.parametrize("progress", [0.3, 1.0])
def test_logits_are_those_of_the_description(network: GPT, progress: float) -> None:
    tokens = texts(1, 280)
    expected = plain_logits(network, tokens[0], progress)
    torch.testing.assert_close(
        network(tokens, windows=network.windows(progress))[0], expected, rtol=2e-4, atol=2e-4
    )


def test_losses_are_the_cross_entropies_of_the_logits(network: GPT) -> None:
    tokens = texts(2, 30)
    targets = tokens.roll(-1, 1)
    targets[1, 5:] = -100
    losses = network(tokens, targets)
    logits = network(tokens).log_softmax(-1)
    for row, column in [(0, 0), (0, 29), (1, 4)]:
        expected = -logits[row, column, targets[row, column]]
        torch.testing.assert_close(losses[row, column], expected)
    assert not losses[1, 5:].any()


# --- the presets ---


@pytest.mark.parametrize(
    ("preset", "count"), [(GPTConfig.track3, 162_354_816), (GPTConfig.speedrun, 275_742_784)]
)
def test_presets_have_the_published_number_of_parameters(preset, count: int) -> None:
    with torch.device("meta"):
        network = GPT(preset())
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("preset", [GPTConfig.track3, GPTConfig.speedrun])
def test_first_loss_is_that_of_a_uniform_guess(preset) -> None:
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


# --- who sees whom ---


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("by_document", [True, False])
def test_masks_are_those_of_the_definition(window: int | None, by_document: bool) -> None:
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
def test_flex_attention_gives_the_same_numbers(window: int | None) -> None:
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
def test_nothing_leaks_from_later_tokens_or_other_documents(network: GPT) -> None:
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


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 16)

    def score(at: int, other: int) -> torch.Tensor:
        turned = rotate(torch.stack([q, k]), *rotations(torch.tensor([at, other]), 16))
        return turned[0] @ turned[1]

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


def test_rotation_is_exact_far_out_and_in_bf16() -> None:
    cos, sin = rotations(torch.tensor([0, 40_001]), 16)
    speeds = torch.tensor([1024 ** -(i / 3) for i in range(4)] + [0.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(cos[1].double(), (40_001 * speeds).cos(), atol=3e-3, rtol=0)
    torch.testing.assert_close(sin[1].double(), (40_001 * speeds).sin(), atol=3e-3, rtol=0)
    x = torch.randn(2, 16).bfloat16()
    exact = rotate(x.float(), cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), exact.bfloat16(), atol=0, rtol=0)


def test_stream_stays_in_bf16(network: GPT, monkeypatch) -> None:
    """Also where autocast has norms in float32, as on CUDA."""
    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *args: norm(x.float(), *args))
    thrifty = GPT(dataclasses.replace(network.config, embedding_dtype="bfloat16"))
    seen = []
    for block in thrifty.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        thrifty(texts(1, 20))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_masks_of_gigabytes_are_refused() -> None:
    network = GPT(SHAPES["speedrun"])
    with pytest.raises(ValueError, match="attention mask of 1 sequences of 50000 tokens"):
        network(torch.zeros(1, 50_000, dtype=torch.long))


# --- generating ---


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 130, 279])
def test_cache_changes_nothing(network: GPT, split: int) -> None:
    tokens = texts(2, 280)
    whole = network(tokens)
    cache = Cache(network, 2, 280)
    torch.testing.assert_close(
        network(tokens[:, :split], cache=cache)[:, 0], whole[:, split - 1], rtol=1e-4, atol=1e-4
    )
    for t in range(split, min(split + 3, 280)):
        step = network(tokens[:, t : t + 1], cache=cache)
        torch.testing.assert_close(step[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
    if split + 3 < 280:  # several tokens at once
        rest = network(tokens[:, split + 3 :], cache=cache)
        torch.testing.assert_close(rest[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_generate_continues_with_the_likeliest_tokens(network: GPT) -> None:
    text = network.generate(texts(2, 5), 6, temperature=0)
    assert text.shape == (2, 11)
    for length in range(5, 11):
        assert torch.equal(network(text[:, :length])[:, -1].argmax(-1), text[:, length])


def test_generate_draws_by_the_probabilities(network: GPT) -> None:
    prompt = texts(1, 4).expand(4000, -1)
    generator = torch.Generator().manual_seed(1)
    drawn = network.generate(prompt, 1, temperature=0.7, top_k=5, generator=generator)[:, -1]
    logits = network(prompt[:1])[0, -1].detach()
    best = logits.topk(5).indices
    expected = (logits[best] / 0.7).softmax(-1)
    seen = torch.stack([(drawn == token).float().mean() for token in best])
    assert seen.sum() == pytest.approx(1)
    torch.testing.assert_close(seen, expected, atol=0.04, rtol=0)
    few = network.generate(prompt[:50], 5, vocab_size=3, generator=generator)[:, 4:]
    assert few.max() <= 2


def test_generate_refuses_what_does_not_fit(network: GPT) -> None:
    with pytest.raises(ValueError, match=r"prompt of 390 tokens and 11 more exceed .* 400"):
        network.generate(texts(1, 390), 11)
    with pytest.raises(ValueError, match="empty"):
        network.generate(texts(1, 1)[:, :0], 1)


# --- memory savers ---


@pytest.mark.parametrize("saver", [{"activation_checkpointing": True}, {"logits_chunk": 7}])
def test_memory_savers_change_no_gradient(network: GPT, saver: dict[str, object]) -> None:
    thrifty = GPT(network.config, **saver)
    thrifty.load_state_dict(network.state_dict())
    tokens = texts(2, 40)
    targets = tokens.roll(-1, 1)
    for each in (network, thrifty):
        each(tokens, targets).sum().backward()
    for (name, p), q in zip(network.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_logits_chunk_makes_no_larger_matrix(network: GPT, monkeypatch) -> None:
    thrifty = GPT(network.config, logits_chunk=7)
    sizes = []
    forward = type(thrifty.head).forward
    monkeypatch.setattr(
        thrifty.head, "forward", lambda x: sizes.append(len(x)) or forward(thrifty.head, x)
    )
    thrifty(texts(2, 10), texts(2, 10)).sum().backward()
    assert max(sizes) == 7
    assert sum(sizes) == 2 * 20  # once more in the backward pass


def test_activation_checkpointing_keeps_less(network: GPT) -> None:
    def kept(each: GPT) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            each(texts(2, 100), texts(2, 100))
        return sum(sizes)

    thrifty = GPT(network.config, activation_checkpointing=True)
    assert kept(thrifty) < 0.5 * kept(network)


# --- mistakes ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 18}, "multiple of 4 heads, 8"),
        ({"layers": 0}, "layers=0: it must be at least 1"),
        ({"layers_without_attention": (4,)}, "there is no block 4, choose from 0 to 3"),
        ({"long_window_layers": (-1,)}, "there is no block -1"),
        ({"value_embeddings": 3}, "choose 0 to 2"),
        ({"window": 0}, "window=0: give a number of tokens"),
        ({"document_mask": True, "bos": 17}, "not in the vocabulary of 17"),
        ({"softcap": "tanh"}, "choose one of none, sqrt, sigmoid"),
        ({"softcap_limit": 0.0}, "must be positive"),
        ({"init": "zeros"}, "choose one of normal, uniform"),
        ({"embedding_dtype": "float16"}, "choose float32 or bfloat16"),
    ],
)
def test_config_refuses_what_has_no_meaning(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **wrong})


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

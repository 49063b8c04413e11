"""Bytes and GPT-2's byte pairs."""

from typing import Any

import numpy as np
import pytest
import torch

from datamodules.tokenizers import GPT2Tokenizer, load_tokenizer

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def test_byte_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("né\n")
    assert ids.dtype == np.uint16 and ids.tolist() == [110, 195, 169, 10]
    assert tokenizer.decode(ids) == "né\n"
    assert tokenizer.decode([256, 110, 195, 256, 255]) == "<|endoftext|>n�<|endoftext|>�"
    assert tokenizer.decode(torch.tensor([110, 195, 169])) == "né" and tokenizer.decode([]) == ""
    assert tokenizer.encode("<|endoftext|>").max() < 256
    assert tokenizer.encode("a\ud800b").tolist() == [97, 63, 98]
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
    with pytest.raises(ValueError, match=r"token 257 cannot be decoded: .* 257 tokens"):
        tokenizer.decode([257])


class SmallGPT2(GPT2Tokenizer):
    """GPT-2's tokenizer with a vocabulary that needs no download."""

    vocab_size = 259
    bos = 258


def small_encoding(name: str) -> Any:
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    specials = {"<|endoftext|>": 258}
    return tiktoken.Encoding(
        name, pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=specials
    )


def test_gpt2_tokenizer_with_a_small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", small_encoding)
    tokenizer = SmallGPT2()
    ids = tokenizer.encode("abcab é")
    assert ids.dtype == np.uint16 and ids.tolist() == [257, 256, 32, 195, 169]
    assert tokenizer.decode(ids) == "abcab é"
    assert tokenizer.decode([258, 257, 195]) == "<|endoftext|>abc�"
    assert tokenizer.encode("<|endoftext|>").max() < 258
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [2, 3, 0]
    with pytest.raises(ValueError, match="token 259"):
        tokenizer.decode([1, 259])


def test_gpt2_tokenizer() -> None:
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.bos) == (50257, 50256)
    try:
        ids = tokenizer.encode("Hello world")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert ids.tolist() == [15496, 995] and tokenizer.decode(ids) == "Hello world"
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (50257,) and lengths[ids.tolist()].tolist() == [5, 6]
    assert lengths[50256] == 0 and lengths[:50256].min() == 1


def test_missing_vocabulary_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def refuse(name: str) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(FileNotFoundError, match=r"\(Name or service not known\).*TIKTOKEN_CACHE"):
        load_tokenizer("gpt2").encode("a")
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tiktoken"):
        load_tokenizer("gpt2").encode("a")
    with pytest.raises(ValueError, match="tokenizer 'words' is none of gpt2, bytes"):
        load_tokenizer("words")  # type: ignore[arg-type]

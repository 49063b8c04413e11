"""The shape of a GPT, and the two published ones."""

from dataclasses import dataclass
from typing import Literal, get_args

from lit_fanions.checks import check_choice, check_flag, real_number, whole_number

Softcap = Literal["none", "sqrt", "sigmoid"]
Init = Literal["normal", "uniform"]
EmbeddingDtype = Literal["float32", "bfloat16"]

HEAD_WIDTH = 128  # features of an attention head where the number of heads is not given


@dataclass(frozen=True)
class GPTConfig:
    """The network. The defaults are modded-nanogpt's optimizer benchmark ("track 3"), in float32.

    Args:
        vocab_size: Rows of the embedding and of the head; may exceed the tokenizer's vocabulary.
        context_length: Largest number of tokens of a generated text, its prompt included.
        layers: Number of blocks.
        width: Features of the residual stream, from which heads and mlp_width follow.
        heads: Attention heads; width / heads must be a multiple of 4. None: one for every 128
            features, at least one.
        mlp_width: Hidden features of the MLPs. None: 4 x width.
        biases: Whether the linear layers have biases, initialised to zero.
        norm_gains: Whether the norms have gains, initialised to one.
        merged_qkv: Keep query, key and value weights as one parameter (3, width, width).
        attention_scale: Factor on the attention scores. None: 1 / sqrt(width / heads).
        layers_without_attention: Blocks (from 0) that have only an MLP.
        softcap: Cap on the logits z, with c = softcap_limit: sqrt: c z / sqrt(z^2 + c^2);
            sigmoid: c sigmoid(z / (7.5 sqrt(width))); none.
        softcap_limit: The number c of softcap.
        value_embeddings: Number of tables of token embeddings; they are added to the attention
            values of that many first layers and, again, of that many last layers.
        unet_skips: Add the outputs of the first half's blocks, weighted, before the second half's.
        embedding_skips: Mix the embedding, weighted, into the input of every block.
        document_mask: Let tokens attend to their own document only; it starts with ``bos``.
        bos: The token that starts a document.
        window: Number of tokens that attention reaches back, in whole blocks of 128; it grows over
            the training from one block to this. None: no limit.
        long_window_layers: Blocks with the whole window; the others have half of it.
        init: Distribution of the initial weights; output projections and head start at 0,
            embeddings from N(0, 1).
        init_gain: Standard deviation of the initial weights times sqrt(fan_in).
        embedding_dtype: Dtype of the embeddings' parameters.
    """

    vocab_size: int = 50304
    context_length: int = 1024
    layers: int = 12
    width: int = 768
    heads: int | None = None
    mlp_width: int | None = None
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
        """Refuse values that describe no network."""
        for name in ("vocab_size", "context_length", "layers", "width"):
            whole_number(name, getattr(self, name))
        whole_number("heads", self.head_count)
        whole_number("mlp_width", self.hidden_width)
        flags = "biases", "norm_gains", "merged_qkv", "unet_skips", "embedding_skips"
        for name in (*flags, "document_mask"):
            check_flag(name, getattr(self, name))
        choices = {"softcap": Softcap, "init": Init, "embedding_dtype": EmbeddingDtype}
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), get_args(kind))
        if self.width % (4 * self.head_count):
            raise ValueError(
                f"width={self.width} with heads={self.head_count}: the width must be a multiple of "
                f"4 heads, {4 * self.head_count}"
            )
        for name in ("layers_without_attention", "long_window_layers"):
            wrong = [i for i in getattr(self, name) if not 0 <= i < self.layers]
            if wrong:
                raise ValueError(
                    f"{name}: there is no block {wrong[0]}, choose from 0 to {self.layers - 1}"
                )
        if 2 * whole_number("value_embeddings", self.value_embeddings, 0) > self.layers:
            raise ValueError(
                f"value_embeddings={self.value_embeddings}: choose 0 to {self.layers // 2}, half "
                "of the layers"
            )
        if self.window is not None:
            whole_number("window", self.window)
        whole_number("bos", self.bos, 0)
        if self.document_mask and self.bos >= self.vocab_size:
            raise ValueError(
                f"bos={self.bos}: it is not in the vocabulary of {self.vocab_size} tokens"
            )
        if self.softcap != "none":
            real_number("softcap_limit", self.softcap_limit, above=0)
        if self.attention_scale is not None:
            real_number("attention_scale", self.attention_scale, above=0)
        real_number("init_gain", self.init_gain, 0)

    @classmethod
    def track3(cls) -> "GPTConfig":
        """Return modded-nanogpt's records/track_3_optimization: 162,354,816 parameters."""
        return cls(embedding_dtype="bfloat16")

    @classmethod
    def speedrun(cls) -> "GPTConfig":
        """Return modded-nanogpt's track 1 of 2025-07-12 (BosAlign): 275,742,784 parameters."""
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
    def head_count(self) -> int:
        """Number of attention heads."""
        return max(1, self.width // HEAD_WIDTH) if self.heads is None else self.heads

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.head_count

    @property
    def hidden_width(self) -> int:
        """Hidden features of the MLPs."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

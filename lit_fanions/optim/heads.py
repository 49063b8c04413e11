"""Which layers produce the output of a network.

Apart from ``usage.py``, because an output head is the one role that no layer shows by itself: it
depends on what the rest of the network does with the layer's output.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_CONV = nn.modules.conv._ConvNd
_HEAD_WORD = re.compile(
    r"(^|_)(heads?|classifiers?|logits|predictors?|predictions?|qa_outputs|cls|score|aux|"
    r"(class|bbox|box)_embed)\d*($|_)"
)
_INPUT_SIZES = (
    "in_features", "in_channels", "num_features", "num_channels", "input_size", "embed_dim",
    "embedding_dim",
)  # fmt: skip


class _Layer(NamedTuple):
    """A linear layer: its path, its place in the order of registration, and its widths."""

    path: str
    place: int
    module: nn.Module
    inputs: int
    outputs: int

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def pattern(self) -> tuple[str, int, int]:
        """What layers of repeated blocks have in common: path without numbers, and widths."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", self.path), self.inputs, self.outputs


def find_heads(module: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """Return the output heads of a network, and layers that may be heads, with the reasons.

    A layer is a head where its name says so and no later layer reads its output; where it has as
    many outputs as an embedding has entries; or where it stands behind the repeated blocks, or
    beside another head, and no layer of the network reads a width like that of its output. Without
    any of these it is the last Linear. A layer tied to an embedding is left to the embedding.

    Returns:
        Module -> ("head" or "matrix", reason). A reason that begins with "doubtful" is a guess.
    """
    network = _Network(module)
    heads = network.heads_by_name()
    by_name = bool(heads)
    heads = {**network.heads_by_size(), **heads}
    if not heads and not network.tied:
        heads = network.last_layer()
    heads = {**network.heads_at_the_end(), **heads}
    verdicts = {layer: ("head", reason) for layer, reason in heads.items()}
    return {**network.siblings({*heads, *network.tied}, by_name), **verdicts}


class _Network:
    """The linear layers of a network, and the widths that its modules read."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.named_modules())
        self.layers = [
            _Layer(path, place, m, *widths)
            for place, (path, m) in enumerate(modules)
            if (widths := _widths(m)) and not is_adapter(path) and not _is_inner(path, module)
        ]
        self.readers: dict[int, list[int]] = {}  # width -> places of the modules that read it
        for place, (_, m) in enumerate(modules):
            for width in _read_widths(m):
                self.readers.setdefault(width, []).append(place)
        self.linear_widths = {m.in_features for _, m in modules if isinstance(m, nn.Linear)}
        embeddings = [(path, m) for path, m in modules if is_embedding(m)]
        tables = {id(m.weight) for _, m in embeddings}
        self.tied = [x.module for x in self.layers if id(x.module.weight) in tables]
        # A table of positions says nothing about the outputs.
        self.vocabularies = {
            len(m.weight) for path, m in embeddings if not re.search(r"pos|wpe|type|relative", path)
        }
        patterns = Counter(x.pattern for x in self.layers)
        self.repeated = {
            x.path for x in self.layers if patterns[x.pattern] > 1 and "*" in x.pattern[0]
        }
        self.layers = [x for x in self.layers if x.module not in self.tied]
        # A block is numbered and has parts, unlike a layer of nn.Sequential.
        self.in_blocks = {path for path in self.repeated if re.search(r"(^|\.)\d+\.", path)}

    def is_read(self, layer: _Layer, after: int = -1) -> bool:
        """Return True if another module, after a place, reads a width like the layer's output."""
        widths = [layer.outputs]
        if isinstance(layer.module, _CONV) and layer.outputs > 1:
            # Flattened or concatenated channels are read as a multiple of their number.
            for width in self.readers:
                joined = width // layer.outputs <= 8 or width in self.linear_widths
                if width % layer.outputs == 0 and joined:
                    widths.append(width)
        places = (place for width in widths for place in self.readers.get(width, ()))
        return any(place > after and place != layer.place for place in places)

    def heads_by_name(self) -> dict[nn.Module, str]:
        heads: dict[nn.Module, str] = {}
        for layer in self.layers:
            in_words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", layer.path)
            *region, leaf = in_words.lower().split(".")
            is_read = self.is_read(layer, after=layer.place)
            if _HEAD_WORD.search(leaf) and layer.path not in self.repeated:
                if not is_read or leaf in ("head", "classifier", "lm_head"):
                    heads[layer.module] = "output head by name"
                continue
            # Names behind a number belong to parts of a block, such as heads of attention.
            outer = itertools.takewhile(lambda part: not part.isdigit(), region)
            named = next((part for part in outer if _HEAD_WORD.search(part)), None)
            if named and not is_read:
                heads[layer.module] = f"output head by name: last layer of {named}"
        return heads

    def heads_by_size(self) -> dict[nn.Module, str]:
        reason = "output head: as many outputs as an embedding has entries"
        return {
            x.module: reason
            for x in self.layers
            if x.outputs in self.vocabularies
            and x.outputs != x.inputs
            and x.path not in self.repeated
            and not self.is_read(x, x.place)
        }

    def last_layer(self) -> dict[nn.Module, str]:
        linears = [x for x in self.layers if not isinstance(x.module, _CONV)]
        if len(self.layers) > 1 and not self.is_read(self.layers[-1]):
            linears = self.layers  # the last layer is an output, of whatever kind
        layers = linears or self.layers
        # A convolution alone is a part of a network, and not a network.
        if not linears and len(layers) < 2:
            return {}
        last, kind = layers[-1], type(layers[-1].module).__name__
        if isinstance(last.module, nn.Linear):
            kind = "Linear"
        if not self.is_read(last) or len(self.layers) == 1:
            return {last.module: f"output head: the last {kind}"}
        # A backbone without a head ends in a block, or in a norm.
        if last.path in self.in_blocks or (not linears and self.is_read(last, after=last.place)):
            return {}
        return {last.module: f"doubtful: output head? the last {kind}, as wide as hidden layers"}

    def heads_at_the_end(self) -> dict[nn.Module, str]:
        ends = [x.place for x in self.layers if x.path in self.in_blocks]
        heads = {
            x.module: "output head: behind the last block, read by no layer"
            for x in self.layers
            # The output of a convolution may be concatenated with other channels.
            if not isinstance(x.module, _CONV)
            if ends and x.place > max(ends) and self._is_output(x)
        }
        if len(self.layers) > 1 and self._is_output(self.layers[-1]):
            heads.setdefault(self.layers[-1].module, "output head: the last layer, read by none")
        return heads

    def siblings(self, heads: set[nn.Module], by_name: bool) -> dict[nn.Module, tuple[str, str]]:
        first = next((x for x in self.layers if x.module in heads), None)
        found: dict[nn.Module, tuple[str, str]] = {}
        for x in self.layers:
            if first is None or (x.parent, x.inputs) != (first.parent, first.inputs):
                continue
            both_conv = isinstance(x.module, _CONV) == isinstance(first.module, _CONV)
            if x.module in heads or not both_conv or not self._is_output(x, after=x.place):
                continue
            # A layer without a head's name before a named head probably belongs to the body.
            if by_name and x.place < first.place:
                reason = f"doubtful: another output head beside {first.path}?"
                found[x.module] = ("matrix", reason)
            else:
                found[x.module] = ("head", f"output head beside {first.path}, read by no layer")
        return found

    def _is_output(self, layer: _Layer, after: int = -1) -> bool:
        """Return True for a layer outside repeated blocks whose output no layer seems to read."""
        # A multiple of the input is a fused projection (q, k, v; gates); one row is a vector.
        fused = layer.outputs % layer.inputs == 0
        alone = layer.path not in self.repeated
        return alone and layer.outputs > 1 and not fused and not self.is_read(layer, after)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of inputs and outputs of a linear layer, None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _CONV) and module.groups == 1:
        return module.in_channels, module.out_channels
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if type(module).__name__ == "Conv1D" and weight is not None:  # of transformers
        return weight.shape[0], weight.shape[1]
    return None


def _read_widths(module: nn.Module) -> Iterator[int]:
    """Yield the widths of what a module reads, or of what its output is added to.

    For a norm it is the size of the gain, for an embedding the size of its vectors.
    """
    if isinstance(module, ParametrizationList):
        return
    sizes = [getattr(module, name, None) for name in _INPUT_SIZES]
    yield from {size for size in sizes if isinstance(size, int)}
    own = dict(module.named_parameters(recurse=False))
    if _widths(module) and not isinstance(module, (nn.Linear, _CONV)):
        yield own["weight"].shape[0]
    elif not hasattr(module, "in_features") and not isinstance(module, _CONV):
        weight = own.get("weight")
        if weight is not None and weight.ndim == 1:
            yield weight.shape[0]
        # A parameter of a module of the user's own may be multiplied from either side.
        for name, parameter in own.items():
            if parameter.ndim >= 2 and "embed" not in name and not is_embedding(module):
                yield from {size for size in parameter.shape if size > 1}


def _is_inner(path: str, module: nn.Module) -> bool:
    """Return True for the output projection inside torch's own attention."""
    parent, _, leaf = path.rpartition(".")
    return leaf == "out_proj" and isinstance(module.get_submodule(parent), nn.MultiheadAttention)


def is_embedding(module: nn.Module) -> bool:
    """Return True for an embedding of torch, or of another project by the name of its class."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    weight = module._parameters.get("weight")
    named = type(module).__name__.lower().endswith("embedding")
    return named and weight is not None and weight.ndim == 2 and _widths(module) is None


def is_adapter(name: str) -> bool:
    """Return True if a parameter or module belongs to a low-rank adapter, by its name."""
    return any(part.lower().startswith("lora_") for part in name.split("."))

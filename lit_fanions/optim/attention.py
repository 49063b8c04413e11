"""Heads of attention: into how many matrices each projection is cut.

Queries, keys and values have rows for each head, output projections columns. Apart from ``usage``,
because heads are sizes that the attention module declares, and not the layer with the weight.
"""

from __future__ import annotations

import re

from torch import nn

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERY = re.compile(r"w?q|query|(to_)?q(_proj|_lin)?|query_proj")
_KEY_VALUE = re.compile(r"w?[kv]|key|value|(to_)?[kv](_proj|_lin)?|(key|value)_proj")
FUSED = re.compile(r"w?qkv(_proj)?|to_qkv|c_attn|attn_qkv|query_key_value|in_proj")
_OUTPUT = re.compile(r"w?o|o_proj|out_proj|c_proj|proj|dense|out_lin|to_out|out|projection")

Heads = dict[str, int]


def find_attention_heads(module: nn.Module) -> dict[tuple[nn.Module, str], Heads]:
    """Return the heads of the projections of attention in a network.

    Found for nn.MultiheadAttention, and for modules that declare a number of heads (num_heads,
    num_attention_heads, num_key_value_heads, ..., of their own or of their ``config``) and have a
    projection of queries, keys and values by name. The key is (module, name of its parameter), the
    value {"count": heads, "dim": 0 for rows or 1 for columns}.
    """
    found: dict[tuple[nn.Module, str], Heads] = {}
    for parent in module.modules():
        if isinstance(parent, nn.MultiheadAttention):
            rows = {"count": parent.num_heads, "dim": 0}
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                found[parent, name] = rows
            found[parent.out_proj, "weight"] = {**rows, "dim": 1}
            continue
        layers = {name.lower(): child for name, child in parent.named_children()}
        query = next((x for name, x in layers.items() if _QUERY.fullmatch(name)), None)
        fused = any(FUSED.fullmatch(name) for name in layers)
        count = _declared(parent, _COUNTS)
        if count and (query is not None or fused):
            key_values = _declared(parent, _KEY_VALUE_COUNTS) or count
            for name, layer in layers.items():
                heads = _heads_of_layer(name, layer, count, key_values)
                if heads is not None:
                    found[layer, "weight"] = heads
    return {key: heads for key, heads in found.items() if heads["count"] > 1}


def _heads_of_layer(name: str, layer: nn.Module, count: int, key_values: int) -> Heads | None:
    """Return the heads of a layer of an attention module; None where they do not fit."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    outputs, inputs = weight.shape if type(layer).__name__ != "Conv1D" else weight.shape[::-1]
    if _OUTPUT.fullmatch(name):
        return None if inputs % count else {"count": count, "dim": 1}
    fused = count + 2 * key_values
    for pattern, rows in ((_QUERY, count), (_KEY_VALUE, key_values), (FUSED, fused)):
        if pattern.fullmatch(name) and outputs % rows == 0:
            return {"count": rows, "dim": 0}
    return None


def _declared(parent: nn.Module, names: tuple[str, ...]) -> int | None:
    sources = (parent, getattr(parent, "config", None))
    values = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)

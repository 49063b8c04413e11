"""What a parameter is used as: a matrix and in which form, an embedding, a head, a vector, other.

Apart from ``parameters.py``, which puts the user's wishes first, because this half knows kinds of
modules. It decides by structure before names: the class of the module, the
sizes that the module declares, the shapes of parameters beside it; names last.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lit_fanions.optim.attention import FUSED
from lit_fanions.optim.heads import is_adapter, is_embedding
from lit_fanions.optim.matrices import matrix_shapes, shape_text

DOUBTFUL = "doubtful: "

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))
# Names under which modules of other projects declare how many inputs and outputs they have.
_DECLARED = (
    ("in_features", "out_features"), ("input_size", "output_size"), ("in_dim", "out_dim"),
    ("input_dim", "output_dim"),
)  # fmt: skip


class Place(NamedTuple):
    """Where a parameter is used: its full name, the module, and the tensor that is made of it."""

    name: str
    owner: nn.Module
    tensor: str
    is_gain: bool = False  # of weight_norm


class Rule(NamedTuple):
    """The standard group that a parameter's use asks for, why, and its form as matrices."""

    group: str
    reason: str
    options: dict[str, Any]


def places(module: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Return the places where each parameter of a module is used; tied parameters have several."""
    modules = dict(module.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, list[Place]] = {}
    for path, owner in modules.items():
        own = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
        for attribute, parameter in own.items():
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(owner, ParametrizationList):
                parent, _, tensor = f".{path}".rpartition(".")
                user = modules[parent.removesuffix(".parametrizations").removeprefix(".")]
                is_gain = parameter.numel() < max(p.numel() for p in own.values())
            else:
                user, (tensor, is_gain) = owner, _old_parametrization(attribute, own)
            found.setdefault(parameter, []).append(Place(name, user, tensor, is_gain))
    return found


def _old_parametrization(attribute: str, own: dict[str, nn.Parameter]) -> tuple[str, bool]:
    """Return the tensor that a parameter makes under torch's older hooks, and if it is a gain."""
    stem, _, ending = attribute.rpartition("_")
    if ending in ("g", "v") and {f"{stem}_g", f"{stem}_v"} <= own.keys():
        return stem, own[attribute].numel() < own[f"{stem}_v"].numel()
    return (stem, False) if ending == "orig" else (attribute, False)


def classify(
    parameter: nn.Parameter, used: list[Place], heads: dict[nn.Module, tuple[str, str]]
) -> Rule:
    """Return what a parameter is used as at its places, with the heads of ``find_heads``."""
    if parameter.numel() == 0:
        return Rule("other", f"{shape_text(parameter)} has no entries", {})
    for name, owner, *_ in used:  # all places, because their order must not matter
        if is_embedding(owner):
            others = [place.name for place in used if place.name != name]
            tied = f", tied to {', '.join(others)}" if others else ""
            return Rule("embedding", f"{type(owner).__name__}{tied}", {})
    if parameter.ndim < 2:
        return Rule("vector", f"{parameter.ndim}-D", {})
    name, owner, tensor, is_gain = used[0]
    kind = type(owner).__name__
    if is_gain:
        return Rule("vector", f"gain of weight_norm in {kind}", {})
    if isinstance(owner, _NORM):
        return Rule("vector", f"gain of {kind}", {})
    by_position = re.search(r"(^|[._])rel(ative)?_[^.]*bias\.", name)
    if isinstance(owner, nn.Linear) and by_position:
        return Rule("other", f"biases by relative position, as a {kind}", {})
    for place in used:
        if place.owner in heads and place.tensor == "weight":
            return Rule(*heads[place.owner], _fitting(parameter, place.owner, "weight"))
    known = structure(owner, tensor)
    if known is None:
        return _thin(parameter, _raw(parameter, used[0]))
    reason, options = known
    if not options:
        return Rule("other", reason, {})
    try:
        return _thin(parameter, Rule("matrix", reason, options))
    except ValueError:
        reason = f"{DOUBTFUL}{shape_text(parameter)} does not fit the {tensor} of a {kind}"
        return Rule("other", reason, {})


def structure(owner: nn.Module, tensor: str) -> tuple[str, dict[str, Any]] | None:
    """Return why a parameter of a known module is a matrix, and its form, empty if it is none."""
    kind = type(owner).__name__
    if isinstance(owner, nn.Linear) and tensor == "weight":
        return f"weight of {kind}", {"layout": "flatten"}
    if isinstance(owner, (*_CONV, *_CONV_TRANSPOSED)) and tensor == "weight":
        groups = owner.groups
        if groups > 1 and groups == owner.in_channels:
            return f"depthwise {kind}: a filter per channel is no matrix", {}
        transposed = isinstance(owner, _CONV_TRANSPOSED)
        options = {"layout": "transposed" if transposed else "flatten"}
        if groups > 1:
            return f"weight of {kind} in {groups} groups", {**options, "splits": groups}
        return f"weight of {kind}", options
    if isinstance(owner, nn.MultiheadAttention) and tensor.endswith("proj_weight"):
        fused = tensor == "in_proj_weight"
        reason = f"{'q, k, v' if fused else tensor[0]} of {kind}"
        return reason, {"layout": "flatten", **({"splits": 3} if fused else {})}
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) and tensor.startswith("weight_"):
        gates = next((number for cls, number in _GATES if isinstance(owner, cls)), 1)
        if gates == 1 or tensor.startswith("weight_hr"):
            return f"weight of {kind}", {"layout": "flatten"}
        return f"{gates} gates of {kind}", {"layout": "flatten", "splits": gates}
    if isinstance(owner, nn.Bilinear):
        return f"{kind}: a form per output is no matrix", {}
    return None


def matrix_form(parameter: nn.Parameter, used: list[Place]) -> dict[str, Any]:
    """Return the form of a parameter that only the user calls a matrix."""
    form = _fitting(parameter, used[0].owner, used[0].tensor) if parameter.ndim > 1 else {}
    return form or {"layout": "flatten"}


def _fitting(parameter: nn.Parameter, owner: nn.Module, tensor: str) -> dict[str, Any]:
    known = structure(owner, tensor)
    if known is not None:
        return known[1]
    return {"layout": "transposed"} if _orientation(parameter, owner, tensor) == "in x out" else {}


def _raw(parameter: nn.Parameter, place: Place) -> Rule:
    """Return the use of a parameter of a module that torch does not have."""
    owner, kind, leaf = place.owner, type(place.owner).__name__, place.tensor.lower()
    shape = shape_text(parameter)
    if isinstance(owner, nn.ParameterList):  # its own name stands before the number
        leaf = "_".join(place.name.lower().split(".")[-3:])
    if sum(size > 1 for size in parameter.shape) < 2:
        return Rule("other", f"{shape} is a vector in more dimensions", {})
    if getattr(parameter, "_no_weight_decay", False):
        return Rule("other", f"marked _no_weight_decay in {kind}", {})
    if _is_bias(parameter, owner, place.tensor):
        return Rule("other", f"biases of {kind}", {})
    if "norm" in kind.lower():
        return Rule("vector", f"gain of {kind}", {})
    orientation = _orientation(parameter, owner, place.tensor)
    if parameter.ndim == 2 and orientation is not None:
        layout = "transposed" if orientation == "in x out" else "flatten"
        return Rule("matrix", f"{orientation} weight of {kind}", {"layout": layout})
    if parameter.shape[0] == 1:
        return Rule("other", f"{shape} is broadcast", {})
    if _NO_MATRIX.search(leaf):
        return Rule("other", f"looked up, added or multiplied entry by entry in {kind}", {})
    if leaf.endswith("_log") or leaf.startswith("log_"):
        return Rule("other", f"logarithms of {kind}", {})
    inputs = getattr(owner, "in_features", None)
    if isinstance(inputs, int) and inputs not in parameter.shape:
        return Rule("other", f"{DOUBTFUL}{shape} of {kind}, which has {inputs} inputs", {})
    if parameter.ndim == 2:
        sure = leaf == "weight" or is_adapter(place.name)
        reason = f"2-D parameter of {kind}"
        return Rule("matrix", reason if sure else f"{DOUBTFUL}a {reason}", {"layout": "flatten"})
    if parameter.ndim == 3:
        return _stack(parameter, owner, place.tensor)
    return Rule("other", f"{parameter.ndim}-D parameter of {kind}", {})


# Words in names of parameters that are looked up, added, or multiplied entry by entry. A word may
# be the start of one: pos_embedding, embedding; not proposal.
_NO_MATRIX = re.compile(
    "^wpe$|(^|_)(pos|token|embed|table|rel|relative|rpb|latent|query|queries|codebook|prototype|"
    "prompt|alpha|beta|gamma|scale|lambda|decay|temperature)(_|s$|$|it|ding)"
)


def _is_bias(parameter: nn.Parameter, owner: nn.Module, name: str) -> bool:
    """Return True for biases, by name or because a stack of matrices beside it has their sizes."""
    if re.search(r"(^|_)bias(es)?\d*($|_)", name.lower()):
        return True
    if parameter.ndim != 2:
        return False
    beside = [p.shape for p in owner.parameters(recurse=False) if p.ndim == 3]
    return any(parameter.shape[0] == s[0] and parameter.shape[1] in s[1:] for s in beside)


def _orientation(parameter: nn.Parameter, owner: nn.Module, name: str) -> str | None:
    """Return "in x out" or "out x in" where the module shows how it uses a weight, else None.

    Shown by sizes that it declares, or by a bias beside the weight: one entry (for a stack of
    matrices one row) is added to each output.
    """
    *_, rows, cols = parameter.shape
    if type(owner).__name__ == "Conv1D":  # of transformers; a square weight shows nothing
        return "in x out"
    for inputs, outputs in _DECLARED:
        declared = (getattr(owner, inputs, None), getattr(owner, outputs, None))
        if declared == (cols, rows):
            return "out x in"
        if declared == (rows, cols):
            return "in x out"
    own = dict(owner.named_parameters(recurse=False))
    stem = name.removesuffix("weight")
    biases = [own.get(bias) for bias in (f"{stem}bias", f"{stem}_bias", f"{name}_bias")]
    for bias in biases:
        if bias is None or bias.ndim != parameter.ndim - 1 or rows == cols:
            continue
        if bias.shape[-1] in (rows, cols):
            return "out x in" if bias.shape[-1] == rows else "in x out"
    return None


def _stack(parameter: nn.Parameter, owner: nn.Module, name: str) -> Rule:
    """Return the use of a 3-D parameter: a stack of matrices, for each expert or of q, k and v."""
    count, kind = parameter.shape[0], type(owner).__name__
    declared = [
        value for key, value in vars(owner).items() if "expert" in key and isinstance(value, int)
    ]
    biases = [
        p for p in owner.parameters(recurse=False)
        if p.ndim == 2 and p.shape[0] == count and p.shape[1] in parameter.shape[1:]
    ]  # fmt: skip
    if min(parameter.shape) > 1 and parameter.shape[1] * parameter.shape[2] == count:
        reason = f"{DOUBTFUL}a {count}x{count} matrix of {kind}, by heads?"
        return Rule("matrix", reason, {"layout": "flatten"})
    is_fused = count == 3 and FUSED.fullmatch(name.lower()) is not None
    sure = is_fused or count in declared or bool(biases) or "expert" in f"{kind}.{name}".lower()
    orientation = _orientation(parameter, owner, name) or _orientation_by_pair(parameter, owner)
    layout = "batch_transposed" if orientation == "in x out" else "batch"
    square = parameter.shape[1] == parameter.shape[2]
    sure = sure and (square or orientation is not None)
    form = "" if square else f"{orientation or 'out x in'} "
    reason = f"stack of {count} {form}matrices of {kind}"
    return Rule("matrix", reason if sure else f"{DOUBTFUL}a {reason}?", {"layout": layout})


def _orientation_by_pair(parameter: nn.Parameter, owner: nn.Module) -> str | None:
    """Return how a stack is stored where two stacks of a module can be chained in one way only.

    The outputs of one stack (or half of them, if gated) are then the inputs of the other, and vice
    versa.
    """
    stacks = [p.shape for p in owner.parameters(recurse=False) if p.ndim == 3]
    found = set()
    for up in stacks:
        for down in stacks:
            if parameter.shape not in (up, down):
                continue
            if up[1] == down[2] and up[2] == 2 * down[1]:
                found.add("in x out")
            if up[2] == down[1] and up[1] == 2 * down[2]:
                found.add("out x in")
    return found.pop() if len(found) == 1 else None


def _thin(parameter: nn.Parameter, rule: Rule) -> Rule:
    """Return the rule, or "other" for matrices of one row or one column, which are vectors."""
    if rule.group != "matrix":
        return rule
    for _, rows, cols in shapes(parameter, rule.options):
        if min(rows, cols) == 1:
            return Rule("other", f"{rows}x{cols} is a vector", {})
    return rule


def shapes(parameter: Tensor, options: dict[str, Any]) -> list[torch.Size]:
    """Return the (count, rows, cols) of a parameter's matrices under a group's options."""
    layout, splits = options.get("layout", "flatten"), options.get("splits")
    return matrix_shapes(parameter.shape, layout, splits)

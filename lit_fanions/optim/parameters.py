"""Which parameter goes to which group, and why."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lit_fanions.optim.algorithms import is_entrywise, oracle
from lit_fanions.optim.matrices import matrix_shapes
from lit_fanions.optim.options import default_options
from lit_fanions.optim.step_sizes import step_size_factor

# The attribute by which a user tags a parameter: parameter.fanion_group = "embedding".
TAG = "fanion_group"
STANDARD_GROUPS = ("matrix", "embedding", "head", "vector", "other")

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))


class _Place(NamedTuple):
    """Where a parameter is used: its full name, the module, and the tensor that it is, or makes."""

    name: str
    owner: nn.Module
    tensor: str


@dataclass(frozen=True)
class Assignment:
    """Where one parameter goes.

    Attributes:
        name: Its name in ``module.named_parameters()``.
        parameter: The parameter.
        group: Name of its group.
        reason: Why.
        role: The standard group that its part in the network gives it, chosen or not.
        options: Options that its shape asks for: ``layout`` and ``splits`` of a matrix.
    """

    name: str
    parameter: nn.Parameter
    group: str
    reason: str
    role: str
    options: dict[str, Any] = field(default_factory=dict)


class _Rule(NamedTuple):
    group: str
    reason: str
    options: dict[str, Any]


def assign(
    module: nn.Module, selectors: dict[str, tuple[list[str], list[str]]] | None = None
) -> list[Assignment]:
    """Assigns every trainable parameter of a module to a group.

    A tag (``parameter.fanion_group = "name"``) decides first, then the selectors in their order,
    then the parameter's part in the network: the kind of its module, tying, position, shape.
    Frozen parameters are left out.

    Args:
        module: The network.
        selectors: Group name -> (patterns of parameter names as in fnmatch, names of module
            classes).

    Returns:
        An assignment for each trainable parameter, in the order of ``named_parameters()``.

    Raises:
        ValueError: If a selector matches nothing, or a lazy parameter has no shape yet.
    """
    selectors = selectors or {}
    owners = _places(module)
    _check_selectors(module, owners, selectors)
    heads = _heads(module)
    assignments, adapters = [], []
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name} has no shape yet: run one batch through the lazy module before its "
                "optimizer is made"
            )
        if not parameter.requires_grad:
            continue
        rule = _rule(name, parameter, owners[parameter], heads)
        group, reason = rule.group, rule.reason
        chosen = _selected(parameter, owners[parameter], selectors)
        options = rule.options
        if chosen is not None:
            group, reason = chosen
            options = options or _layout(owners[parameter])
        elif group == "matrix" and _is_adapter(name):
            adapters.append(name)
        assignments.append(Assignment(name, parameter, group, reason, rule.group, options))
    if adapters:
        warnings.warn(
            f"{len(adapters)} low-rank adapter matrices ({adapters[0]}, ...) go to the matrix "
            "group: their product, not each of them, is the weight; choose another group by "
            "overrides if that is not meant",
            stacklevel=2,
        )
    return assignments


def _places(module: nn.Module) -> dict[nn.Parameter, list[_Place]]:
    """Every place where each parameter is used: tied ones have several."""
    modules = dict(module.named_modules(remove_duplicate=False))
    places: dict[nn.Parameter, list[_Place]] = {}
    for path, owner in modules.items():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            # Parametrisations, new and old, hold the parameters that a weight is made of.
            tensor = re.sub(r"_(g|v|orig)$", "", attribute)
            if isinstance(owner, ParametrizationList):
                parent, _, tensor = f".{path}".rpartition(".")
                place = modules[parent.removesuffix(".parametrizations").removeprefix(".")]
                places.setdefault(parameter, []).append(_Place(name, place, tensor))
            else:
                places.setdefault(parameter, []).append(_Place(name, owner, tensor))
    return places


def _rule(
    name: str,
    parameter: nn.Parameter,
    owners: list[_Place],
    heads: dict[nn.Module, str],
) -> _Rule:
    for full, owner, _ in owners:  # all places where it is used: order must not matter
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            others = [other for other, _, _ in owners if other != full]
            tied = f", tied to {', '.join(others)}" if others else ""
            return _Rule("embedding", f"{type(owner).__name__}{tied}", {})
    if parameter.ndim < 2:
        return _Rule("vector", f"{parameter.ndim}-D", {})
    _, owner, tensor = owners[0]
    kind = type(owner).__name__
    if isinstance(owner, _NORM):
        return _Rule("vector", f"gain of {kind}", {})
    for place in owners:
        if place.owner in heads and place.tensor == "weight":
            return _Rule("head", heads[place.owner], {})
    structural = _structure(owner, tensor)
    if structural is None:
        return _raw(name, parameter, kind)
    reason, options = structural
    if not options and reason:
        return _Rule("other", reason, {})
    return _thin(parameter, _Rule("matrix", reason, options))


def _structure(owner: nn.Module, tensor: str) -> tuple[str, dict[str, Any]] | None:
    """Why a parameter of a known module is a matrix and how; no options: why it is none."""
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
        gates = 1 if tensor.startswith("weight_hr") else _gates(owner)
        if gates == 1:
            return f"weight of {kind}", {"layout": "flatten"}
        return f"{gates} gates of {kind}", {"layout": "flatten", "splits": gates}
    if isinstance(owner, nn.Bilinear):
        return f"{kind}: a form per output is no matrix", {}
    return None


def _gates(owner: nn.Module) -> int:
    return next((gates for kind, gates in _GATES if isinstance(owner, kind)), 1)


def _raw(name: str, parameter: nn.Parameter, kind: str) -> _Rule:
    """A parameter that a module of the user's own holds: shape and, last, name decide."""
    leaf = _leaf(name).lower()
    if sum(size > 1 for size in parameter.shape) < 2:
        return _Rule("other", f"{_shape(parameter)} is a vector in more dimensions", {})
    if parameter.shape[0] == 1 or _is_positional(leaf) or _has_word(leaf, "token|embed"):
        return _Rule("other", f"positional or token parameter of {kind}", {})
    if parameter.ndim == 2:
        return _thin(parameter, _Rule("matrix", f"2-D parameter of {kind}", {"layout": "flatten"}))
    if parameter.ndim == 3:
        reason = f"stack of {parameter.shape[0]} matrices of {kind}"
        return _thin(parameter, _Rule("matrix", reason, {"layout": "batch"}))
    return _Rule("other", f"{parameter.ndim}-D parameter of {kind}", {})


def _thin(parameter: nn.Parameter, rule: _Rule) -> _Rule:
    """Matrices of one row or one column are vectors."""
    for _, rows, cols in _shapes(parameter, rule.options):
        if min(rows, cols) == 1:
            return _Rule("other", f"{rows}x{cols} is a vector", {})
    return rule


def _shapes(parameter: Tensor, options: dict[str, Any]) -> list[torch.Size]:
    layout, splits = options.get("layout", "flatten"), options.get("splits")
    return matrix_shapes(parameter.shape, layout, splits)


def _layout(owners: list[_Place]) -> dict[str, Any]:
    """How a parameter is a matrix that only the user calls one."""
    _, owner, tensor = owners[0]
    structural = _structure(owner, tensor)
    return (structural[1] if structural else {}) or {"layout": "flatten"}


def _heads(module: nn.Module) -> dict[nn.Module, str]:
    """Output heads: by name or tying; else by an embedding's vocabulary; else the last Linear."""
    embeddings = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.Embedding)]
    linears = [
        (path, m)
        for path, m in module.named_modules()
        if isinstance(m, nn.Linear) and not _is_adapter(path)
    ]
    tables = {id(m.weight) for _, m in embeddings}
    named: dict[nn.Module, str] = {
        m: "output head by name"
        for path, m in linears
        if _leaf(path) in ("head", "classifier")
        or any(part.startswith("lm_head") for part in path.split("."))
    }
    if named or any(id(m.weight) in tables for _, m in linears):
        return named  # a tied head goes where its embedding goes
    # Sizes that say nothing are left out: a table of positions, a square matrix.
    vocabularies = {m.num_embeddings for path, m in embeddings if not _is_positional(_leaf(path))}
    sized = [
        (path, m)
        for path, m in linears
        if m.out_features in vocabularies and m.out_features != m.in_features
    ]
    # A hidden layer may have that width by chance, in every block; heads are last, side by side.
    if sized:
        parent = sized[-1][0].rpartition(".")[0]
        reason = "output head: as many outputs as an embedding has entries"
        return {m: reason for path, m in sized if path.rpartition(".")[0] == parent}
    plain = [m for path, m in linears if not path.endswith("out_proj")]
    return {plain[-1]: "output head: the last Linear"} if plain else {}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _is_positional(leaf: str) -> bool:
    return leaf == "wpe" or _has_word(leaf, "pos")


def _has_word(leaf: str, words: str) -> bool:
    """Whether a name has a word that starts so: pos_embedding and cls_token, not proposal."""
    return re.search(rf"(^|_)({words})(_|s$|$|it|ding)", leaf.lower()) is not None


def _is_adapter(name: str) -> bool:
    return any(part.lower().startswith("lora_") for part in name.split("."))


def _selected(
    parameter: nn.Parameter,
    owners: list[_Place],
    selectors: dict[str, tuple[list[str], list[str]]],
) -> tuple[str, str] | None:
    tag = getattr(parameter, TAG, None)
    if tag is not None:
        return tag, f"tagged {TAG}"
    for group, (patterns, kinds) in selectors.items():
        for full, owner, _ in owners:
            for pattern in patterns:
                if fnmatch.fnmatchcase(full, pattern):
                    return group, f"name matches {pattern!r}"
            for cls in type(owner).__mro__:
                if cls.__name__ in kinds:
                    return group, f"parameter of {cls.__name__}"
    return None


def _check_selectors(
    module: nn.Module,
    owners: dict[nn.Parameter, list[_Place]],
    selectors: dict[str, tuple[list[str], list[str]]],
) -> None:
    names = [full for places in owners.values() for full, _, _ in places]
    kinds = {cls.__name__ for m in module.modules() for cls in type(m).__mro__}
    for group, (patterns, classes) in selectors.items():
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"overrides.{group}.parameters: no parameter's name matches {pattern!r} "
                    f"(names are like {names[0] if names else 'none'!r}; * stands for anything)"
                )
        for cls in classes:
            if cls not in kinds:
                raise ValueError(f"overrides.{group}.modules: the model has no module {cls!r}")


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


class Split(list[Assignment]):
    """Assignments, printable as a table with each group's lr and step-size factor.

    Attributes:
        options: What the configuration says of each group, by its name.
    """

    def __init__(self, assignments: list[Assignment], options: dict[str, dict[str, Any]]) -> None:
        super().__init__(assignments)
        self.options = options

    def group_options(self, assignment: Assignment) -> dict[str, Any]:
        """The options of the group of an assignment, with what its shape asks for."""
        options = self.options[assignment.group]
        if is_entrywise(options["algorithm"]):
            return options
        return {**assignment.options, **options}

    def __str__(self) -> str:
        """The table: parameter, shape, group, algorithm, lr, step-size factor, reason."""
        header = ("parameter", "shape", "group", "algorithm", "lr", "factor", "reason")
        rows = [header, *map(self._row, self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines)

    def _row(self, assignment: Assignment) -> tuple[str, ...]:
        options = self.group_options(assignment)
        options = {**default_options(options["algorithm"]), **options}
        return (
            assignment.name,
            _shape(assignment.parameter) or "scalar",
            assignment.group,
            _algorithm(options),
            f"{options['lr']:g}",
            " ".join(_factors(assignment.parameter, options)),
            assignment.reason,
        )


def _algorithm(options: dict[str, Any]) -> str:
    """The algorithm's name, and where its options are not what the name stands for."""
    meant = default_options(options["algorithm"])
    names = ("rank", "alpha", "blend", "error_feedback")
    own = [f"{n}={options[n]}" for n in names if n in meant and options[n] != meant[n]]
    return options["algorithm"] + (f"({','.join(own)})" if own else "")


def _factors(parameter: Tensor, options: dict[str, Any]) -> Iterator[str]:
    """The step-size factor of each matrix of a parameter, ~ where it depends on the momentum."""
    if is_entrywise(options["algorithm"]):
        return
    for _, rows, cols in _shapes(parameter, options):
        length = oracle(options, rows, cols).length(rows, cols)
        factor = step_size_factor(options["scale"], rows, cols, length)
        yield "~" if factor is None else f"{factor:.4g}"

"""Which parameter goes to which group, and why."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lit_fanions.optim.algorithms import describe_step, is_entrywise, oracle
from lit_fanions.optim.attention import find_attention_heads
from lit_fanions.optim.groups import resolve_heads
from lit_fanions.optim.heads import find_heads, is_adapter
from lit_fanions.optim.matrices import shape_text
from lit_fanions.optim.options import default_options
from lit_fanions.optim.reporting import caller_level
from lit_fanions.optim.split_table import Row, format_summary, format_table
from lit_fanions.optim.update import static_factor
from lit_fanions.optim.usage import DOUBTFUL, Place, classify, matrix_form, places, shapes

# The attribute by which a user tags a parameter: parameter.fanion_group = "embedding".
TAG = "fanion_group"
# The attribute by which many projects mark parameters that must not decay.
NO_DECAY = "_no_weight_decay"
STANDARD_GROUPS = ("matrix", "embedding", "head", "vector", "other")


@dataclass(frozen=True)
class Assignment:
    """Where one parameter goes.

    Attributes:
        name: Its name in ``module.named_parameters()``.
        parameter: The parameter.
        group: Name of its group.
        reason: Why; a reason that begins with "doubtful" is a guess.
        role: Its standard group by use, before tags and selectors.
        options: Options that its shape asks for: ``layout`` and ``splits`` of a matrix, and the
            ``heads`` that its module declares.
    """

    name: str
    parameter: nn.Parameter
    group: str
    reason: str
    role: str
    options: dict[str, Any] = field(default_factory=dict)


def assign(
    module: nn.Module, selectors: dict[str, tuple[list[str], list[str]]] | None = None
) -> list[Assignment]:
    """Assign every trainable parameter of a module to a group, in the module's order.

    A tag (``parameter.fanion_group = "name"``) decides first, then the selectors in their order,
    then what the parameter is used as (``usage``). Selectors are (patterns of parameter names as in
    fnmatch, names of module classes) by group; one that matches nothing is refused. Frozen
    parameters are left out. One warning names the decisions that are guesses, and how to make them.
    """
    selectors = selectors or {}
    used = places(module)
    _check_selectors(module, used, selectors)
    heads, attention = find_heads(module), find_attention_heads(module)
    assignments = []
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name} has no shape yet: run one batch through the lazy module before its "
                "optimizer is made"
            )
        if not parameter.requires_grad:
            continue
        rule = classify(parameter, used[parameter], heads)
        group, reason, options = rule.group, rule.reason, rule.options
        chosen = _selected(parameter, used[parameter], selectors)
        if chosen is not None:
            group, reason = chosen
            options = options or matrix_form(parameter, used[parameter])
        declared = attention.get((used[parameter][0].owner, used[parameter][0].tensor))
        if declared and options:
            options = {**options, "heads": declared}
        assignments.append(Assignment(name, parameter, group, reason, rule.group, options))
    _warn_of_guesses(assignments)
    return assignments


def _warn_of_guesses(assignments: list[Assignment]) -> None:
    adapters = [a.name for a in assignments if a.group == a.role == "matrix" and is_adapter(a.name)]
    if adapters:
        warnings.warn(
            f"{len(adapters)} low-rank adapter matrices ({adapters[0]}, ...) go to the matrix "
            "group: their product, not each of them, is the weight; choose another group by "
            "overrides if that is not meant",
            stacklevel=caller_level(),
        )
    doubtful = [a for a in assignments if a.reason.startswith(DOUBTFUL)]
    if doubtful:
        first = doubtful[0]
        warnings.warn(
            f"the groups of {len(doubtful)} parameters are guesses, such as {first.group!r} for "
            f"{first.name} ({first.reason}): print(split_parameters(module)) shows them; choose by "
            f'overrides, or by parameter.{TAG} = "matrix" or another group',
            stacklevel=caller_level(),
        )


def _selected(
    parameter: nn.Parameter, owners: list[Place], selectors: dict[str, tuple[list[str], list[str]]]
) -> tuple[str, str] | None:
    tag = getattr(parameter, TAG, None)
    if tag is not None:
        return tag, f"tagged {TAG}"
    for group, (patterns, kinds) in selectors.items():
        for full, owner, *_ in owners:
            for pattern in patterns:
                if fnmatch.fnmatchcase(full, pattern):
                    return group, f"name matches {pattern!r}"
            for cls in type(owner).__mro__:
                if cls.__name__ in kinds:
                    return group, f"parameter of {cls.__name__}"
    return None


def _check_selectors(
    module: nn.Module,
    owners: dict[nn.Parameter, list[Place]],
    selectors: dict[str, tuple[list[str], list[str]]],
) -> None:
    names = [full for used in owners.values() for full, *_ in used]
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


class Split(list[Assignment]):
    """Assignments, printable as a table with each group's lr and step-size factor.

    Attributes:
        options: What the configuration says of each group, by its name.
    """

    def __init__(self, assignments: list[Assignment], options: dict[str, dict[str, Any]]) -> None:
        super().__init__(assignments)
        self.options = options

    def group_options(self, assignment: Assignment) -> dict[str, Any]:
        """Return the options of an assignment's group, with what its shape and marks ask for."""
        options = self.options[assignment.group]
        if not is_entrywise(options["algorithm"]):
            declared = dict(assignment.options)
            heads = declared.pop("heads", None)
            options = {**declared, **options}
            if options.get("heads") == "auto":
                options["heads"] = heads
            options = resolve_heads(options, f"{assignment.name} in group {assignment.group!r}")
            if options.get("heads", 0) is None:
                del options["heads"]
        return {**options, "weight_decay": 0.0} if self._is_spared(assignment) else options

    def group_name(self, assignment: Assignment) -> str:
        """Return the name of the parameter group: options that differ need groups of their own."""
        options = self.group_options(assignment)
        layout, splits = options.get("layout", "flatten"), options.get("splits")
        parts = [layout] if layout != "flatten" else []
        if isinstance(splits, dict):
            parts.append(f"columns{splits['count']}")
        elif splits is not None:
            parts.append(f"splits{splits}".replace(" ", ""))
        parts += ["no_decay"] if self._is_spared(assignment) else []
        return ".".join([assignment.group, *parts])

    def _is_spared(self, assignment: Assignment) -> bool:
        """Return True for a parameter marked against the weight decay that its group has."""
        decays = bool(self.options[assignment.group].get("weight_decay"))
        return decays and bool(getattr(assignment.parameter, NO_DECAY, False))

    def __str__(self) -> str:
        """Return the table; parameters of repeated blocks that are treated alike share a line."""
        return format_table([self._row(assignment) for assignment in self])

    def summary(self) -> str:
        """Return the table, or one line for each group where the table is long."""
        return format_summary([self._row(assignment) for assignment in self])

    def _row(self, assignment: Assignment) -> Row:
        options = self.group_options(assignment)
        options = {**default_options(options["algorithm"]), **options}
        return Row(
            assignment.name,
            _shape(assignment.parameter, options),
            assignment.group,
            _algorithm(options),
            describe_step(options)[0],
            f"{options['lr']:g}",
            " ".join(_radii(assignment.parameter, options)),
            assignment.parameter.numel(),
            assignment.reason,
        )


def _algorithm(options: dict[str, Any]) -> str:
    """Return the algorithm's name, and options that differ from what the name stands for."""
    meant = default_options(options["algorithm"])
    names = ("rank", "alpha", "blend", "error_feedback")
    own = [f"{n}={options[n]}" for n in names if n in meant and options[n] != meant[n]]
    return options["algorithm"] + (f"({','.join(own)})" if own else "")


def _shape(parameter: Tensor, options: dict[str, Any]) -> str:
    """Return the shape of a parameter, and its matrices where they are others: 24x8: 3 of 8x8."""
    shape = shape_text(parameter) or "scalar"
    if is_entrywise(options["algorithm"]) or parameter.ndim < 2 or not parameter.numel():
        return shape
    parts = shapes(parameter, options)
    if parts == [(1, *parameter.shape)]:
        return shape
    return f"{shape}: {', '.join(f'{count} of {rows}x{cols}' for count, rows, cols in parts)}"


def _radii(parameter: Tensor, options: dict[str, Any]) -> Iterator[str]:
    """Yield lr times the step-size factor of each matrix, ~ where that depends on the momentum."""
    if is_entrywise(options["algorithm"]) or not parameter.numel():
        return
    for _, rows, cols in shapes(parameter, options):
        factor = static_factor(oracle(options, rows, cols), options)
        yield "~" if factor is None else f"{float(options['lr']) * factor:.4g}"

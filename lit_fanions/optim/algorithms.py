"""The table of algorithms: names that stand for a ball and options of it.

Beside ``lmo.balls``, which says what each ball is: an algorithm is a ball by the name users know,
with the options that it stands for (f_muon: the spectral ball blended with Frobenius at .5), or
one of torch's entrywise optimizers. Whoever wants to know what a group of ``Fanion`` computes asks
``oracle``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lit_fanions.checks import check_choice
from lit_fanions.lmo import BALLS, Case, Oracle, Settings

Rank = int | float | Literal["full"]
Group = Mapping[str, Any]  # a parameter group of an optimizer, with its options

_LOW_RANK = 0.25
DEFAULT_ALGORITHM = "muon"


@dataclass(frozen=True)
class AlgorithmEntry:
    """What a name stands for."""

    kind: str  # matrix, for directions of a ball; adamw or sgd, for torch's own steps
    ball: str = ""  # name of the ball in ``lmo.BALLS``; empty unless the kind is matrix
    # Options that the name stands for. Explicit options win.
    options: Mapping[str, Any] = field(default_factory=dict)


def matrix_algorithm(ball: str, **options: Any) -> AlgorithmEntry:
    """Return the entry of an algorithm that steps in a ball, with options of its own."""
    whole = {"rank": "full", "alpha": 1.0, "blend": "frobenius"}
    return AlgorithmEntry("matrix", ball, {**whole, **options})


ALGORITHMS: dict[str, AlgorithmEntry] = {
    "muon": matrix_algorithm("fanion"),
    "neon": matrix_algorithm("fanion", rank=1),
    "fanion": matrix_algorithm("fanion", rank=_LOW_RANK),
    "kyfan": matrix_algorithm("kyfan", rank=_LOW_RANK),
    "nsgd": matrix_algorithm("frobenius"),
    "schatten": matrix_algorithm("schatten"),
    "signum": matrix_algorithm("sign"),
    "coordinate": matrix_algorithm("coordinate"),
    "row": matrix_algorithm("row"),
    "column": matrix_algorithm("column"),
    "f_muon": matrix_algorithm("fanion", alpha=0.5),
    "f_neon": matrix_algorithm("fanion", rank=1, alpha=0.5),
    "f_fanion": matrix_algorithm("fanion", rank=_LOW_RANK, alpha=0.5),
    "s_muon": matrix_algorithm("fanion", alpha=0.5, blend="sign"),
    "s_neon": matrix_algorithm("fanion", rank=1, alpha=0.5, blend="sign"),
    "s_fanion": matrix_algorithm("fanion", rank=_LOW_RANK, alpha=0.5, blend="sign"),
    "dion": matrix_algorithm(
        "dion", rank=_LOW_RANK, error_feedback=True, scale="spectral_unclamped"
    ),
    "cosmos": matrix_algorithm("fanion", adapt="leading", nesterov=False, scale="match_rms_adamw"),
    "adamw": AlgorithmEntry("adamw"),
    "sgd": AlgorithmEntry("sgd"),
}
# Algorithms that take tensors of any shape.
ANY_SHAPE = tuple(
    name
    for name, algorithm in ALGORITHMS.items()
    if algorithm.kind != "matrix" or BALLS[algorithm.ball].any_shape
)


def find_algorithm(name: str) -> AlgorithmEntry:
    """Return an algorithm by its name; refuse one that the table does not have."""
    check_choice("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def is_entrywise(name: str) -> bool:
    """Return whether torch's own AdamW or SGD steps groups of an algorithm."""
    return find_algorithm(name).kind != "matrix"


def describe_step(options: Mapping[str, Any]) -> tuple[str, str]:
    """Return the ball that a group steps in, in words, and the direction as a formula."""
    name = find_algorithm(options["algorithm"]).ball
    if not name:
        return "", "torch's own step, entry by entry"
    # What the dual of the Ky Fan norm is called at full rank and at rank 1.
    special = {"full": "spectral", 1: "nuclear"} if name == "fanion" else {}
    ball, alpha = BALLS[special.get(options["rank"], name)], options["alpha"]
    summary, direction = ball.summary, ball.direction
    if alpha != 1:
        partner = BALLS[options["blend"]]
        summary += f" + {partner.summary}"
        direction = f"{alpha:g} ({direction}) + {1 - alpha:g} ({partner.direction})"
    if options.get("adapt") == "leading":
        summary += ", Adam in a subspace"
        direction += " of M outside a leading subspace, Adam inside"
    return summary, direction


def algorithm_docs() -> str:
    """Return the algorithms with their balls and directions as rows of a docstring."""
    rows = [
        (name, *describe_step({"algorithm": name, **entry.options}))
        for name, entry in ALGORITHMS.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = (f"{n:{widths[0]}}  {s:{widths[1]}}  {d}".rstrip() for n, s, d in rows)
    return "\n".join(f"        {line}" for line in lines)


def is_foreign(source: str, target: str) -> bool:
    """Return whether two algorithms step by different rules and so need lr of their own.

    All balls are one kind; adamw and sgd are kinds of their own.
    """
    return find_algorithm(source).kind != find_algorithm(target).kind


def resolve_rank(rank: Rank, rows: int, cols: int) -> int:
    """Return the rank that an option asks for in a rows x cols matrix; 0 for one without entries.

    The option is a whole number, clamped to the matrix; a fraction of min(rows, cols); or "full".
    """
    limit = min(rows, cols)
    if rank == "full":
        return limit
    return min(limit, max(1, round(rank * limit))) if isinstance(rank, float) else min(rank, limit)


# Groups have no tolerance: their solvers start warm and make a fixed number of steps.
_SETTINGS = tuple(f.name for f in fields(Settings) if "tol" not in f.name)


def oracle(group: Mapping[str, Any], rows: int, cols: int) -> Oracle:
    """Return the oracle that steps the rows x cols matrices of a group.

    Args:
        group: Options of a matrix group of ``Fanion``.
        rows: Number of rows.
        cols: Number of columns.
    """
    k = resolve_rank(group["rank"], rows, cols)
    settings = tuple(group[name] for name in _SETTINGS)
    return _oracle(group["algorithm"], k, rows, cols, group["alpha"], group["blend"], settings)


@functools.lru_cache(maxsize=1024)
def _oracle(
    name: str, k: int, rows: int, cols: int, alpha: float, blend: str, settings: tuple[Any, ...]
) -> Oracle:
    ball = BALLS[ALGORITHMS[name].ball]
    options = dict(zip(_SETTINGS, settings, strict=True))
    if options["sign_scale"] is None:
        options["sign_scale"] = 1.0 if "sign_scale" in ball.reads else (rows * cols) ** -0.5
    return Oracle(ball, Case(k, rows, cols, Settings(**options)), alpha, BALLS[blend])

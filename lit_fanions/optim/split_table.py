"""A split as text: one line for each parameter, or for the same parameter of repeated blocks.

Apart from ``parameters.py``, because how a table is folded and how wide it is has nothing to do
with what stands in it.
"""

from __future__ import annotations

import math
import textwrap
from typing import NamedTuple

from lit_fanions.optim.usage import DOUBTFUL

_WIDTH = 120  # columns, at which logs and terminals still show a line whole
_LINES = 20  # of a table that needs no summary
_REASONS = 3  # in the line of a group
_SHORTEST = {"parameter": 24, "reason": len("weight of Linear")}


class Row(NamedTuple):
    """A line of the table; its fields are the columns."""

    parameter: str
    shape: str
    group: str
    algorithm: str
    ball: str
    lr: str
    radius: str
    size: int
    reason: str


def format_table(rows: list[Row]) -> str:
    """Return rows as a table of at most 120 columns, where the names allow that.

    Rows that differ in numbers within the name alone become one: ``blocks.0..23.norm.weight``. Its
    size is the sum of their sizes. A name that is too long for its column has a line of its own.
    """
    cells = [[f"{x:,}" if isinstance(x, int) else x for x in row] for row in _fold(rows)]
    cells.insert(0, [*Row._fields])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    left = _WIDTH - sum(width + 2 for width in widths[1:]) - 2 - _SHORTEST["reason"]
    widths[0] = min(widths[0], max(left, _SHORTEST["parameter"]))
    return "\n".join(line for row in cells for line in _lines(row, widths))


def format_summary(rows: list[Row]) -> str:
    """Return the table if it is short, else a line for each group and how to see the table.

    The line of a group has its first parameter, and guesses before other reasons.
    """
    table = format_table(rows)
    if len(table.splitlines()) <= _LINES:
        return table
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.group, row.algorithm, row.ball, row.lr), []).append(row)
    every = "every parameter: print(split_parameters(module)), or python -m lit_fanions params"
    return f"{format_table([_sum(own) for own in groups.values()])}\n{every}"


def _sum(rows: list[Row]) -> Row:
    """Return the line of a group."""
    others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    shapes, radii = ({getattr(row, name) for row in rows} for name in ("shape", "radius"))
    every = dict.fromkeys(row.reason for row in rows)
    reasons = sorted(every, key=lambda text: not text.startswith(DOUBTFUL))
    more = [f"and {len(reasons) - _REASONS} other reasons"] if len(reasons) > _REASONS else []
    return rows[0]._replace(
        parameter=rows[0].parameter + others,
        shape=rows[0].shape if len(shapes) == 1 else f"{len(shapes)} shapes",
        radius=rows[0].radius if len(radii) == 1 else "several",
        size=sum(row.size for row in rows),
        reason="; ".join([*reasons[:_REASONS], *more]),
    )


def _lines(row: list[str], widths: list[int]) -> list[str]:
    """Return the lines of a row: a long name before its cells, a long reason after them."""
    *cells, reason = row
    above = [cells[0]] if len(cells[0]) > widths[0] else []
    cells[0] = "" if above else cells[0]
    line = "".join(cell.ljust(width) + "  " for cell, width in zip(cells, widths, strict=True))
    if len(line + reason) <= _WIDTH:
        return [*above, (line + reason).rstrip()]
    indent = " " * 4
    below = textwrap.wrap(reason, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [*above, line.rstrip(), *below]


def _fold(rows: list[Row]) -> list[Row]:
    """Return the rows with those merged that differ only in the numbers of their names."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row.parameter.split("."))
        alike.setdefault((pattern, *row[1:]), []).append(row)
    return [line for same in alike.values() for line in _merge(same)]


def _merge(rows: list[Row]) -> list[Row]:
    """Return one row where the numbers of the names are all combinations, else several."""
    names = [row.parameter.split(".") for row in rows]
    values = [list(dict.fromkeys(parts)) for parts in zip(*names, strict=True)]
    if math.prod(map(len, values)) == len(rows):
        name = ".".join(_span(parts) for parts in values)
        return [rows[0]._replace(parameter=name, size=sum(row.size for row in rows))]
    # Apart by the first number that varies, until each part is complete.
    first = next(i for i, parts in enumerate(values) if len(parts) > 1)
    return [
        line
        for value in values[first]
        for line in _merge(
            [r for r, parts in zip(rows, names, strict=True) if parts[first] == value]
        )
    ]


def _span(parts: list[str]) -> str:
    """Return 0..3 for 0, 1, 2, 3; 0,2,5 for numbers with gaps; one part as it is."""
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(map(int, parts))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(map(str, numbers))

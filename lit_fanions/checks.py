"""Checks of arguments that every room makes, with errors of one form.

On the ground floor, because norms, solvers, optimizer, callbacks and the command line all refuse
bad values, and should do so in the same words.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(given), list(allowed), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError if the argument ``name`` is not one of the allowed names."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(value, allowed)
        raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}{hint}")


def check_flag(name: str, value: object) -> bool:
    """Return the argument ``name``, or raise ValueError if it is not True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def whole_number(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """Return a whole number from ``least`` to ``most`` as an int, or raise ValueError.

    Integers of NumPy are accepted, booleans are not.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")
    return int(value)


def real_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    below: float = math.inf,
    *,
    above: float = -math.inf,
) -> float:
    """Return a finite number of at least ``least``, below ``below`` and above ``above`` as a float.

    Numbers of NumPy are accepted; booleans, NaN and numbers outside these bounds raise ValueError.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        finite = number and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        finite = False
    if not finite or not (least <= value < below and value > above):
        raise ValueError(f"{name} must be a number {_interval(least, below, above)}, got {value!r}")
    return float(value)


def exponent(name: str, value: Any) -> float:
    """Return the exponent of a norm, infinity or a number of at least 1, or raise ValueError."""
    infinite = isinstance(value, numbers.Real) and value == math.inf
    return math.inf if infinite else real_number(name, value, 1.0)


def _interval(least: float, below: float, above: float) -> str:
    if least > -math.inf:
        return f"in [{least:g}, {below:g})" if below < math.inf else f"of at least {least:g}"
    return f"above {above:g}" if above > -math.inf else "that is finite"

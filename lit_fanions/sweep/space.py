"""Parse the values that a sweep gives to options of fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_fanions.cli.console import Refused

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Choice:
    """Values to try, as they are passed to fit."""

    values: tuple[str, ...]

    def suggest(self, trial: Trial, name: str) -> str:
        """Return a value that the sampler of a study chooses."""
        return trial.suggest_categorical(name, self.values)

    def examples(self) -> tuple[str, ...]:
        """Return values that fit must accept."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A range of numbers to search, on a logarithmic scale or among the integers if asked for."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Trial, name: str) -> str:
        """Return a value that the sampler of a study chooses."""
        if self.whole:
            return str(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(name, self.low, self.high, log=self.log))

    def examples(self) -> tuple[str, ...]:
        """Return values that fit must accept."""
        return tuple(str(int(end)) if self.whole else repr(end) for end in (self.low, self.high))


Values = Choice | Range
Space = dict[str, Values]  # by the name of the option


def parse(choices: Iterable[str], ranges: Iterable[str]) -> Space:
    """Parse the arguments of --set and --tune.

    Args:
        choices: Arguments of --set: NAME=VALUE,VALUE,...
        ranges: Arguments of --tune: NAME=LOW:HIGH, then :log, :int or both.

    Raises:
        Refused: If an argument cannot be parsed, or an option occurs twice.
    """
    space: Space = {}
    for text in choices:
        _add(space, "--set", text, _choice, "NAME=1,2,3")
    for text in ranges:
        _add(space, "--tune", text, _range, "NAME=1e-3:1:log")
    return space


def short(name: str) -> str:
    """Return the name of an option without `init_args`, which fit adds by itself."""
    return name.replace(".init_args", "")


def number(text: str) -> float | str:
    """Return a text as a number if it is one, so that 1 and 1.0 are the same value."""
    try:
        return float(text)
    except ValueError:
        return text


def _add(space: Space, option: str, text: str, read: Callable[[str], Values], example: str) -> None:
    name, _, values = text.partition("=")
    name = name.removeprefix("--")
    if not (name and values):
        raise Refused(f"{option} {text}: write it like {option} {example}")
    if short(name) in map(short, space):
        raise Refused(f"{option} {text}: the option is given twice; list all its values at once")
    try:
        space[name] = read(values)
    except ValueError as error:
        raise Refused(f"{option} {text}: {error}") from None


def _choice(text: str) -> Choice:
    values = tuple(value.strip() for value in _parts(text))
    if "" in values:
        raise ValueError("a value is missing before, after or between the commas")
    if len(set(map(number, values))) < len(values):
        raise ValueError("a value occurs twice")
    return Choice(values)


def _parts(text: str) -> list[str]:
    """Split a text at the commas that are outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not (depth or quote):
            parts.append("")
        else:
            parts[-1] += letter
        if depth < 0:
            break
    if depth or quote:
        raise ValueError("a bracket or a quote is not closed")
    return parts


def _range(text: str) -> Range:
    low_text, _, rest = text.partition(":")
    high_text, *flags = rest.split(":")
    if not set(flags) <= {"log", "int"}:
        raise ValueError("LOW:HIGH can be followed by :log, :int or both")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise ValueError("LOW:HIGH must be two numbers") from None
    log, whole = "log" in flags, "int" in flags
    if not -math.inf < low < high < math.inf:
        raise ValueError("LOW must be below HIGH")
    if log and low <= 0:
        raise ValueError("LOW must be above 0 with :log")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ValueError("LOW and HIGH must be integers with :int")
    return Range(low, high, log, whole)

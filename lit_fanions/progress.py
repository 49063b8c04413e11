"""How far a long work is and how long the rest takes, in lines for the person who waits.

On a terminal the line is rewritten; elsewhere (logs, CI) plain lines follow each other.
"""

from __future__ import annotations

import math
import sys
import time

_SILENT = 5.0  # seconds; a shorter work reports nothing
_REWRITE = 0.5  # seconds between two versions of the line on a terminal
_REPEAT = 30.0  # seconds between two plain lines


class Progress:
    """Count works that have ended, and estimate how long the others will take."""

    def __init__(self, total: int, ended: int = 0) -> None:
        self._total, self._before, self._ended = total, ended, ended
        self._start = time.monotonic()

    def advance(self, name: str, outcome: str, ended: int | None = None) -> str:
        """Count a work that has ended, and return the line that reports its outcome.

        ``ended`` is the number that have ended where other processes work on them too.
        """
        self._ended = self._ended + 1 if ended is None else ended
        line = f"[{self._ended}/{self._total}] {name}: {outcome}"
        left, done = self._total - self._ended, self._ended - self._before
        if left <= 0 or done <= 0:
            return line
        seconds = (time.monotonic() - self._start) / done * left
        return f"{line}; about {format_duration(seconds)} left"


class Meter:
    """Reports on stderr how far one work is; the amounts are in any unit.

    Args:
        work: What is being done, such as "checking last.ckpt".
        total: Amount of the whole work; inf if it is not known.
        done: Amount that was done before, and took no time of this work.
    """

    def __init__(self, work: str, total: float = math.inf, done: float = 0.0) -> None:
        self.work, self.total = work, total
        self._rewrites = sys.stderr.isatty()
        self._shown = False
        self.restart(done)

    def __enter__(self) -> Meter:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal's line empty."""
        if self._shown and self._rewrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def restart(self, done: float) -> None:
        """Start the clock where so much is done already."""
        self.done = self._before = done
        self._start = time.monotonic()
        self._next = self._start + _SILENT

    def advance(self, amount: float = 1.0) -> None:
        """Count what was done, and report if it is time to."""
        self.reach(self.done + amount)

    def is_due(self) -> bool:
        """Return True if the next report is due, for details that cost time."""
        return time.monotonic() >= self._next

    def reach(self, done: float, detail: str = "") -> None:
        """Report that so much is done if it is time to; ``detail`` follows the share."""
        self.done, now = done, time.monotonic()
        if now < self._next:
            return
        # The longer the work, the rarer its plain lines: some hundreds in a log of days.
        self._next = now + (_REWRITE if self._rewrites else max(_REPEAT, (now - self._start) / 50))
        self._shown = True
        line = f"{self.work}: {self._describe(now - self._start, detail)}"
        form = ("\r", "\x1b[K") if self._rewrites else ("", "\n")
        print(f"{form[0]}{line}", end=form[1], file=sys.stderr, flush=True)

    def _describe(self, seconds: float, detail: str) -> str:
        parts = [detail] if detail else []
        if math.isfinite(self.total) and self.total > 0:
            share = min(1.0, self.done / self.total)
            parts.insert(0, f"{share:.0%}")
            if (done := self.done - self._before) > 0 and share < 1:
                left = seconds / done * (self.total - self.done)
                parts.append(f"about {format_duration(left)} left")
        return "; ".join(parts or [f"{format_duration(seconds)} so far"])


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that leaves it two or three digits at most."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

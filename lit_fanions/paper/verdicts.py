"""The rules by which claims of the paper that have a spread are judged."""

import math
from collections.abc import Callable, Sequence

from lit_fanions.paper.outcome import Verdict
from lit_fanions.paper.runs import spread

ERRORS = 2  # standard errors by which means must differ to count as different
PART = 0.25  # of the distance between a good and a bad one that counts as little

Sample = Sequence[float]


def difference(a: Sample, b: Sample) -> tuple[float, float]:
    """Difference of the means of two independent samples, a's minus b's, and its standard error."""
    (mean_a, deviation_a), (mean_b, deviation_b) = spread(a), spread(b)
    return mean_a - mean_b, math.hypot(
        deviation_a / math.sqrt(len(a)), deviation_b / math.sqrt(len(b))
    )


def told(a: Sample, b: Sample, form: str = "{:+.4f} ± {:.4f}") -> str:
    """The difference with its standard error, in words."""
    return form.format(*difference(a, b)) + " (standard error)"


def larger(a: Sample, b: Sample) -> Verdict:
    """Whether a's mean is larger: by more than two standard errors of the difference."""
    return _verdict([a, b], lambda: _beyond(a, b))


def equal(a: Sample, b: Sample) -> Verdict:
    """Whether the means are within two standard errors of each other."""
    return _verdict([a, b], lambda: not _beyond(a, b) and not _beyond(b, a))


def at_most(a: Sample, b: Sample) -> Verdict:
    """Whether a's mean is not larger by more than two standard errors of the difference."""
    return _verdict([a, b], lambda: not _beyond(a, b))


def nearly(a: Sample, good: Sample, bad: Sample) -> Verdict:
    """Whether a is nearly as good: at most a quarter of the way to the bad one, or equal."""

    def holds() -> bool:
        whole = abs(difference(good, bad)[0])
        return abs(difference(a, good)[0]) <= PART * whole or not (
            _beyond(a, good) or _beyond(good, a)
        )

    return _verdict([a, good, bad], holds)


def far_above(a: Sample, good: Sample, bad: Sample) -> Verdict:
    """Whether a is far above the bad one: more than half of the way to the good one."""

    def holds() -> bool:
        return _beyond(a, bad) and difference(a, bad)[0] > difference(good, bad)[0] / 2

    return _verdict([a, good, bad], holds)


def _beyond(a: Sample, b: Sample) -> bool:
    distance, error = difference(a, b)
    return distance > ERRORS * error


def _verdict(samples: Sequence[Sample], holds: Callable[[], bool]) -> Verdict:
    if any(len(sample) < 2 for sample in samples):
        return "not testable here"  # without a spread
    return "confirmed" if holds() else "refuted"

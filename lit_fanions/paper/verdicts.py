"""The rules by which claims of the paper about means with a spread are judged.

All look at the 95 % confidence interval of a difference of means (Welch's). Where it does not
tell, or something diverged, the verdict is "not testable here": want of data neither confirms nor
refutes.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from lit_fanions.paper.outcome import Verdict
from lit_fanions.paper.runs import spread

PART = 0.25  # of the distance between a good and a bad one that counts as little
# Student's t at 97.5 %, by degrees of freedom; between two of them the larger quantile.
_QUANTILES = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip

Sample = Sequence[float]


def difference(a: Sample, b: Sample) -> tuple[float, float]:
    """Difference of the means of two independent samples, a's minus b's, and half its interval.

    The half is infinite where a sample is a single value.
    """
    (mean_a, deviation_a), (mean_b, deviation_b) = spread(a), spread(b)
    if len(a) < 2 or len(b) < 2:
        return mean_a - mean_b, math.inf
    parts = [deviation_a**2 / len(a), deviation_b**2 / len(b)]
    squares = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
    freedom = sum(parts) ** 2 / squares if squares else math.inf
    quantile = min((t for least, t in _QUANTILES.items() if least <= freedom), default=math.inf)
    return mean_a - mean_b, quantile * math.sqrt(sum(parts))


def told(a: Sample, b: Sample) -> str:
    """The difference with its interval, in words."""
    if len(a) < 2 or len(b) < 2:
        return f"{difference(a, b)[0]:+.4f}"
    return "{:+.4f} ± {:.4f} (95 %)".format(*difference(a, b))


def of(holds: bool) -> Verdict:
    """The verdict on what is either so or not, as an identity between norms."""
    return "confirmed" if holds else "refuted"


def majority(count: int, n: int) -> bool:
    """Whether a fair coin shows so many heads, or more, with less than 5 % (sign test)."""
    return sum(math.comb(n, k) for k in range(count, n + 1)) / 2**n < 0.05


def signs(counts: Iterable[int], n: int, needed: Callable[[Iterable[bool]], bool] = all) -> Verdict:
    """Whether something holds in most problems, by sign tests at 5 %.

    Args:
        counts: In how many problems, of each part of the claim.
        n: Number of problems.
        needed: ``all`` parts or ``any``. Refuted if the tests say the opposite: that a part holds
            in fewer than half (``all``), or every part does (``any``).
    """
    counts = list(counts)
    if needed(majority(count, n) for count in counts):
        return "confirmed"
    against = (majority(n - count, n) for count in counts)
    return "refuted" if (any if needed is all else all)(against) else "not testable here"


def larger(a: Sample, b: Sample, margin: float) -> Verdict:
    """Whether a's mean is larger; refuted if it is by less than a margin, if at all."""
    return _verdict(*difference(a, b), confirmed_above=0, refuted_below=margin)


def at_most(a: Sample, b: Sample, margin: float) -> Verdict:
    """Whether a's mean is larger by no more than a margin."""
    distance, half = difference(b, a)
    return _verdict(distance, half, confirmed_above=-margin, refuted_below=-margin)


def equal(a: Sample, b: Sample, margin: float) -> Verdict:
    """Whether the means differ by no more than a margin."""
    distance, half = difference(a, b)
    return _verdict(-abs(distance), half, confirmed_above=-margin, refuted_below=-margin)


def nearly(a: Sample, good: Sample, bad: Sample) -> Verdict:
    """Whether a is nearly as good, or better: at most a quarter of the way to the bad one."""
    towards, half = difference(a, good)
    whole = difference(good, bad)[0]
    sign, limit = math.copysign(1, whole), -PART * abs(whole)
    return _verdict(sign * towards, half, confirmed_above=limit, refuted_below=limit)


def far_above(a: Sample, good: Sample, bad: Sample) -> Verdict:
    """Whether a is far above the bad one: more than half of the way to the good one."""
    distance, half = difference(a, bad)
    limit = difference(good, bad)[0] / 2
    return _verdict(distance, half, confirmed_above=limit, refuted_below=limit)


def _verdict(distance: float, half: float, confirmed_above: float, refuted_below: float) -> Verdict:
    if not all(map(math.isfinite, (distance, half, confirmed_above, refuted_below))):
        return "not testable here"
    if distance - half > confirmed_above:
        return "confirmed"
    return "refuted" if distance + half < refuted_below else "not testable here"

"""The rules by which claims of the paper are judged.

Those about means look at the 95 % confidence interval of the mean difference at equal seeds
(Student's). Where it does not tell, or something diverged, the verdict is "not testable here": want
of data neither confirms nor refutes.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from experiments.paper.outcome import Verdict
from lit_fanions.cli.runner import spread

PART = 0.25  # of the distance between a good and a bad one that counts as little
# Student's t at 97.5 %, by degrees of freedom; between two of them the larger quantile.
_QUANTILES = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip

Sample = Mapping[int, float]  # by seed, or by what else two samples have in common


def difference(a: Sample, b: Sample) -> tuple[float, float]:
    """Mean of the differences a - b at equal seeds, and half its interval.

    A seed is an initialisation and an order of the data, which both samples share: what it does to
    both is no part of the difference. The half is infinite with less than two such seeds.
    """
    both = [a[seed] - b[seed] for seed in a if seed in b]
    if len(both) < 2:
        return (both or [math.nan])[0], math.inf
    mean, deviation = spread(both)
    quantile = min(t for least, t in _QUANTILES.items() if least <= len(both) - 1)
    return mean, quantile * deviation / math.sqrt(len(both))


def told(a: Sample, b: Sample) -> str:
    """The difference with its interval, in words."""
    distance, half = difference(a, b)
    return f"{distance:+.4f}" + (f" ± {half:.4f} (95 %)" if math.isfinite(half) else "")


def of(holds: bool) -> Verdict:
    """The verdict on what is either so or not, as an identity between norms."""
    return "confirmed" if holds else "refuted"


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim of several parts, all of which have to hold."""
    found = set(verdicts)
    if "refuted" in found:
        return "refuted"
    return "confirmed" if found == {"confirmed"} else "not testable here"


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
    """Whether a's mean is larger by more than a margin."""
    return _above(*difference(a, b), margin)


def at_most(a: Sample, b: Sample, margin: float) -> Verdict:
    """Whether a's mean is larger by no more than a margin."""
    distance, half = difference(b, a)
    return _above(distance, half, -margin)


def equal(a: Sample, b: Sample, margin: float) -> Verdict:
    """Whether the means differ by no more than a margin."""
    distance, half = difference(a, b)
    return _above(-abs(distance), half, -margin)


def nearly(a: Sample, good: Sample, bad: Sample) -> Verdict:
    """Whether a is as large as the good one, but for a quarter of its distance to the bad one.

    Nothing can be said where the good one is not the larger.
    """
    distance, half = difference(a, good)
    return _above(distance, half, -PART * _gap(good, bad))


def far_above(a: Sample, good: Sample, bad: Sample) -> Verdict:
    """Whether a is above the bad one by more than half of the good one's distance to it.

    Nothing can be said where the good one is not the larger.
    """
    distance, half = difference(a, bad)
    return _above(distance, half, _gap(good, bad) / 2)


def _gap(good: Sample, bad: Sample) -> float:
    """How much larger the good one is; NaN if that is not certain."""
    distance, half = difference(good, bad)
    return distance if distance > half else math.nan


def _above(distance: float, half: float, limit: float) -> Verdict:
    """Whether a distance, known but for half an interval, is above a limit."""
    if not all(map(math.isfinite, (distance, half, limit))):
        return "not testable here"
    if distance - half > limit:
        return "confirmed"
    return "refuted" if distance + half < limit else "not testable here"

"""The statistics by which claims of the paper are judged.

A claim has one or several parts, and each part is tested in both directions: a P value for it and
one for its opposite, compared with 5 %. Where one of several tests suffices for a verdict, the
P values are corrected by Holm's method, because each further test is another chance to be wrong.
Missing data neither confirm nor refute: the verdict is then "not testable here".

Comparisons of means use the differences at equal seeds (paired t-test): a part holds where the
95 % confidence interval of the mean difference lies above a limit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

from experiments.paper.outcome import Verdict
from lit_fanions.cli.console import require

LEVEL = 0.05
SMALL_SHARE = 0.25  # share of the distance between good and bad that counts as little

Sample = Mapping[int, float]  # value by seed, or by another key that two samples share


def _stats() -> ModuleType:
    """Return scipy.stats, which takes a second to import and only verdicts need."""
    return require("scipy.stats", "the verdict on a claim")


class Evidence(NamedTuple):
    """The P values of one part of a claim; NaN if it cannot be tested.

    Attributes:
        holds: P value for the part: small if it holds.
        fails: P value for the opposite: small if the part does not hold.
    """

    holds: float
    fails: float


class Difference(NamedTuple):
    """The mean difference of two samples at equal seeds.

    Attributes:
        mean: The mean difference.
        error: Standard error of the mean; NaN with fewer than two common seeds.
        freedom: Degrees of freedom.
    """

    mean: float
    error: float
    freedom: int

    def __str__(self) -> str:
        """Return the difference with its 95 % interval."""
        half = self.half_interval()
        return f"{self.mean:+.4f}" + (f" ± {half:.4f} (95 %)" if math.isfinite(half) else "")

    def half_interval(self) -> float:
        """Return half the length of the 95 % interval; NaN with fewer than two common seeds."""
        return float(_stats().t.ppf(1 - LEVEL / 2, self.freedom)) * self.error

    def is_above(self, limit: float) -> Evidence:
        """Return the evidence that the mean difference is above a limit.

        The P values are two-sided, so that one is below 5 % where the 95 % interval lies on one
        side of the limit.
        """
        distance = self.mean - limit
        if not (math.isfinite(distance) and math.isfinite(self.error)):
            return Evidence(math.nan, math.nan)
        if self.error == 0:
            return Evidence(float(distance <= 0), float(distance >= 0))
        t = distance / self.error
        above, below = float(_stats().t.sf(t, self.freedom)), float(_stats().t.cdf(t, self.freedom))
        return Evidence(min(1.0, 2 * above), min(1.0, 2 * below))


def mean_difference(a: Sample, b: Sample) -> Difference:
    """Return the mean of a - b at equal seeds.

    A seed stands for an initialisation and an order of the data, which both samples share: pairing
    takes their influence out of the difference.
    """
    pairs = [a[seed] - b[seed] for seed in a if seed in b]
    mean = sum(pairs) / len(pairs) if pairs else math.nan
    if len(pairs) < 2 or not math.isfinite(mean):
        return Difference(mean, math.nan, max(len(pairs) - 1, 1))
    return Difference(mean, statistics.stdev(pairs) / math.sqrt(len(pairs)), len(pairs) - 1)


# One part of a claim.


def sign_test(count: int, n: int) -> Evidence:
    """Return the evidence that something holds in most problems.

    Args:
        count: Number of problems in which it holds.
        n: Number of problems.
    """
    holds, fails = (
        float(_stats().binomtest(k, n, alternative="greater").pvalue) for k in (count, n - count)
    )
    return Evidence(holds, fails)


def larger(a: Sample, b: Sample, margin: float) -> Evidence:
    """Return the evidence that the mean of a is larger by more than a margin."""
    return mean_difference(a, b).is_above(margin)


def at_most(a: Sample, b: Sample, margin: float) -> Evidence:
    """Return the evidence that the mean of a is larger by no more than a margin."""
    return mean_difference(b, a).is_above(-margin)


def equal(a: Sample, b: Sample, margin: float) -> Evidence:
    """Return the evidence that the means differ by no more than a margin."""
    difference = mean_difference(a, b)
    return difference._replace(mean=-abs(difference.mean)).is_above(-margin)


def almost_as_large(a: Sample, good: Sample, bad: Sample) -> Evidence:
    """Return the evidence that a falls short of good by little.

    Little is a quarter of the distance from good to bad. Not testable where good is not certainly
    larger than bad.
    """
    return mean_difference(a, good).is_above(-SMALL_SHARE * _certain_gap(good, bad))


def far_above(a: Sample, good: Sample, bad: Sample) -> Evidence:
    """Return the evidence that a is above bad by more than half the distance from good to bad.

    Not testable where good is not certainly larger than bad.
    """
    return mean_difference(a, bad).is_above(_certain_gap(good, bad) / 2)


def _certain_gap(good: Sample, bad: Sample) -> float:
    """Return how much larger good is; NaN if its 95 % interval reaches 0."""
    difference = mean_difference(good, bad)
    return difference.mean if difference.is_above(0.0).holds < LEVEL else math.nan


# The verdict on a claim.


def from_bool(holds: bool) -> Verdict:
    """Return the verdict on a statement that is true or false, such as an identity of norms."""
    return "confirmed" if holds else "refuted"


def all_hold(parts: Iterable[Evidence]) -> Verdict:
    """Return the verdict on a claim whose parts must all hold.

    Confirmed if every part holds at 5 %; refuted if one fails at 5 % with Holm's correction.
    """
    parts = list(parts)
    if not parts:
        return "not testable here"
    if min(holm([part.fails for part in parts])) < LEVEL:
        return "refuted"
    return "confirmed" if all(part.holds < LEVEL for part in parts) else "not testable here"


def any_holds(parts: Iterable[Evidence]) -> Verdict:
    """Return the verdict on a claim of which one part suffices.

    Confirmed if one part holds at 5 % with Holm's correction; refuted if every part fails at 5 %.
    """
    opposite = all_hold(Evidence(part.fails, part.holds) for part in parts)
    swapped: dict[Verdict, Verdict] = {"confirmed": "refuted", "refuted": "confirmed"}
    return swapped.get(opposite, opposite)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return P values corrected for their number by Holm's step-down method, in the same order.

    The chance that any of the corrected values falls below a level by luck is at most that level,
    whether the tests are independent or not (S. Holm, 1979). NaN counts as 1.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    corrected, largest = [0.0] * len(known), 0.0
    for rank, i in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[i]))
        corrected[i] = largest
    return corrected

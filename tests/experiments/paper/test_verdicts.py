"""The statistics by which claims are judged."""

import math

import pytest

from experiments.paper import verdicts
from experiments.paper.verdicts import Evidence, all_hold, any_holds, mean_difference, sign_test

stats = pytest.importorskip("scipy.stats")

CONFIRMED, REFUTED, UNKNOWN = "confirmed", "refuted", "not testable here"


def around(center, width=0.002):
    """Samples of three seeds that differ from those of another center by so much and a noise."""
    return {seed: center + seed + x for seed, x in enumerate((-width, width, 0))}


GOOD, BAD = around(1.0, width=0), around(0.0, width=0)
MARGIN = 0.1


def test_mean_difference_is_that_of_a_paired_t_test():
    a, b = [3.0, 5.0, 4.0, 4.5], [1.0, 1.5, 0.5, 2.5]
    difference = mean_difference(dict(enumerate(a)), {**dict(enumerate(b)), 9: 7.0})
    exact = stats.ttest_rel(a, b).confidence_interval()
    assert difference.mean == pytest.approx((exact.low + exact.high) / 2)
    assert difference.half_interval() == pytest.approx((exact.high - exact.low) / 2)
    for limit in (0.0, 2.0, 5.0):
        shifted = [x - limit for x in a]
        holds, fails = (
            stats.ttest_rel(shifted, b, alternative=side).pvalue for side in ("greater", "less")
        )
        expected = (min(1, 2 * holds), min(1, 2 * fails))
        assert difference.is_above(limit) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ({0: 3.0, 1: 5.0}, {0: 1.0, 1: 1.0}, "+3.0000 ± 12.7062 (95 %)"),
        ({0: 3.0, 2: 1.0}, {0: 1.0, 1: 1.0}, "+2.0000"),  # one seed in common
        ({0: 3.0}, {1: 1.0}, "+nan"),
        ({0: math.inf, 1: 1.0}, {0: 1.0, 1: 1.0}, "+inf"),
    ],
)
def test_difference_is_written_with_its_interval(a, b, text):
    assert str(mean_difference(a, b)) == text


RULES = {
    "larger": (lambda x: verdicts.larger(x, GOOD, MARGIN), [1.11, 1.2], [1.09, 0.9]),
    "at most": (lambda x: verdicts.at_most(x, GOOD, MARGIN), [0.5, 1.05], [1.15]),
    "equal": (lambda x: verdicts.equal(x, GOOD, MARGIN), [0.95, 1.05], [0.85, 1.15]),
    "almost": (lambda x: verdicts.almost_as_large(x, GOOD, BAD), [0.8, 1.3], [0.7, -1]),
    "far above": (lambda x: verdicts.far_above(x, GOOD, BAD), [0.6, 2], [0.4, -1]),
}


@pytest.mark.parametrize(("rule", "confirmed", "refuted"), RULES.values(), ids=RULES)
def test_means_are_compared_with_a_limit(rule, confirmed, refuted):
    assert {all_hold([rule(around(center))]) for center in confirmed} == {CONFIRMED}
    assert {all_hold([rule(around(center))]) for center in refuted} == {REFUTED}


@pytest.mark.parametrize(("rule", "confirmed", "refuted"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("blur", ["one value", "a wide spread", "divergence"])
def test_missing_data_decide_nothing(rule, confirmed, refuted, blur):
    for center in (*confirmed, *refuted):
        sample = {
            "one value": {0: center},
            "a wide spread": around(center, width=5),
            "divergence": {0: center, 1: center + 1, 2: math.inf},
        }[blur]
        assert all_hold([rule(sample)]) == UNKNOWN


@pytest.mark.parametrize("rule", [verdicts.almost_as_large, verdicts.far_above])
@pytest.mark.parametrize(("good", "bad"), [(BAD, GOOD), (around(1, width=9), BAD)])
def test_references_out_of_order_decide_nothing(rule, good, bad):
    found = {all_hold([rule(around(x), good, bad)]) for x in (-1, 0, 0.4, 0.6, 1, 2)}
    assert found == {UNKNOWN}


def test_equal_samples_are_above_no_difference_of_zero():
    assert mean_difference(GOOD, GOOD).is_above(0.0) == (1.0, 1.0)
    assert mean_difference(GOOD, GOOD).is_above(-0.1) == (0.0, 1.0)


def test_sign_test_asks_for_a_clear_majority():
    found = [all_hold([sign_test(count, 10)]) for count in (9, 8, 2, 1)]
    assert found == [CONFIRMED, UNKNOWN, UNKNOWN, REFUTED]
    assert sign_test(4, 4).holds == pytest.approx(1 / 16)
    assert sign_test(5, 5).holds == pytest.approx(1 / 32)


@pytest.mark.parametrize(
    ("counts", "every", "some"),
    [
        ((9, 9), CONFIRMED, CONFIRMED),
        ((9, 1), REFUTED, CONFIRMED),
        ((9, 5), UNKNOWN, CONFIRMED),
        ((1, 1), REFUTED, REFUTED),
        ((5, 1), REFUTED, UNKNOWN),
    ],
)
def test_all_parts_or_any_part(counts, every, some):
    parts = [sign_test(count, 10) for count in counts]
    assert (all_hold(parts), any_holds(parts)) == (every, some)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        # By chance, one of six readings has 9 of 10 with 6 %, 10 of 10 with .6 %.
        ((9, 5, 5, 5, 5, 5), UNKNOWN),
        ((10, 5, 5, 5, 5, 5), CONFIRMED),
        ((1, 1, 1, 1, 1, 1), REFUTED),  # all are needed for that: nothing to correct
    ],
)
def test_one_of_six_readings_is_corrected_for_six(counts, verdict):
    assert any_holds(sign_test(count, 10) for count in counts) == verdict


def test_refutation_by_one_of_many_parts_is_corrected():
    for fails, verdict in ((0.02, UNKNOWN), (0.01, REFUTED)):
        parts = [Evidence(1.0, fails), *[Evidence(0.001, 1.0)] * 3]
        assert all_hold(parts) == verdict


def test_false_confirmations_of_any_part_are_rare():
    """Over all outcomes of six independent sign tests of fair coins."""
    n, level, parts = 10, 0.05, 6
    chance = {count: math.comb(n, count) / 2**n for count in range(n + 1)}
    others = [sign_test(5, n)] * (parts - 1)
    confirming = [c for c in chance if any_holds([sign_test(c, n), *others]) == CONFIRMED]
    once = sum(chance[count] for count in confirming)
    assert 0 < 1 - (1 - once) ** parts < level


def test_untestable_parts_confirm_nothing():
    yes, no = Evidence(0.001, 1.0), Evidence(1.0, 0.001)
    nan = Evidence(math.nan, math.nan)
    assert all_hold([yes, nan]) == all_hold([]) == any_holds([]) == UNKNOWN
    assert all_hold([yes, nan, no]) == REFUTED
    assert any_holds([no, nan]) == UNKNOWN
    assert any_holds([no, nan, yes]) == CONFIRMED


def test_holm_corrects_step_by_step():
    # Ascending .01, .02, .03, .04 times 4, 3, 2, 1, and none below the one before.
    assert verdicts.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert verdicts.holm([0.9, 0.5]) == [1.0, 1.0]
    assert verdicts.holm([math.nan, 0.01]) == [1.0, 0.02]
    assert verdicts.holm([]) == []

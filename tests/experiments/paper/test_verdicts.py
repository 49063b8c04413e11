"""The rules by which claims are judged."""

import math

import pytest

from experiments.paper import verdicts


def around(center, width=0.002):
    """Samples of three seeds that differ from those of another center by so much and a noise."""
    return {seed: center + seed + x for seed, x in enumerate((-width, width, 0))}


GOOD, BAD = around(1.0, width=0), around(0.0, width=0)
MARGIN = 0.1


def test_difference_and_its_interval():
    stats = pytest.importorskip("scipy.stats")
    a, b = [3.0, 5.0, 4.0, 4.5], [1.0, 1.5, 0.5, 2.5]
    of_a, of_b = dict(enumerate(a)), dict(enumerate(b))
    distance, half = verdicts.difference(of_a, {**of_b, 9: 7.0})
    exact = stats.ttest_rel(a, b).confidence_interval()
    assert distance == pytest.approx((exact.low + exact.high) / 2)
    assert half == pytest.approx((exact.high - exact.low) / 2, rel=1e-3)
    # Between the table's degrees of freedom never a narrower interval.
    many = {i: (i * 7 % 12) / 3 for i in range(12)}
    exact = stats.ttest_1samp([*many.values()], 0).confidence_interval()
    _, half = verdicts.difference(many, dict.fromkeys(many, 0.0))
    assert 1 <= half / ((exact.high - exact.low) / 2) < 1.02
    assert verdicts.told({0: 3.0, 1: 5.0}, {0: 1.0, 1: 1.0}) == "+3.0000 ± 12.7060 (95 %)"
    assert verdicts.told({0: 3.0, 2: 1.0}, {0: 1.0, 1: 1.0}) == "+2.0000"
    assert verdicts.told({0: 3.0}, {1: 1.0}) == "+nan"


RULES = {
    "larger": (lambda x: verdicts.larger(x, GOOD, MARGIN), [1.11, 1.2], [1.09, 0.9]),
    "at most": (lambda x: verdicts.at_most(x, GOOD, MARGIN), [0.5, 1.05], [1.15]),
    "equal": (lambda x: verdicts.equal(x, GOOD, MARGIN), [0.95, 1.05], [0.85, 1.15]),
    "nearly": (lambda x: verdicts.nearly(x, GOOD, BAD), [0.8, 1.3], [0.7, -1]),
    "far above": (lambda x: verdicts.far_above(x, GOOD, BAD), [0.6, 2], [0.4, -1]),
}


@pytest.mark.parametrize(("rule", "confirmed", "refuted"), RULES.values(), ids=RULES)
def test_rules(rule, confirmed, refuted):
    assert {rule(around(center)) for center in confirmed} == {"confirmed"}
    assert {rule(around(center)) for center in refuted} == {"refuted"}


@pytest.mark.parametrize(("rule", "confirmed", "refuted"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("blur", ["one value", "a wide spread", "divergence"])
def test_want_of_data_decides_nothing(rule, confirmed, refuted, blur):
    for center in (*confirmed, *refuted):
        sample = {
            "one value": {0: center},
            "a wide spread": around(center, width=5),
            "divergence": {0: center, 1: center + 1, 2: math.inf},
        }[blur]
        assert rule(sample) == "not testable here"


def test_sign_tests():
    assert [verdicts.majority(*pair) for pair in ((8, 10), (9, 10), (4, 4), (5, 5))] == [
        *(False, True),
        *(False, True),
    ]
    assert [verdicts.signs([count], 10) for count in (9, 8, 2, 1)] == [
        "confirmed",
        *["not testable here"] * 2,
        "refuted",
    ]
    # Every part is needed, or any.
    pairs = {(9, 9): ("confirmed", "confirmed"), (9, 1): ("refuted", "confirmed")}
    pairs |= {(9, 5): ("not testable here", "confirmed"), (1, 1): ("refuted", "refuted")}
    pairs |= {(5, 1): ("refuted", "not testable here")}
    for counts, (every, some) in pairs.items():
        assert (verdicts.signs(counts, 10), verdicts.signs(counts, 10, any)) == (every, some)


@pytest.mark.parametrize("rule", [verdicts.nearly, verdicts.far_above])
@pytest.mark.parametrize(("good", "bad"), [(BAD, GOOD), (around(1, width=9), BAD)])
def test_nothing_is_measured_by_references_out_of_order(rule, good, bad):
    assert {rule(around(x), good, bad) for x in (-1, 0, 0.4, 0.6, 1, 2)} == {"not testable here"}


def test_every_part_has_to_hold():
    yes, no, unknown = "confirmed", "refuted", "not testable here"
    assert verdicts.every([yes, yes]) == yes
    assert verdicts.every([yes, unknown, no]) == no
    assert verdicts.every([yes, unknown]) == verdicts.every([]) == unknown

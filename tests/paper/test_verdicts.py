"""The rules by which claims are judged."""

import math

import pytest

from lit_fanions.paper import verdicts

GOOD, BAD = [1.0, 1.002, 0.998], [0.0, 0.002, -0.002]
MARGIN = 0.1


def around(center, width=0.002):
    return [center + x for x in (-width, 0, width)]


def test_difference_and_its_interval():
    stats = pytest.importorskip("scipy.stats")
    a, b = [3.0, 5.0, 4.0, 4.5], [1.0, 1.5, 0.5]
    distance, half = verdicts.difference(a, b)
    exact = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert distance == pytest.approx((exact.low + exact.high) / 2)
    # The table's degrees of freedom are whole: never a narrower interval.
    assert 1 <= half / ((exact.high - exact.low) / 2) < 1.2
    assert verdicts.told([3.0, 5.0], [1.0, 1.0]) == "+3.0000 ± 12.7060 (95 %)"
    assert verdicts.told([3.0], [1.0]) == "+2.0000"


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
            "one value": [center],
            "a wide spread": around(center, width=5),
            "divergence": [center, center, math.inf],
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

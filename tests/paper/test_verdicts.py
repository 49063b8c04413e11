"""The rules by which claims are judged."""

import pytest

from lit_fanions.paper import verdicts

GOOD, BAD = [1.0, 1.02, 0.98], [0.0, 0.02, -0.02]


def around(center):
    return [center + x for x in (-0.02, 0, 0.02)]


def test_difference_and_its_standard_error():
    assert verdicts.difference([3.0, 5.0], [1.0, 1.0]) == (3.0, 1.0)
    assert verdicts.told([3.0, 5.0], [1.0, 1.0]) == "+3.0000 ± 1.0000 (standard error)"


@pytest.mark.parametrize(
    ("rule", "confirmed", "refuted"),
    [
        (lambda x: verdicts.larger(x, GOOD), [1.1, 2], [1.01, 0.99, 0.5]),
        (lambda x: verdicts.equal(x, GOOD), [1.01, 0.99], [1.1, 0.9]),
        (lambda x: verdicts.at_most(x, GOOD), [0.5, 0.99, 1.01], [1.1]),
        (lambda x: verdicts.nearly(x, GOOD, BAD), [0.8, 1, 1.2], [0.7, 0.1, 1.3]),
        (lambda x: verdicts.nearly(x, BAD, GOOD), [-0.2, 0, 0.2], [0.3, 1]),
        (lambda x: verdicts.far_above(x, GOOD, BAD), [0.6, 1], [0.4, 0.02, -1]),
    ],
    ids=["larger", "equal", "at most", "nearly", "nearly as low", "far above"],
)
def test_rules(rule, confirmed, refuted):
    assert {rule(around(center)) for center in confirmed} == {"confirmed"}
    assert {rule(around(center)) for center in refuted} == {"refuted"}
    assert rule([1.0]) == "not testable here"  # without a spread


def test_a_wide_spread_tells_nothing_apart():
    wide = [0.0, 2.0]
    assert verdicts.larger(wide, BAD) == "refuted"
    assert verdicts.equal(wide, BAD) == "confirmed"

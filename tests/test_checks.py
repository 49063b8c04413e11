"""Arguments are refused with what was given, what is allowed and the closest name."""

import math

import numpy as np
import pytest

from lit_fanions.checks import check_choice, check_flag, did_you_mean, real_number, whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_number_is_an_int(value):
    assert type(whole_number("k", value)) is int
    assert whole_number("k", value) == 3


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None, np.float32(3), math.nan])
def test_whole_number_refuses(value):
    with pytest.raises(ValueError, match=r"k must be a whole number of at least 1, got "):
        whole_number("k", value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)])
def test_real_number_is_a_float(value):
    assert type(real_number("lr", value, 0)) is float
    assert real_number("lr", value, 0, 1) == 0.5


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"least": 0.0}, "of at least 0"),
        ({"least": 0.0, "below": 1.0}, "in [0, 1)"),
        ({"above": 0.0}, "above 0"),
        ({}, "that is finite"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 10**400])
def test_real_number_refuses(bounds, words, value):
    with pytest.raises(ValueError) as caught:
        real_number("lr", value, **bounds)
    assert str(caught.value) == f"lr must be a number {words}, got {value!r}"


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(-1e-9, {"least": 0.0}), (1.0, {"least": 0.0, "below": 1.0}), (0.0, {"above": 0.0})],
)
def test_real_number_refuses_what_is_outside(value, bounds):
    with pytest.raises(ValueError, match="lr must be a number"):
        real_number("lr", value, **bounds)


def test_whole_number_names_the_range():
    assert whole_number("steps", 3, 1, 3) == 3
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 3, got 4"):
        whole_number("steps", 4, 1, 3)


def test_choice_names_the_closest():
    check_choice("solver", "exact", ["exact", "power"])
    with pytest.raises(ValueError) as caught:
        check_choice("solver", "exakt", ["exact", "power"])
    assert str(caught.value) == ("solver 'exakt' is none of exact, power; did you mean 'exact'?")


def test_flag_is_a_bool():
    check_flag("nesterov", False)
    with pytest.raises(ValueError, match="nesterov must be true or false, got 1"):
        check_flag("nesterov", 1)


def test_nothing_close_gives_no_hint():
    assert did_you_mean("xyz", ["exact"]) == ""

"""Values of options are parsed from --set and --tune."""

import pytest

from lit_fanions.cli.console import Refused
from lit_fanions.sweep.plan import Choice, Range, number, parse, short


def test_values_are_split_at_commas_outside_of_brackets():
    space = parse(
        ["a=-.1,0, 1e-3", "--b=[1,2],[3]", "c={x: [1, {z: 3}], y: 2},null", 'd="p,q",r'], []
    )
    assert space == {
        "a": Choice(("-.1", "0", "1e-3")),
        "b": Choice(("[1,2]", "[3]")),
        "c": Choice(("{x: [1, {z: 3}], y: 2}", "null")),
        "d": Choice(('"p,q"', "r")),
    }


def test_ranges_are_parsed():
    space = parse([], ["a=1e-3:1:log", "b=.5:.99", "c=1:64:log:int", "d=-2:-1"])
    assert space == {
        "a": Range(1e-3, 1, log=True),
        "b": Range(0.5, 0.99),
        "c": Range(1, 64, log=True, whole=True),
        "d": Range(-2, -1),
    }
    assert space["a"].examples() == ("0.001", "1.0")
    assert space["c"].examples() == ("1", "64")


@pytest.mark.parametrize(
    ("choices", "ranges", "message"),
    [
        (["a"], [], "--set a: write it like --set NAME=1,2,3"),
        (["=1"], [], "--set =1: write it like --set NAME=1,2,3"),
        *(
            (
                [f"a={text}"],
                [],
                f"--set a={text}: close brackets and quotes, and give a value on both sides of a "
                "comma",
            )
            for text in (",", "1,", ",1", "1,,2", "[1,2", "1],[2", '"x,y')
        ),
        (["a=1,1.0"], [], "--set a=1,1.0: a value occurs twice"),
        (["a=1", "a=2"], [], "--set a=2: the option is given twice; list all its values at once"),
        (
            ["m.init_args.a=1"],
            ["m.a=1:2"],
            "--tune m.a=1:2: the option is given twice; list all its values at once",
        ),
        ([], ["a="], "--tune a=: write it like --tune NAME=1e-3:1:log"),
        ([], ["a=1"], "--tune a=1: LOW:HIGH must be two numbers"),
        ([], ["a=1:x"], "--tune a=1:x: LOW:HIGH must be two numbers"),
        ([], ["a=2:1"], "--tune a=2:1: LOW must be below HIGH"),
        ([], ["a=0:inf"], "--tune a=0:inf: LOW must be below HIGH"),
        ([], ["a=nan:1"], "--tune a=nan:1: LOW must be below HIGH"),
        ([], ["a=0:1:log"], "--tune a=0:1:log: LOW must be above 0 with :log"),
        ([], ["a=.5:2:int"], "--tune a=.5:2:int: LOW and HIGH must be integers with :int"),
        ([], ["a=1:2:ln"], "--tune a=1:2:ln: LOW:HIGH can be followed by :log, :int or both"),
    ],
)
def test_mistakes_are_named(choices, ranges, message):
    with pytest.raises(Refused) as refused:
        parse(choices, ranges)
    assert str(refused.value) == message


def test_equal_names_and_numbers_are_recognised():
    assert short("model.init_args.optimizer.matrix.lr") == "model.optimizer.matrix.lr"
    assert number("1") == number("1.0") == number("1e0")
    assert number("muon") == "muon"

"""Lines of how far a work is: rewritten on a terminal, plain elsewhere, none for a short work."""

import sys

import pytest

from lit_fanions.progress import Meter, Progress, format_duration


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only entry is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def reports(clock, capsys, steps, **options):
    """Return what a meter prints when a unit of ten is done at each of some times."""
    with Meter("checking a", **options) as meter:
        for clock[0] in steps:
            meter.advance()
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_short_work_reports_nothing(clock, capsys):
    assert reports(clock, capsys, [1.0, 2.0, 4.0], total=3) == ""


def test_plain_lines_have_the_share_and_the_time_left(clock, capsys):
    assert reports(clock, capsys, range(10, 110, 10), total=10) == (
        "checking a: 10%; about 2 min left\n"
        "checking a: 40%; about 60 s left\n"
        "checking a: 70%; about 30 s left\n"
        "checking a: 100%\n"
    )


def test_line_is_rewritten_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines = reports(clock, capsys, [10.0, 10.1, 20.0], total=10).split("\r")
    assert lines == ["", "checking a: 10%; about 2 min left\x1b[K",
                     "checking a: 30%; about 47 s left\x1b[K", "\x1b[K"]  # fmt: skip


def test_work_of_unknown_size_reports_the_time_it_took(clock, capsys):
    assert reports(clock, capsys, [10.0, 50.0]) == (
        "checking a: 10 s so far\nchecking a: 50 s so far\n"
    )


def test_what_was_done_before_takes_no_time(clock, capsys):
    assert reports(clock, capsys, [10.0], total=10, done=5) == "checking a: 60%; about 40 s left\n"


def test_lines_of_a_work_of_days_are_some_hundreds(clock, capsys):
    steps = range(10, 2 * 86400, 10)
    assert 100 < reports(clock, capsys, steps, total=len(steps)).count("\n") < 500


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_duration_has_a_fitting_unit(seconds, text):
    assert format_duration(seconds) == text


def test_progress_estimates_the_rest_from_this_call(monkeypatch):
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress(7, ended=4)
    assert progress.advance("a", "1") == "[5/7] a: 1; about 40 s left"
    assert progress.advance("b", "2", ended=6) == "[6/7] b: 2; about 20 s left"
    assert progress.advance("c", "3") == "[7/7] c: 3"

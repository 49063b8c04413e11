"""Items run in order within a time budget, and one that fails costs only itself."""

import time

from experiments.gpu.schedule import NO_TIME, OK, TIMED_OUT, Item, run_items


def code(name, text, most=20.0, least=0.0, **options):
    return Item(name, ("-S", "-c", text), most, least, **options)


def test_items_end_as_they_should(tmp_path):
    log = tmp_path / "log.txt"
    items = [
        code("good", "print('result')"),
        code("broken", "raise SystemExit(3)"),
        code("endless", "while True: pass", most=0.5),
        code("long", "", least=1000.0),
    ]
    endings = list(run_items(items, 60.0, log))
    assert [(each.name, each.status) for each in endings] == [
        ("good", OK),
        ("broken", "exit 3"),
        ("endless", TIMED_OUT),
        ("long", NO_TIME),
    ]
    assert "=== good" in log.read_text()
    assert "\nresult\n" in log.read_text()


def test_budget_stops_an_item_before_its_own_limit(tmp_path):
    start = time.monotonic()
    (ending,) = run_items([code("endless", "while True: pass")], 0.5, tmp_path / "log.txt")
    assert ending.status == TIMED_OUT
    assert time.monotonic() - start < 8


def test_timings_wait_for_items_in_the_background(tmp_path):
    done = tmp_path / "done"
    wait = f"import time; time.sleep(1); open({str(done)!r}, 'w')"
    seen = f"import os, sys; sys.exit(os.path.exists({str(done)!r}))"
    items = [
        code("compile", wait, background=True),
        code("checks", seen, alone=False),
        code("timing", seen),
    ]
    endings = [(each.name, each.status) for each in run_items(items, 60.0, tmp_path / "log.txt")]
    assert endings == [("checks", OK), ("compile", OK), ("timing", "exit 1")]

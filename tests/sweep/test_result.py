"""The results of a sweep are a table, a picture and all numbers."""

import dataclasses
import json
from pathlib import Path

import pytest

from lit_fanions.cli.console import Refused
from lit_fanions.sweep import result
from lit_fanions.sweep.plan import Choice, Range, grid_requests
from lit_fanions.sweep.study import Sweep
from tests.sweep.fakes import PLAN, search


def test_grid_is_summarized_with_its_failures(fake):
    fake("x = float(args['m.init_args.x']); log(x + seed) if x + seed < 3 else sys.exit('bad')")
    plan = dataclasses.replace(PLAN, space={"m.init_args.x": Choice(("1", "2"))})
    sweep, requests = Sweep(plan), grid_requests(plan.space, 2)
    sweep.train(requests, [])
    found, failed = result.summarize(sweep, requests)
    assert failed
    assert found.tables[0].rows == [["1", "1.5000 ± 0.7071", 2], ["2", "2.0000", 1]]
    assert "best: x=1" in found.notes
    assert "failed: 003-x=2-seed1: exit status 1: bad" in found.notes
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    assert [(row["m.x"], row["seed"], row["val/loss"]) for row in rows] == [
        *((1.0, 0, 1.0), (2.0, 0, 2.0), (1.0, 1, 2.0), (2.0, 1, None))
    ]
    assert rows[3]["state"] == "fail"
    found.save(Path("out"), "sweep")
    assert json.loads(Path("out/sweep.json").read_text())["settings"]["seeds"] == [0, 1]
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_search_shows_the_best_settings_first(fake, monkeypatch):
    monkeypatch.setattr(result, "SHOWN", 2)
    sweep, requests = search(
        3, seeds=2, space={"a.x": Range(0.1, 1.0, log=True), "b.x": Choice("pq")}
    )
    found, failed = result.summarize(sweep, requests)
    assert not failed
    (table,) = found.tables
    assert table.columns == ["a.x", "b.x", "val/loss", "n"]
    assert [row[-1] for row in table.rows] == [2, 1]  # first what was found to be the best
    found.save(Path("out"), "sweep")
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_without_results_is_refused(fake):
    fake("sys.exit('error: bad')")
    sweep, requests = Sweep(PLAN), grid_requests(PLAN.space, 1)
    sweep.train(requests, [])
    with pytest.raises(Refused, match=r"^every training failed, as 00\d-x=\d-seed0: exit status 1"):
        result.summarize(sweep, requests)

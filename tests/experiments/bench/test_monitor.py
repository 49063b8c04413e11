"""The steps of a monitored training are timed apart from those without a look."""

import json
import statistics
import time

from experiments.bench.__main__ import main
from lit_fanions.callbacks import SpectralMonitor


def test_steps_with_a_look_are_timed_apart(project, monkeypatch, capfd):
    record, seconds = SpectralMonitor.record, 0.05
    monkeypatch.setattr(
        SpectralMonitor,
        "record",
        lambda self, step: (time.sleep(seconds), record(self, step)),
    )
    options = ["--steps", "10", "--every", "20", "--json", "out.json"]
    assert main(["monitor", "--config", "recipe.yaml", *options]) == 0
    result = json.loads((project / "out.json").read_text())
    assert result["matrices"] == 1
    assert len(result["plain_seconds"]) == len(result["looking_seconds"]) == 5
    assert statistics.median(result["looking_seconds"]) > seconds
    assert result["overhead"] > seconds / (20 * statistics.median(result["plain_seconds"])) / 2
    assert "20 steps: " in capfd.readouterr().out
    assert not (project / "lightning_logs").exists()

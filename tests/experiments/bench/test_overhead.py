"""The fit and the bare loop make the same steps, and their times are compared fairly."""

import json
import logging

import pytest
import torch

from experiments.bench import overhead
from experiments.bench.__main__ import main

RECIPE = ["--config", "recipe.yaml", "--epochs", "2"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.gradient_clip_val=0.1"],
        ["--trainer.gradient_clip_val=0.1", "--trainer.gradient_clip_algorithm=value"],
        ["--trainer.accumulate_grad_batches=3"],
        ["--trainer.limit_train_batches=5"],
    ],
    ids=" ".join,
)
def test_fit_and_bare_loop_take_the_same_steps(options, project, capfd):
    assert main(["overhead", *RECIPE, *options, "--json", "out.json"]) == 0
    printed = capfd.readouterr().out
    assert "weights after the same steps: equal" in printed
    assert "2 paired epochs of" in printed
    result = json.loads((project / "out.json").read_text())
    assert len(result["fit_seconds"]) == len(result["bare_seconds"]) == 2
    assert all(s > 0 for epoch in result["fit_seconds"] + result["bare_seconds"] for s in epoch)
    assert result["machine"]["torch"] == torch.__version__


def test_repeated_runs_leave_no_logs_and_no_silence(project, capfd):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    main(["overhead", *RECIPE, "--repeats", "2"])
    assert "4 paired epochs" in capfd.readouterr().out
    assert not (project / "lightning_logs").exists()
    assert logger.level == level


def test_overhead_refuses_an_unknown_option(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["overhead", *RECIPE, "--trainer.max_epoch", "3"])
    assert stop.value.code == 2
    assert "did you mean 'trainer.max_epochs'?" in capfd.readouterr().err


def test_typical_epoch_ignores_a_burst():
    assert overhead.typical_epoch([[1.0, 2.0], [1.0, 2.0], [50.0, 2.0]]) == 3.0

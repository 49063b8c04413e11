"""The timings: that the two sides of a comparison do the same, and that reports are readable."""

import json

import pytest
import torch

from lit_fanions.bench import overhead, report
from lit_fanions.bench.__main__ import main

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


def test_overhead_leaves_no_logs(project, capfd):
    main(["overhead", *RECIPE])
    assert not (project / "lightning_logs").exists()


def test_overhead_repeats(project, capfd):
    main(["overhead", *RECIPE, "--repeats", "2"])
    assert "4 paired epochs" in capfd.readouterr().out


def test_overhead_names_a_mistake(project, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["overhead", *RECIPE, "--trainer.max_epoch", "3"])
    assert stop.value.code == 2
    assert "did you mean --trainer.max_epochs?" in capfd.readouterr().err


def test_table_aligns_columns():
    assert report.table(["name", "value"], [["a", 1.5], ["long name", 10]]).splitlines() == [
        "name       value",
        "---------  -----",
        "a            1.5",
        "long name     10",
    ]


def test_typical_epoch_forgets_a_burst():
    assert overhead.typical_epoch([[1.0, 2.0], [1.0, 2.0], [50.0, 2.0]]) == 3.0


def test_machine_is_named():
    line = report.machine_line(torch.device("cpu"))
    assert report.processor() in line
    assert "threads" in line
    assert torch.__version__ in line

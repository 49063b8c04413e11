"""Every item works in its tiny form, and the table shows what it saved."""

import json
import os
import runpy
import sys

import pytest

from experiments.gpu import __main__ as command
from experiments.gpu import items
from experiments.gpu.schedule import OK, ROOT, Ending


def run_in_process(chosen, seconds, log):
    """Run items as ``run_items`` does, without the seconds that a process takes to import torch."""
    for item in chosen:
        arguments = sys.argv
        first, *rest = item.command
        sys.argv = [*item.command[1:]] if first == "-m" else [first, *rest]
        try:
            if first == "-m":
                runpy.run_module(item.command[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / first), run_name="__main__")
        except SystemExit as end:
            yield Ending(item.name, f"exit {end.code}" if end.code else OK, 0.0)
        finally:
            sys.argv = arguments


@pytest.mark.filterwarnings("ignore")
def test_quick_run_shows_and_saves_results(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(command, "run_items", run_in_process)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    environment = dict(os.environ)
    try:
        assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    finally:
        os.environ.clear()
        os.environ.update(environment)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["machine"]["torch"]
    names = [each["item"] for each in saved["items"]]
    assert names == [item.name for item in items.quick_items(tmp_path)]
    printed = capfd.readouterr().out
    for each in saved["items"]:
        assert each["status"] == OK
        assert each["result"] or each["item"] == "checks"  # which has nothing to do on a CPU
        assert each["result"] in printed
    lines = (tmp_path / "airbench.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    accuracies = [json.loads(line)["test/acc"] for line in lines]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert json.loads(lines[0])["steps"] == 2


def test_every_item_has_a_summary(tmp_path):
    full = items.full_items(tmp_path, tmp_path)
    assert {item.name for item in full} - {"compile"} == items.SUMMARIES.keys()
    assert {item.name for item in items.quick_items(tmp_path)} <= items.SUMMARIES.keys()
    for item in full:
        for argument in item.command:
            path = argument.removeprefix("--config=")
            if path.startswith(("configs/", "tests/")):
                assert (ROOT / path).is_file()


def test_items_that_need_images_are_left_out_without(tmp_path):
    names = [item.name for item in items.full_items(tmp_path, tmp_path / "missing")]
    assert names == ["machine", "compile", "checks", "step", "nanogpt", "polar", "topk"]


def test_summary_of_paired_seeds(tmp_path):
    runs = [
        {"recipe": recipe, "seed": seed, "test/acc": accuracy, "train_seconds": 2.5}
        for recipe, accuracies in (("muon", (0.93, 0.94, 0.95)), ("f_muon", (0.94, 0.95, 0.97)))
        for seed, accuracy in enumerate(accuracies)
    ]
    runs.append({"recipe": "muon", "seed": 9, "test/acc": 0.5, "train_seconds": 2.5})
    lines = "\n".join(json.dumps(run) for run in runs[:-1])
    (tmp_path / "airbench.jsonl").write_text(lines)
    pytest.importorskip("scipy")
    assert items.summary("airbench", tmp_path) == (
        "muon: 94.00 +- 1 % of 3, 2.5 s; f_muon: 95.33 +- 1.53 % of 3, 2.5 s; "
        "difference +1.333 (-0.101 to +2.768)"
    )
    # A seed that only one recipe has tried is not part of the difference.
    (tmp_path / "airbench.jsonl").write_text("\n".join(json.dumps(run) for run in runs))
    assert "difference +1.333 (-0.101 to +2.768)" in items.summary("airbench", tmp_path)


def test_summary_of_the_checks(tmp_path):
    (tmp_path / "checks.xml").write_text(
        '<testsuites><testsuite tests="46" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    assert items.summary("checks", tmp_path) == "46 tests, 1 failures, 0 errors, 2 skipped"
    assert items.summary("step", tmp_path) == ""


def test_summary_of_steps_compares_triton_with_plain(tmp_path):
    times = {"torch.optim.Muon": 0.004, "muon": 0.002, "signum": 0.001, "muon, triton": 0.0015}
    results = [{"optimizer": name, "median_seconds": each} for name, each in times.items()]
    (tmp_path / "step.json").write_text(json.dumps({"results": results}))
    assert items.summary("step", tmp_path) == (
        "torch.optim.Muon 4 ms; muon 2 ms; muon, triton x0.75 plain"
    )


def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    for args, message in (
        ([], "torch finds no GPU here; --quick tries the items on the CPU"),
        (["--quick", "--only", "steps"], "--only steps: choose from checks, machine, step"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([*args, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

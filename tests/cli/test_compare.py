"""Two trainings are compared to the last bit, and the first difference is named."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_fanions.__main__ import start as main
from lit_fanions.cli import tensors
from lit_fanions.cli.digests import RecordDigests
from tests.callbacks.nets import Net, fit
from tests.conftest import TESTS


def log(folder, losses, seconds=1.0):
    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("val/loss", loss, step)
            writer.add_scalar("train/time", seconds * step, step)


def compare(capfd, *args):
    """Return the status and the answers of a comparison by what was compared."""
    status = main(["compare", *map(str, args), "--out", "out"])
    printed = capfd.readouterr().out
    (table, *_) = json.loads(Path("out/comparison.json").read_text())["tables"]
    return status, {what: answer for _, what, answer in table["rows"]}, printed


class Nudge(Callback):
    """Changes an entry of a weight after one step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            pl_module.down.weight.data[0, 0] += 1


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_equal_scalars_are_equal_whatever_the_throughput(capfd):
    log("a", [2.0, float("nan"), 0.5])
    log("b", [2.0, float("nan"), 0.5], seconds=3.0)
    status, answers, printed = compare(capfd, "a", "b")
    assert (status, answers) == (0, {"scalars": "equal (1 scalar)"})
    assert "A and B are equal in all 1 scalar; no weights were compared" in printed


def test_first_step_of_a_scalar_that_differs_is_named(capfd):
    log("a", [2.0, 1.0, 0.5])
    log("b", [2.0, 0.75, 0.75])
    status, answers, printed = compare(capfd, "a", "b")
    assert (status, answers) == (1, {"scalars": "step 1: val/loss (1 of 1 differ)"})
    assert re.search(r"val/loss +0.5 +0.75 +0.25 +0.25 +1 of 3", printed)
    with Path("out/comparison.csv").open() as file:
        rows = [row["B - A"] for row in csv.DictReader(file)]
    assert rows == ["0.0", "-0.25", "0.25"]
    assert json.loads(Path("out/comparison.json").read_text())["settings"] == {"A": "a", "B": "b"}
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_scalar_of_one_run_alone_is_a_difference(capfd):
    log("a", [2.0])
    log("b", [2.0, 1.0])
    assert compare(capfd, "a", "b")[1] == {"scalars": "step 1: val/loss (1 of 1 differ)"}


def test_runs_of_equal_name_are_paired(capfd):
    for seed, shift in ((0, 0.1), (1, 0.3)):
        log(f"a/seed{seed}", [1.0])
        log(f"b/seed{seed}", [1.0 + shift])
    log("b/seed2", [5.0])
    _, _, printed = compare(capfd, "a", "b")
    assert "0.2 ± 0.14" in printed and "0 of 2" in printed
    assert re.search(r"seed2 +run +only in B", printed)
    log("c/other", [1.0])
    log("c/another", [1.0])
    with pytest.raises(SystemExit):
        main(["compare", "a", "c"])
    message = "no runs of equal name: A has seed0, seed1, B has another, other"
    assert message in capfd.readouterr().err


def test_run_without_a_partner_is_a_difference(capfd):
    for run in ("a/x", "a/y", "b/x"):
        log(run, [1.0])
    status, answers, printed = compare(capfd, "a", "b")
    assert (status, answers["run"]) == (1, "only in A")
    assert "A and B differ" in printed


def test_counts_alone_are_no_proof_of_equality(capfd):
    for name in ("a", "b"):
        log(name, [])
        with SummaryWriter(name) as writer:
            writer.add_scalar("train/time", 1.0, 0)
    status, answers, printed = compare(capfd, "a", "b")
    assert (status, answers) == (1, {"scalars": "nothing to compare"})
    assert "nothing was compared" in printed


def test_settings_that_differ_are_listed(capfd):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        log(name, [1.0])
        Path(name, "hparams.yaml").write_text(f"lr: {lr}\ndepth: 2\n")
    printed = compare(capfd, "a", "b")[2]
    assert "settings that differ" in printed and "depth" not in printed


def test_first_step_and_tensor_that_differ_are_named(tmp_path, capfd):
    for name, step in (("a", 10), ("b", 10), ("c", 3)):
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        torch.manual_seed(0)
        fit(tmp_path, Net(), Nudge(step), RecordDigests(), logger=logger)
    status, answers, printed = compare(capfd, "a", "b")
    assert status == 0
    assert answers["weights after each step"].startswith("equal (")
    assert "A and B are equal to the last bit" in printed
    answers = compare(capfd, "a", "c")[1]
    assert answers["weights after each step"].startswith("step 3: down.weight (1 of ")
    (tmp_path / "b" / tensors.DIGESTS).unlink()
    status, answers, _ = compare(capfd, "a", "b")
    assert (status, answers["weights after each step"]) == (1, "only in A")


def test_checkpoints_of_equal_name_are_compared(capfd):
    state = {"state_dict": {"w": torch.ones(3), "b": torch.zeros(2)}, "epoch": 1}
    moments = {"optimizer_states": [{"state": {0: {"momentum": torch.ones(3)}}}]}
    for name, momentum in (("a", 1.0), ("b", 1.5)):
        log(name, [1.0])
        moments["optimizer_states"][0]["state"][0]["momentum"] = torch.full((3,), momentum)
        torch.save({**state, **moments}, f"{name}/last.ckpt")
        torch.save(state, f"{name}/best.ckpt")
    status, answers, _ = compare(capfd, "a", "b")
    assert status == 1
    assert answers["best.ckpt"] == "equal (2 tensors)"
    assert answers["last.ckpt"] == (
        "0.5 relative in optimizer_states.0.state.0.momentum (1 of 3 differ)"
    )
    Path("b/last.ckpt").unlink()
    status, answers, _ = compare(capfd, "a", "b")
    assert (status, answers["last.ckpt"]) == (1, "only in A")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04N."])
def test_checkpoint_that_cannot_be_read_differs(content, capfd):
    for name in ("a", "b"):
        log(name, [1.0])
        torch.save({"state_dict": {"w": torch.ones(3)}}, f"{name}/last.ckpt")
    Path("b/last.ckpt").write_bytes(content)
    status, answers, _ = compare(capfd, "a", "b")
    assert status == 1
    assert re.match("cannot be read: .", answers["last.ckpt"])
    torch.save([1], "b/last.ckpt")
    assert "it holds a list" in compare(capfd, "a", "b")[1]["last.ckpt"]


def test_digests_of_a_killed_run_are_compared_as_far_as_they_are_whole(capfd):
    lines = [json.dumps({"step": step, "digests": {"w": "x"}}) for step in range(3)]
    for name in ("a", "b"):
        log(name, [1.0])
        Path(name, tensors.DIGESTS).write_text("\n".join(lines) + "\n")
    digests = Path("b", tensors.DIGESTS)
    digests.write_text(digests.read_text()[:-5])
    status, answers, _ = compare(capfd, "a", "b")
    assert (status, answers["weights after each step"]) == (1, "step 2: only A has it")
    for damaged in ("{", "[]", '{"step": 1}'):
        digests.write_text(f"{lines[0]}\n{damaged}\n")
        answer = compare(capfd, "a", "b")[1]["weights after each step"]
        assert answer == f"cannot be read: {digests} is damaged in line 2"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "missing"], "there is no missing"),
        (["a", "recipe.yaml"], "give two folders of logs, or two recipes"),
        (["a", "a", "--trainer.max_epochs=3"], "options of fit are for recipes"),
        (["recipe.yaml", "recipe.yaml", "--trainer.max_steps=3"], "use --steps N"),
        (["recipe.yaml", "recipe.yaml", "--steps=0"], "--steps must be a whole number"),
    ],
)
def test_mistakes_are_named(args, message, capfd):
    log("a", [1.0])
    Path("recipe.yaml").touch()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *args])
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


def test_digests_tell_signs_of_zero_and_dtypes_apart():
    zeros = torch.zeros(2), -torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2)
    assert len({tensors.digest(zero) for zero in zeros}) == 4
    assert tensors.digest(torch.ones((), dtype=torch.bfloat16))


@pytest.mark.slow
def test_two_recipes_are_trained_and_compared(project, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    status, answers, printed = compare(capfd, "recipe.yaml", "recipe.yaml", "--steps", "4")
    assert status == 0, printed
    assert answers["weights after each step"].endswith("steps 0 to 4)")
    text = Path("recipe.yaml").read_text()
    Path("other.yaml").write_text(text.replace("lr: 0.02", "lr: 0.03"))
    assert text != Path("other.yaml").read_text()
    status, answers, printed = compare(capfd, "recipe.yaml", "other.yaml", "--steps", "4")
    assert status == 1
    assert answers["weights after each step"].startswith("step 1: ")

"""The report: figures of a run's event files, and one line where there are none."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_fanions.__main__ import start as main
from lit_fanions.callbacks import SpectralMonitor
from lit_fanions.callbacks.quantities import parse_tag
from lit_fanions.cli import report
from lit_fanions.cli.curves import Run, differing_settings, is_metric, read_runs
from lit_fanions.cli.report import summarize
from lit_fanions.cli.report_figures import draw
from tests.callbacks.nets import MATRICES, Net, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor draws no figures"),
]
FAMILIES = ["gradient", "momentum", "oracle", "update", "weight"]
HEADINGS = ["losses and metrics", *FAMILIES, "stable ranks", "spectra", "throughput and others"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of one run."""
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder, name="", version="one run")
    fit(folder, Net(), SpectralMonitor(2), logger=logger)
    return folder


def test_scalars_and_spectra_are_read(logs):
    (run,) = read_runs(logs)
    assert run.name == "one run" and run.last_step == 5
    steps = [step for step, _ in run.curves["spectral/momentum_nuclear/down.weight"]]
    assert steps == [0, 2, 4]
    assert set(run.spectra) == set(MATRICES)
    sample = run.spectra["down.weight"]
    assert sample.values[0] == pytest.approx(1, rel=0.3) and sum(sample.weights) == 10
    assert sample.values == sorted(sample.values, reverse=True)
    parsed = [parse_tag(tag) for tag in run.curves]
    assert {tag.quantity.partition("_")[0] for tag in parsed if tag} == set(FAMILIES)


def test_a_page_has_losses_first_a_summary_and_what_quantities_mean(logs, capsys):
    assert main(["report", str(logs)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(logs / "report.html")
    assert "reading one run (1 of 1" in printed.err and "drawing oracle" in printed.err
    page = (logs / "report.html").read_text()
    headings = re.findall(r"<h2>([\w ]+)</h2>", page)
    assert headings == [*HEADINGS, "What the quantities mean"]
    assert page.count("data:image/png;base64,iVBOR") == len(HEADINGS)
    assert page.index("<th>train/loss</th>") < page.index("<h2>")
    links = set(re.findall(r"<a href='#(\w+)'>", page))
    assert "momentum_nuclear" in links and links == set(re.findall(r"<dt id='(\w+)'>", page))
    assert "http" not in page


def test_runs_share_figures_in_a_folder_of_pngs(logs, tmp_path):
    (run,) = read_runs(logs)
    few = {t: c for t, c in run.curves.items() if "oracle" in t or "stable_rank" in t}
    runs = [Run(name, few) for name in ("a/b", "a_b", "c d")]
    files = report.write(runs, tmp_path / "out")
    assert [path.name for path in files] == [
        "oracle.png", "weight.png",
        "stable_ranks_of_a_b.png", "stable_ranks_of_a_b_3.png", "stable_ranks_of_c_d.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_figures_name_matrices_or_runs(logs):
    (run,) = read_runs(logs)
    other = Run("other", run.curves)
    for runs, names in (([run], MATRICES), ([run, other], ["one run", "other"])):
        (oracle,) = [drawing for drawing in draw(runs) if drawing.title == "oracle"]
        labels = {text.get_text() for text in oracle.figure.legends[0].get_texts()}
        assert set(names) <= labels


def test_logs_of_version_0_1_without_a_prefix_are_read(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("momentum_nuclear/down.weight", 2.0, 0)
        writer.add_scalar("momentum_nuclear/group/matrix", 3.0, 0)
        writer.add_histogram_raw("momentum_spectrum/down.weight", -1, 0, 1, 0, 0, [0.0], [1], 0)
    (run,) = read_runs(tmp_path)
    tags = [parse_tag(tag) for tag in run.curves]
    assert [(tag.quantity, tag.matrix, tag.is_group) for tag in tags] == [
        ("momentum_nuclear", "down.weight", False), ("momentum_nuclear", "matrix", True),
    ]  # fmt: skip
    assert list(run.spectra) == ["down.weight"]


def test_the_summary_has_last_and_best_values_and_settings_that_differ(tmp_path):
    for name, lr, losses in (("a", 0.1, [math.nan, 1.0, 2.0]), ("b", 0.2, [4.0, 3.0])):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, loss in enumerate(losses):
                writer.add_scalar("val/loss", loss, step)
                writer.add_scalar("val/acc", 1 - loss / 10, step)
        settings = {"model": {"lr": lr, "depth": 2}, "trainer": {"logger": {"name": name}}}
        (tmp_path / name / "hparams.yaml").write_text(yaml.safe_dump(settings))
    with SummaryWriter(str(tmp_path / "c")) as writer:
        writer.add_scalar("epoch", 1.0, 7)
    (tmp_path / "c/config.yaml").write_text("!!python/object:builtins.object {}")
    headings, rows = summarize(read_runs(tmp_path))
    assert headings == [
        "run", "last step", "val/loss", "best val/loss", "val/acc", "best val/acc", "model.lr",
    ]  # fmt: skip
    assert rows[0] == ["a", "2", "2", "1 at 1", "0.8", "0.9 at 1", "0.1"]
    assert rows[1] == ["b", "1", "3", "3 at 1", "0.7", "0.7 at 1", "0.2"]
    assert rows[2] == ["c", "7", "–", "–", "–", "–", "–"]
    assert differing_settings([]) == []


@pytest.mark.parametrize(
    ("tag", "expected"),
    [("val/loss", True), ("train_loss", True), ("perplexity", True), ("epoch", False),
     ("lr-Fanion/matrix", False), ("device/batches_per_sec", False),
     ("spectral/oracle_quality/x", False), ("accuracy", True),
     ("grads_applied", False), ("train/samples_per_sec", False),
     ("throughput/loss_per_s", False)],
)  # fmt: skip
def test_metrics_are_told_from_other_scalars(tag, expected):
    assert is_metric(tag) is expected


def test_names_that_are_no_mathtext_are_drawn(tmp_path, capsys):
    bad = "a$_{b$"
    for run in ("x$^$", "y_$\\frac$"):
        with SummaryWriter(str(tmp_path / run)) as writer:
            for quantity in ("momentum_nuclear", "weight_stable_rank"):
                writer.add_scalar(f"spectral/{quantity}/{bad}", 1.0, 0)
                writer.add_scalar(f"spectral/{quantity}/group/{bad}", 1.0, 0)
            writer.add_scalar(f"val/loss{bad}", 1.0, 0)
            writer.add_scalar(bad, 1.0, 0)
            writer.add_histogram_raw(f"momentum_spectrum/{bad}", -1, 0, 1, 0, 0, [0.0], [1], 0)
            # Histograms of others, and empty ones, are no spectra.
            writer.add_histogram("power_spectrum/x", torch.tensor([1.0, 500.0]), 0)
            writer.add_histogram_raw("momentum_spectrum/y", 0, 0, 0, 0, 0, [0.0], [0], 0)
    for folder in (tmp_path, tmp_path / "x$^$"):
        assert main(["report", str(folder), "--output", str(folder / "out")]) == 0
        assert len(capsys.readouterr().out.split()) == (8 if folder == tmp_path else 6)


def test_scale_of_a_quantity_is_the_same_in_all_reports(tmp_path):
    scales = {}
    for values in ((1.0, 2.0), (1e-5, 1e5)):
        names = "momentum_nuclear", "momentum_nuclear_rank", "update_rms", "update_lr"
        curves = {f"spectral/{name}/w": [*enumerate(values)] for name in names}
        for drawing in draw([Run("run", curves)]):
            for axes, name in zip(drawing.figure.axes, drawing.quantities, strict=False):
                scales.setdefault(name, set()).add(axes.get_yscale())
    assert scales == {
        "momentum_nuclear": {"log"},
        "momentum_nuclear_rank": {"linear"},
        "update_rms": {"log"},
        "update_lr": {"linear"},
    }


def test_runs_and_groups_differ_in_colour_or_line(tmp_path):
    curves = {f"spectral/update_rms/group/{name}": [(0, 1.0), (1, 2.0)] for name in "ab"}
    (drawing,) = draw([Run(str(i), curves) for i in range(3)])
    lines = drawing.figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 6
    assert lines[1].get_label() == "0, b"
    (drawing,) = draw([Run(str(i), {"loss": [(0, 1.0), (1, 2.0)]}) for i in range(40)])
    lines = drawing.figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 40


def test_test_metrics_and_counts_are_no_training_curves():
    tags = "val/loss", "test/loss", "lr/matrix", "train/samples"
    figures = {
        drawing.title: [axes.get_title() for axes in drawing.figure.axes]
        for drawing in draw([Run("run", {tag: [(0, 1.0)] for tag in tags})])
    }
    assert figures == {
        "losses and metrics": ["val/loss"],
        "learning rates": ["lr/matrix"],
        "throughput and others": ["train/samples"],
    }


def test_output_of_another_kind_is_refused(logs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(logs), "--output", str(tmp_path / "x.png")])
    assert "give a .html file, or a folder for PNGs" in capsys.readouterr().err
    assert main(["report", str(logs), "--output", str(tmp_path / "x.HTML")]) == 0
    assert (tmp_path / "x.HTML").is_file()


@pytest.mark.parametrize("case", ["no folder", "no events", "no argument", "unknown option"])
def test_mistakes_are_one_line(tmp_path, capsys, case):
    args = {
        "no folder": [str(tmp_path / "nothing")],
        "no events": [str(tmp_path)],
        "no argument": [],
        "unknown option": [str(tmp_path), "--nothing"],
    }[case]
    with pytest.raises(SystemExit, match="2"):
        main(["report", *args])
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""

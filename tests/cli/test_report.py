"""The report: figures of a run's event files, and one line where there are none."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_fanions.callbacks import SpectralMonitor, figures
from lit_fanions.cli import report
from lit_fanions.cli.app import main
from tests.callbacks.nets import MATRICES, Net, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:SpectralMonitor draws no figures"),
]
QUANTITIES = ["training", "gradient", "momentum", "oracle", "update", "weight"]
FAMILIES = [*QUANTITIES, "stable ranks", "spectra"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of one run."""
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder, name="", version="one run")
    fit(folder, Net(), SpectralMonitor(2), logger=logger)
    return folder


def test_what_is_read(logs):
    (run,) = report.read_runs(logs)
    assert run.name == "one run"
    assert [step for step, _ in run.curves["momentum_nuclear/down.weight"]] == [0, 2, 4]
    assert set(run.spectra) == set(MATRICES)
    sample = run.spectra["down.weight"]
    assert sample.values[0] == pytest.approx(1, rel=0.3) and sum(sample.weights) == 10
    assert sample.values == sorted(sample.values, reverse=True)
    families = {report.family_of(tag) for tag in run.curves}
    assert families == set(QUANTITIES)


def test_a_page_of_figures(logs, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(logs)]) == 0
    assert capsys.readouterr().out.strip() == str(logs / "report.html")
    page = (logs / "report.html").read_text()
    assert re.findall(r"<h3>([\w ]+)</h3>", page) == FAMILIES
    assert page.count("data:image/png;base64,iVBOR") == len(FAMILIES)
    assert "http" not in page


def test_a_folder_of_figures(logs, tmp_path):
    pytest.importorskip("matplotlib")
    (run,) = report.read_runs(logs)
    few = {tag: curve for tag, curve in run.curves.items() if report.family_of(tag) == "oracle"}
    runs = [report.Run(name, few, {}) for name in ("a/b", "c d")]
    files = report.write(runs, tmp_path / "out")
    assert [path.name for path in files] == ["a_b_oracle.png", "c_d_oracle.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_logs_of_others_are_read_too(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a/b", "a_b"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("a$_{b$", 1.0, 0)
            writer.add_histogram("power_spectrum/x", torch.tensor([1.0, 500.0]), 0)
            writer.add_histogram_raw("momentum_spectrum/y", 0, 0, 0, 0, 0, [0.0], [0], 0)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert len(set(written)) == len(written) == 2


def test_output_of_another_kind_is_refused(logs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(logs), "--output", str(tmp_path / "x.png")]) == 2
    assert "give a .html file, or a folder for PNGs" in capsys.readouterr().err
    assert main(["report", str(logs), "--output", str(tmp_path / "x.HTML")]) == 0
    assert (tmp_path / "x.HTML").is_file()


@pytest.mark.parametrize("case", ["no folder", "no events", "no argument", "unknown option"])
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, case):
    monkeypatch.setattr(figures, "available", lambda: True)
    args = {
        "no folder": [str(tmp_path / "nothing")],
        "no events": [str(tmp_path)],
        "no argument": [],
        "unknown option": [str(tmp_path), "--nothing"],
    }[case]
    try:
        status = main(["report", *args])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_matplotlib_it_says_what_to_install(logs, capsys, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    assert main(["report", str(logs)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err

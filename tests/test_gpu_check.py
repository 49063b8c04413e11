"""The check of a GPU machine, run here without a GPU as far as that goes."""

import os
import runpy
import subprocess
import sys

import pytest
import torch

from tests.conftest import TESTS
from tests.gpu_check import run_tests

CHECKS = """
import pytest

def test_fast_path(record_property):
    record_property("measured", "ratio 0.5")

def test_slow_path():
    assert False

def test_data():
    pytest.skip("no data")
"""


def test_table_shows_outcomes_and_measurements(tmp_path):
    file = tmp_path / "test_checks.py"
    file.write_text(CHECKS)
    status, table = run_tests(file, ["-q", "--tb=no", "-p", "no:cacheprovider", "-c", os.devnull])
    assert status == 1
    rows = [line.split() for line in table.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["fast", "path", "passed"],
        ["slow", "path", "failed"],
        ["data", "skipped", "0.0"],
    ]
    assert rows[0][-2:] == ["ratio", "0.5"]
    assert rows[2][-2:] == ["no", "data"]


def test_cuda_tests_import_without_jsonargparse(monkeypatch):
    for name in ("jsonargparse", "lit_fanions.cli.app"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "test_polar" in runpy.run_path(str(TESTS / "test_cuda.py"))


@pytest.mark.slow
def test_tests_are_collected_without_jsonargparse_and_installation(tmp_path):
    # A plain `python tests/gpu_check.py` must find the package and every test.
    (tmp_path / "jsonargparse.py").write_text("raise ImportError('not installed')\n")
    code = (
        f"import sys; sys.path[:0] = {str(TESTS)!r}, {str(TESTS.parent)!r}; "
        "import gpu_check as g; "
        "sys.exit(g.run_tests(g.FILE, [*g.OPTIONS, '--rootdir', str(g.ROOT), '--collect-only'])[0])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("test_polar[jordan]", "test_quickstart", "test_bench[step]", "test_nanogpt"):
        assert name in ended.stdout


def test_check_without_a_gpu_succeeds(monkeypatch, capsys):
    from tests import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert "skipped, torch finds no GPU" in capsys.readouterr().out

"""Fixtures of all tests: one thread, one seed, and a small zoo for the command line."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

# Read when Triton is imported, as Lightning does: without a GPU an interpreter runs its kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from lightning.pytorch import seed_everything

# Tiny tensors gain nothing from threads, and tests of several processes share two cores.
torch.set_num_threads(1)

# The first backward pass decides whether autograd may run in forked processes. It may not once
# torch._dynamo is loaded, so this pass comes before every import and test that loads it.
torch.ones((), requires_grad=True).backward()

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU on machines without."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning leaves its seed in the environment, where it would reach later tests.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    seed_everything(0, verbose=False)


@pytest.fixture
def hears_signals() -> Iterator[None]:
    """Handle Ctrl-C as in the foreground; processes in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test: a folder with the module `toy_zoo` and a recipe."""
    shutil.copy(TESTS / "toy_zoo.py", tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(toy_recipe()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LIT_FANIONS_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def toy_recipe() -> dict:
    """A recipe that trains in a moment: 2 epochs of 8 steps."""
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "toy_zoo.ToyNet",
            "init_args": {"width": 8, "optimizer": {"matrix": {"lr": 0.02}}},
        },
        "data": {"class_path": "toy_zoo.ToyData"},
        "test_after_fit": True,
    }


def subprocess_environment() -> dict[str, str]:
    """The environment in which a child process finds this checkout, one thread per process."""
    return {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}

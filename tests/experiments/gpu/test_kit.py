"""A kit is unpacked to what was packed."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.cifar10 import load_cache, save_cache
from experiments.gpu import kit


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    run: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run.append(command))
    return run


def smooth_images(count: int) -> torch.Tensor:
    """Return images without noise, of which a JPEG loses little."""
    ramp = torch.linspace(0, 200, 32)
    brightness = torch.arange(count)[:, None, None, None] * 5
    return (ramp[:, None, None] + brightness + torch.zeros(32, 3)).to(torch.uint8)


def test_images_survive(tmp_path: Path, commands: Any) -> None:
    cifar10, folder = tmp_path / "cifar10", tmp_path / "kit"
    cifar10.mkdir()
    labels = torch.arange(10)
    for split, count in (("train", 10), ("test", 4)):
        save_cache(cifar10 / f"{split}.pt", smooth_images(count), labels[:count], ["a", "b"])
    assert kit.main(["pack", str(folder), "--cifar10", str(cifar10), "--quality", "95"]) == 0
    assert kit.main(["unpack", str(folder)]) == 0
    for split, count in (("train", 10), ("test", 4)):
        images, found = load_cache(folder / "cifar10" / f"{split}.pt")
        assert torch.equal(found, labels[:count])
        assert (images.int() - smooth_images(count).int()).abs().max() < 8
    assert torch.load(folder / "cifar10" / "train.pt")["classes"] == ["a", "b"]


def test_wheels_are_those_of_the_other_python(tmp_path: Path, commands: list[list[str]]) -> None:
    given = ["pack", str(tmp_path), "--python", "3.13", "--cifar10", str(tmp_path / "none")]
    assert kit.main(given) == 0
    (tmp_path / "wheels" / "some.whl").touch()
    assert kit.main(["unpack", str(tmp_path)]) == 0
    download, install = commands
    assert "3.13" in download and set(kit.WHEELS) <= set(download)
    assert install[-1] == str(tmp_path / "wheels" / "some.whl") and "--no-index" in install

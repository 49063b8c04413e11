"""CIFAR-10: the cache files, the download, and what goes wrong with them."""

import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from datamodules import CIFAR10DataModule
from datamodules.cifar10 import load_cache, save_cache
from tests.datamodules.processes import at_once

CLASSES = [str(i) for i in range(10)]


def random_split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 40), ("test", 20)):
        save_cache(tmp_path / f"{split}.pt", *random_split(count), CLASSES)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known\n(second line)")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)


class FakeCIFAR10:
    """A stand-in for torchvision's class after a download."""

    classes = tuple(CLASSES)

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        assert download and root.is_dir()
        images, labels = random_split(40 if train else 20)
        self.data: np.ndarray = images.numpy()
        self.targets: list[int] = labels.tolist()
        self.classes = CLASSES


def test_cached_files_need_no_network(folder: Path, offline: None) -> None:
    data = CIFAR10DataModule(str(folder), batch_size=20, flip="none", translate=0)
    data.prepare_data()
    data.setup("fit")
    images, labels = random_split(40)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(data.mean)[:, None, None]) / (
        torch.tensor(data.std)[:, None, None]
    )
    training = data.training_images(40)
    torch.testing.assert_close(training, expected)
    loader = data.train_dataloader()
    assert len(loader) == 2
    for pixels, targets in loader:
        for picture, target in zip(pixels, targets, strict=True):
            (index,) = (training == picture).flatten(1).all(1).nonzero()
            assert labels[index] == target
    assert torch.equal(
        torch.cat([targets for _, targets in data.val_dataloader()]), random_split(20)[1]
    )


def test_data_dir_expands_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    data = CIFAR10DataModule(f"~/{folder.name}")
    data.prepare_data()
    data.setup("test")
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 20


@pytest.mark.parametrize("lost", ["train", "test"])
def test_missing_cache_without_a_network_names_the_remedy(
    folder: Path, offline: None, lost: str
) -> None:
    (folder / f"{lost}.pt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        CIFAR10DataModule(str(folder)).prepare_data()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("Name or service not known", "train.pt", "test.pt", str(folder), "data_dir"):
        assert part in message
    assert caught.value.__suppress_context__


def test_folder_that_cannot_be_made_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"train\.pt"):
        CIFAR10DataModule(str(tmp_path / "file" / "data")).prepare_data()


def test_download_is_cached_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    data = CIFAR10DataModule(str(tmp_path / "new" / "cifar10"), batch_size=40)
    data.prepare_data()
    names = sorted(path.name for path in data.data_dir.glob("[!.]*"))
    assert names == ["test.pt", "train.pt"]
    cache = torch.load(data.data_dir / "train.pt", weights_only=True)
    assert torch.equal(cache["images"], random_split(40)[0])
    assert torch.equal(cache["labels"], random_split(40)[1])
    assert cache["classes"] == CLASSES
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", None)
    data.prepare_data()
    data.setup("fit")


def test_cache_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(FileNotFoundError, match="No space left on device"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert list(tmp_path.glob("[!.]*")) == []


def test_two_processes_make_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnceCIFAR10(FakeCIFAR10):
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            (Path(root) / f"raw{train}").touch(exist_ok=False)  # torchvision's files clash
            super().__init__(root, train, download)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", OnceCIFAR10)
    at_once(lambda: CIFAR10DataModule(str(tmp_path)).prepare_data())
    assert torch.equal(load_cache(tmp_path / "train.pt")[0], random_split(40)[0])


def test_flipped_bits_of_a_cache_file_are_found(folder: Path) -> None:
    path = folder / "train.pt"
    content, (images, labels) = path.read_bytes(), load_cache(path)
    random, found = np.random.default_rng(0), 0
    for _ in range(30):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            pixels, targets = load_cache(path)
        except RuntimeError as error:
            assert str(path) in str(error)
            found += 1
        else:  # an entry that nobody reads, such as padding
            assert torch.equal(pixels, images) and torch.equal(targets, labels)
    assert found >= 25  # nearly all of the file are pixels


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_truncated_cache_file_is_named(folder: Path, offline: None, keep: int) -> None:
    path = folder / "train.pt"
    path.write_bytes(path.read_bytes()[:keep])
    data = CIFAR10DataModule(str(folder))
    data.prepare_data()
    with pytest.raises(RuntimeError, match="damaged") as caught:
        data.setup("fit")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "delete it" in str(caught.value)


IMAGES, LABELS = random_split(4)


@pytest.mark.parametrize(
    "content",
    [
        IMAGES,
        {"images": IMAGES},
        {"images": IMAGES.float(), "labels": LABELS},
        {"images": IMAGES.permute(0, 3, 1, 2), "labels": LABELS},
        {"images": IMAGES, "labels": LABELS[:3]},
        {"images": IMAGES, "labels": LABELS.int()},
        {"images": IMAGES, "labels": LABELS.tolist()},
    ],
)
def test_cache_file_with_other_content_is_named(tmp_path: Path, content: object) -> None:
    path = tmp_path / "train.pt"
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=r"does not hold images, uint8 \[N, 32, 32, 3\]") as e:
        load_cache(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    "content",
    [
        {"images": IMAGES, "labels": LABELS + 10},
        {"images": IMAGES, "labels": LABELS - 10},
        {"images": IMAGES[:0], "labels": LABELS[:0]},
    ],
    ids=["above", "negative", "empty"],
)
def test_cache_file_of_another_set_is_named(tmp_path: Path, content: object) -> None:
    path = tmp_path / "train.pt"
    torch.save(content, path)
    with pytest.raises(RuntimeError, match="labels 0 to 9 of CIFAR-10") as e:
        load_cache(path)
    assert str(path) in str(e.value)


def test_setup_before_prepare_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test\.pt is missing: call prepare_data\(\)"):
        CIFAR10DataModule(str(tmp_path)).setup("test")


@pytest.mark.parametrize(
    "error",
    [pickle.UnpicklingError("invalid load key"), EOFError("Ran out"), tarfile.ReadError("no tar")],
    ids=lambda error: type(error).__name__,
)
def test_damaged_download_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(
        FileNotFoundError, match=rf"{error}.*or delete a damaged download"
    ) as caught:
        CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert str(tmp_path) in str(caught.value)

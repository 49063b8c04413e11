"""CIFAR-10 on the training device."""

import contextlib
import io
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from datamodules.augmentation import Batch, Flip
from datamodules.files import only_writer, whole_file
from datamodules.images import ImageDataModule, Split

CLASSES = 10


def save_cache(path: Path, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """Write one split as airbench does: images uint8 (n, 32, 32, 3), labels int64 (n,)."""
    with whole_file(path) as partial:
        torch.save({"images": images, "labels": labels, "classes": classes}, partial)


def load_cache(path: Path) -> Batch:
    """Read one split that ``save_cache`` or the original airbench script wrote.

    Raises:
        RuntimeError: If the file cannot be read or holds something else.
    """
    remedy = "delete it to have it downloaded again, or replace it"
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        cache = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in a dozen ways on a damaged file
        reason = type(error).__name__
        raise RuntimeError(f"{path} is damaged and cannot be read ({reason}): {remedy}") from None
    values = cache if isinstance(cache, dict) else {}
    images, labels = values.get("images"), values.get("labels")
    if (
        not isinstance(images, Tensor)
        or not isinstance(labels, Tensor)
        or images.dtype != torch.uint8
        or labels.dtype != torch.int64
        or images.shape[1:] != (32, 32, 3)
        or labels.shape != images.shape[:1]
    ):
        raise RuntimeError(
            f"{path} does not hold images, uint8 [N, 32, 32, 3], and labels, int64 [N]: {remedy}"
        )
    # On a GPU, a loss at another label would end the process without a word about the file.
    if not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
        raise RuntimeError(
            f"{path} does not hold images with labels 0 to {CLASSES - 1} of CIFAR-10: {remedy}"
        )
    return images, labels


def is_cached(folder: Path) -> bool:
    """Return whether a folder has the cache files of both splits."""
    return all((folder / f"{split}.pt").is_file() for split in ("train", "test"))


def download(folder: Path) -> None:
    """Let torchvision fetch CIFAR-10 into ``folder`` and write train.pt and test.pt there.

    Raises:
        FileNotFoundError: If that fails, with one line that says what to do.
    """
    from torchvision.datasets import CIFAR10

    try:
        with only_writer(folder):
            if is_cached(folder):  # by another process meanwhile
                return
            print(f"downloading CIFAR-10 (170 MB) into {folder}", file=sys.stderr, flush=True)
            # torchvision draws a bar where there is no terminal, too.
            bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
            for split in ("train", "test"):
                with contextlib.redirect_stderr(bars):
                    data = CIFAR10(folder, train=split == "train", download=True)
                images, labels = torch.from_numpy(data.data), torch.tensor(data.targets)
                save_cache(folder / f"{split}.pt", images, labels, data.classes)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, tarfile.TarError) as error:
        # No network, a server's error, no permission to write, or a damaged download of before.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"CIFAR-10 is neither cached in {folder} nor could it be downloaded ({reason}): "
            f"put train.pt and test.pt into {folder}, point data_dir to the folder that has them, "
            "or delete a damaged download there"
        ) from None


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32 x 32, ten classes.

    The whole set stays on the training device as uint8 (0.35 GB) and is augmented there, a whole
    epoch at a time. Where data_dir holds train.pt and test.pt, they are used: files written by
    torch.save of {"images": uint8 [N, 32, 32, 3], "labels": int64 [N], "classes": list of str}, as
    the original airbench script writes them. Otherwise torchvision downloads the set once, and the
    two files are written.

    Validation, test and prediction use the test split: all 10,000 images, not augmented.

    Args:
        data_dir: Folder of train.pt and test.pt.
        batch_size: Examples of a global batch; each of w ranks gets batch_size / w of them.
        flip: alternating: a coin mirrors each image once, and odd epochs (from 0) show all of them
            the other way round; random: a coin per image and epoch; none.
        translate: Largest shift up, down, left and right in pixels, over a reflected border.
        cutout: Height and width in pixels of a square painted in the mean colour; 0: none.
        seed: Seed of order and augmentation; None: that of seed_everything, 0 without one.
        show_images: Number of augmented training images to show in TensorBoard when a fit starts.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        data_dir: str = "data/cifar10",
        batch_size: int = 2000,
        flip: Flip = "alternating",
        translate: int = 2,
        cutout: int = 0,
        seed: int | None = None,
        show_images: int = 0,
    ) -> None:
        super().__init__(batch_size, flip, translate, cutout, seed, show_images)
        self.data_dir = Path(data_dir).expanduser()

    def prepare_data(self) -> None:
        """Download the set unless both cache files exist."""
        if not is_cached(self.data_dir):
            download(self.data_dir)

    def read(self, split: Split) -> Batch:
        """Read one split's cache file: uint8 (n, 3, 32, 32) and int64 (n,)."""
        path = self.data_dir / f"{split}.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: call prepare_data() first")
        images, labels = load_cache(path)
        return images.permute(0, 3, 1, 2), labels

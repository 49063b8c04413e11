"""Pack what a GPU machine without a network lacks: wheels and CIFAR-10.

  python -m experiments.gpu.kit pack .kit --python 3.12     # here
  python -m experiments.gpu.kit unpack .kit                 # there, beside a copy of the checkout

`make gpu-kit` and `make gpu NOVENV=1 KIT=.kit` call them. Unpacking needs torch, NumPy and Pillow.
"""

import argparse
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Machines with a GPU have torch and Lightning. These are small, and pure Python.
WHEELS = (
    *("jsonargparse", "docstring-parser", "typeshed-client"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
)
IMAGES, SPLITS = "cifar10_jpeg.npz", ("train", "test")
_START_OF_SCAN, _END = b"\xff\xda", b"\xff\xd9"


def pack_images(cifar10: Path, pack: Path, quality: int) -> None:
    """Write CIFAR-10 as JPEGs into one file, their common header once.

    Args:
        cifar10: Folder of train.pt and test.pt.
        pack: File to write.
        quality: JPEG quality: 75 makes 18 MB of the set and costs several percent of accuracy.
    """
    splits = [torch.load(cifar10 / f"{split}.pt", weights_only=True) for split in SPLITS]
    headers, scans = zip(
        *(_encode(image, quality) for split in splits for image in split["images"].numpy()),
        strict=True,
    )
    assert len(set(headers)) == 1, "images of one size and quality have one header"
    np.savez(
        pack,
        header=np.frombuffer(headers[0], np.uint8),
        scans=np.frombuffer(b"".join(scans), np.uint8),
        lengths=np.array([len(scan) for scan in scans]),
        labels=torch.cat([split["labels"] for split in splits]).numpy(),
        n_train=len(splits[0]["labels"]),
        classes=np.array(splits[0]["classes"]),
    )


def unpack_images(pack: Path, cifar10: Path) -> None:
    """Write train.pt and test.pt of a pack into a folder."""
    from datamodules.cifar10 import save_cache

    with np.load(pack, allow_pickle=False) as content:
        images = np.stack([*_decode(content)])
        labels, first_test = content["labels"].astype(np.int64), int(content["n_train"])
        classes = [str(name) for name in content["classes"]]
    cifar10.mkdir(parents=True, exist_ok=True)
    for split, part in zip(SPLITS, (slice(first_test), slice(first_test, None)), strict=True):
        tensors = torch.from_numpy(images[part].copy()), torch.from_numpy(labels[part].copy())
        save_cache(cifar10 / f"{split}.pt", *tensors, classes)


def _encode(image: np.ndarray, quality: int) -> tuple[bytes, bytes]:
    """Return the header of a JPEG and its scan without the end marker."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    content = file.getvalue()
    start = content.index(_START_OF_SCAN)
    start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    return content[:start], content[start:].removesuffix(_END)


def _decode(content: np.lib.npyio.NpzFile) -> Iterator[np.ndarray]:
    header, scans = content["header"].tobytes(), content["scans"].tobytes()
    start = 0
    for length in content["lengths"].tolist():
        scan = scans[start : start + length]
        start += length
        yield np.asarray(Image.open(io.BytesIO(header + scan + _END)).convert("RGB"))


def pack_kit(options: argparse.Namespace) -> None:
    """Download the wheels, and pack CIFAR-10 if there is a copy."""
    wheels = options.kit / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    given = ["--only-binary=:all:", "--python-version", options.python, *WHEELS]
    subprocess.run([*pip, *given], check=True)
    if (options.cifar10 / "test.pt").is_file():
        pack_images(options.cifar10, options.kit / IMAGES, options.quality)
    else:
        print(f"no train.pt and test.pt in {options.cifar10}: packed without images")


def unpack_kit(options: argparse.Namespace) -> None:
    """Install the wheels into KIT/site, and write CIFAR-10 into KIT/cifar10."""
    wheels = [str(path) for path in sorted((options.kit / "wheels").glob("*.whl"))]
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        site = ["--upgrade", "--target", str(options.kit / "site")]
        subprocess.run([*pip, *site, *wheels], check=True)
    if (options.kit / IMAGES).is_file():
        unpack_images(options.kit / IMAGES, options.kit / "cifar10")


def main(args: Sequence[str] | None = None) -> int:
    """Pack or unpack.

    Args:
        args: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True)
    pack = commands.add_parser("pack", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    unpack = commands.add_parser("unpack")
    for command, work in ((pack, pack_kit), (unpack, unpack_kit)):
        command.add_argument("kit", type=Path, help="folder of the kit")
        command.set_defaults(work=work)
    pack.add_argument("--python", default="3.12", help="the machine's version of Python")
    cifar10 = Path("data/cifar10")
    pack.add_argument("--cifar10", type=Path, default=cifar10, help="folder of train.pt, test.pt")
    pack.add_argument("--quality", type=int, default=75, help="JPEG quality of the images")
    options = parser.parse_args(args)
    options.work(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

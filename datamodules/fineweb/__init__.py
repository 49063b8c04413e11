"""FineWeb, real web text, as token shards; `python -m datamodules.fineweb` makes them.

Without Lightning, which the command has no use for: the LightningDataModule is in ``data_module``.
"""

import sys
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from datamodules.files import whole_file
from datamodules.shards import Shard, Split, record_checksum
from datamodules.tokenizing import MANIFEST
from lit_fanions.checks import check_choice, whole_number
from lit_fanions.progress import Progress

Dataset = Literal["fineweb10B", "fineweb100B", "finewebedu10B"]

MARKER = "downloaded_from.txt"  # beside downloaded shards; names their hub repository


class Source(NamedTuple):
    """Hub repository of a data set, prefix of its files' names, number of training shards."""

    repository: str
    prefix: str
    shards: int

    def names(self, split: Split, shards: int) -> list[str]:
        """Return the files of one split: the first training shards, or the validation shard."""
        numbers = range(1, shards + 1) if split == "train" else range(1)
        return [f"{self.prefix}_{split}_{number:06d}.bin" for number in numbers]


SOURCES: dict[Dataset, Source] = {
    "fineweb10B": Source("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": Source("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": Source("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def check_source(dataset: Dataset | None, shards: int) -> None:
    """Raise a ValueError unless the data set exists and has that many training shards."""
    whole_number("shards", shards)
    if dataset is None:
        return
    check_choice("dataset", dataset, get_args(Dataset))
    if shards > SOURCES[dataset].shards:
        raise ValueError(f"shards={shards}: {dataset} has 1 to {SOURCES[dataset].shards}")


def check_folder(folder: Path, dataset: Dataset) -> None:
    """Raise a ValueError if a folder holds shards of something else.

    The file MARKER says where they were downloaded from; without it, their names have to be those
    of the data set.
    """
    source, marker = SOURCES[dataset], folder / MARKER
    shards = find_shards(folder, "train") + find_shards(folder, "val")
    others = [path.name for path in shards if not path.match(f"{source.prefix}_*")]
    if (folder / MANIFEST).exists():
        content = "shards made by python -m datamodules.fineweb tokenize"
    elif marker.is_file():
        content = marker.read_text(encoding="utf-8-sig").strip()
    else:
        content = others[0] if others else source.repository
    if content != source.repository:
        raise ValueError(
            f"{folder} holds {content}, not {source.repository}: choose another data_dir, or "
            "dataset: null to train on these shards"
        )


def find_shards(folder: Path, split: Split) -> list[Path]:
    """Return the shards of one split in a folder, ordered by name."""
    return sorted(folder.glob(f"*_{split}_*.bin"))


def download(folder: Path, dataset: Dataset, shards: int) -> None:
    """Download those of the validation shard and the first training shards that are missing.

    huggingface_hub keeps unfinished files, so that a later call continues them, and locks each
    file against other processes. The folder is made when the hub has answered.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
        FileNotFoundError: If a file cannot be downloaded, with one line that says what to do.
        ValueError: If a file is damaged, or the folder holds something else.
    """
    check_folder(folder, dataset)
    source, reached = SOURCES[dataset], False
    names = [*source.names("val", shards), *source.names("train", shards)]
    progress = Progress(sum(not (folder / name).is_file() for name in names))
    for name in names:
        if not (folder / name).is_file():
            _fetch(folder, source.repository, name, reached)
            print(progress.advance(name, "downloaded"), file=sys.stderr, flush=True)
            reached = True
            with whole_file(folder / MARKER) as partial:
                partial.write_text(f"{source.repository}\n", encoding="utf-8")
            record_checksum(folder / name)
        Shard(folder / name)


def _fetch(folder: Path, repository: str, name: str, reached: bool) -> None:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "FineWeb's shards are downloaded with huggingface_hub, which is not installed: pip "
            "install huggingface_hub, or install lit_fanions with its extra 'zoo'"
        ) from None
    try:
        # Without a network, hf_hub_download makes the folder, tries six times within half a minute
        # and prints each try. A single request for the first file's metadata avoids that.
        if not reached:
            try:
                get_hf_file_metadata(hf_hub_url(repository, name, repo_type="dataset"))
            except HfHubHTTPError as error:
                if error.response.status_code < 429:
                    raise
                # The hub is busy or out of order: hf_hub_download waits and tries again.
        hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
    except Exception as error:  # of the HTTP library, huggingface_hub or the file system
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise FileNotFoundError(
            f"{name} is not in {folder} and could not be downloaded from {repository} ({reason}): "
            "try again with a network, or point data_dir to a folder that has the file"
        ) from None

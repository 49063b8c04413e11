"""FineWeb, real web text, as token shards; `python -m datamodules.fineweb` makes them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.shards import Shard
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing import MANIFEST
from datamodules.tokens import Split, TokenDataModule

Dataset = Literal["fineweb10B", "fineweb100B", "finewebedu10B"]


class Source(NamedTuple):
    """Where a data set's shards are: a hub repository, how they are named, how many to train on."""

    repository: str
    prefix: str
    shards: int


SOURCES: dict[Dataset, Source] = {
    "fineweb10B": Source("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": Source("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": Source("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def check_source(dataset: Dataset, shards: int) -> None:
    """Raise a ValueError unless there is such a data set with so many training shards."""
    if dataset not in SOURCES:
        raise ValueError(f"dataset={dataset!r}: choose one of {', '.join(get_args(Dataset))}")
    if not 1 <= shards <= SOURCES[dataset].shards:
        raise ValueError(f"shards={shards}: {dataset} has 1 to {SOURCES[dataset].shards}")


def find_shards(folder: Path, split: Split) -> list[Path]:
    """The shards of one split in a folder, by their names, in order."""
    return sorted(folder.glob(f"*_{split}_*.bin"))


def download(folder: Path, dataset: Dataset, shards: int) -> None:
    """Fetch the validation shard and the first training shards, but not those that are there.

    What huggingface_hub has fetched of a file is kept, so that a later call goes on with it.

    Args:
        folder: Where to.
        dataset: Which.
        shards: Number of training shards.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
        FileNotFoundError: If a file cannot be downloaded; one line that says what to do.
        ValueError: If a file is damaged.
    """
    source = SOURCES[dataset]
    names = [f"{source.prefix}_train_{index:06d}.bin" for index in range(1, shards + 1)]
    for name in (f"{source.prefix}_val_000000.bin", *names):
        if not (folder / name).is_file():
            _fetch(folder, source.repository, name)
        Shard(folder / name)


def _fetch(folder: Path, repository: str, name: str) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "FineWeb's shards are downloaded with huggingface_hub, which is not installed: pip "
            "install huggingface_hub, or install lit_fanions with its extra 'zoo'"
        ) from None
    try:
        hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
    except Exception as error:  # its HTTP library's, its own, and the file system's
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise FileNotFoundError(
            f"{name} is not in {folder} and could not be downloaded from {repository} ({reason}): "
            "try again with a network, or point data_dir to a folder that has it"
        ) from None


class FineWebDataModule(TokenDataModule):
    """FineWeb in shards of 100 million GPT-2 tokens, or any text that was made into shards.

    Missing shards are downloaded from the Hugging Face hub (200 MB each). Without a network, those
    that are there are used. Shards of bytes, or of another text, are made by
    ``python -m datamodules.fineweb tokenize``; into a folder with such shards nothing is
    downloaded.

    Args:
        data_dir: Folder of the shards, *_train_*.bin and *_val_*.bin.
        shards: Training shards wanted; the first ones, by name, of those in the folder are used.
        dataset: What to download.
        tokenizer: What the shards are made with.
        options: Those of TokenDataModule.
    """

    def __init__(
        self,
        data_dir: str = "data/fineweb",
        shards: int = 9,
        dataset: Dataset = "fineweb10B",
        tokenizer: TokenizerName = "gpt2",
        **options: Any,
    ) -> None:
        super().__init__(load_tokenizer(tokenizer), **options)
        check_source(dataset, shards)
        self.data_dir = Path(data_dir).expanduser()
        self.shards = shards
        self.dataset: Dataset = dataset

    def prepare_data(self) -> None:
        """Download what is missing; without a network, a part of it is enough."""
        if self._is_own_text() or self.tokenizer.name != "gpt2":
            return
        there = find_shards(self.data_dir, "train")
        if len(there) >= self.shards and find_shards(self.data_dir, "val"):
            return
        try:
            download(self.data_dir, self.dataset, self.shards)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            there = find_shards(self.data_dir, "train")
            if not there or not find_shards(self.data_dir, "val"):
                raise
            rank_zero_warn(
                f"Training on {len(there)} of {self.shards} shards (shards={len(there)} asks for "
                f"no others): {error}"
            )

    def shard_paths(self, split: Split) -> list[Path]:
        """The first ``shards`` training shards, or all validation shards."""
        paths = find_shards(self.data_dir, split)
        if not paths:
            wanted = f"*_{split}_*.bin of {self.tokenizer.name} tokens"
            remedy = (
                "call prepare_data() first"
                if self.tokenizer.name == "gpt2"
                else "make it with python -m datamodules.fineweb tokenize, or set data_dir"
            )
            raise FileNotFoundError(f"there is no {wanted} in {self.data_dir}: {remedy}")
        return paths[: self.shards] if split == "train" else paths

    def _is_own_text(self) -> bool:
        return (self.data_dir / MANIFEST).exists()

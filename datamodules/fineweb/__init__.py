"""FineWeb, real web text, as token shards; `python -m datamodules.fineweb` makes them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.shards import Shard
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing import MANIFEST, made_with
from datamodules.tokens import Split, TokenDataModule

Dataset = Literal["fineweb10B", "fineweb100B", "finewebedu10B"]

MARKER = "downloaded_from.txt"  # beside downloaded shards, names their hub repository


class Source(NamedTuple):
    """Where a data set's shards are: a hub repository, how they are named, how many to train on."""

    repository: str
    prefix: str
    shards: int

    def names(self, split: Split, shards: int) -> list[str]:
        """The files of one split: the first training shards, or the one for validation."""
        numbers = range(1, shards + 1) if split == "train" else range(1)
        return [f"{self.prefix}_{split}_{number:06d}.bin" for number in numbers]


SOURCES: dict[Dataset, Source] = {
    "fineweb10B": Source("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": Source("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": Source("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def check_source(dataset: Dataset | None, shards: int) -> None:
    """Raise a ValueError unless there is such a data set with so many training shards."""
    if dataset is None:
        if shards < 1:
            raise ValueError(f"shards={shards}: it must be at least 1")
    elif dataset not in SOURCES:
        raise ValueError(
            f"dataset={dataset!r}: choose one of {', '.join(get_args(Dataset))}, or null for text "
            "of your own"
        )
    elif not 1 <= shards <= SOURCES[dataset].shards:
        raise ValueError(f"shards={shards}: {dataset} has 1 to {SOURCES[dataset].shards}")


def check_folder(folder: Path, dataset: Dataset) -> None:
    """Raise a ValueError if a folder holds the shards of something else.

    A file beside the shards says where they were downloaded from. Where there is none, they were
    put there by hand, and their names have to be those of the data set.
    """
    source, marker = SOURCES[dataset], folder / MARKER
    shards = find_shards(folder, "train") + find_shards(folder, "val")
    others = [path.name for path in shards if not path.match(f"{source.prefix}_*")]
    if (folder / MANIFEST).exists():
        held = "shards made by python -m datamodules.fineweb tokenize"
    elif marker.is_file():
        held = marker.read_text().strip()
    else:
        held = others[0] if others else source.repository
    if held != source.repository:
        raise ValueError(
            f"{folder} holds {held}, not {source.repository}: choose another data_dir, or "
            "dataset: null to train on what is there"
        )


def find_shards(folder: Path, split: Split) -> list[Path]:
    """The shards of one split in a folder, by their names, in order."""
    return sorted(folder.glob(f"*_{split}_*.bin"))


def download(folder: Path, dataset: Dataset, shards: int) -> None:
    """Fetch the validation shard and the first training shards, but not those that are there.

    What huggingface_hub has fetched of a file is kept, so that a later call goes on with it.

    Args:
        folder: Where to; made when the hub has answered.
        dataset: Which.
        shards: Number of training shards; may be 0.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
        FileNotFoundError: If a file cannot be downloaded; one line that says what to do.
        ValueError: If a file is damaged, or the folder holds something else.
    """
    check_folder(folder, dataset)
    source, reached = SOURCES[dataset], False
    for name in (*source.names("val", shards), *source.names("train", shards)):
        if not (folder / name).is_file():
            _fetch(folder, source.repository, name, reached)
            reached = True
            (folder / MARKER).write_text(f"{source.repository}\n")
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
        # and prints each try. So the hub is asked first, once, whether it has the first file.
        if not reached:
            try:
                get_hf_file_metadata(hf_hub_url(repository, name, repo_type="dataset"))
            except HfHubHTTPError as error:
                if error.response.status_code < 429:
                    raise
                # The hub is busy or out of order: there it is right to wait and try again.
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

    Missing shards are downloaded from the Hugging Face hub (200 MB each), those that the stage
    needs: for validation and test one, for predict none. Without a network, those that are there
    are used. A folder holds one data set; shards put there by hand are recognized by their names.

    Shards of bytes, or of another text, are made by ``python -m datamodules.fineweb tokenize``;
    into a folder with such shards nothing is downloaded, and with ``dataset: null`` nothing at all.

    Args:
        data_dir: Folder of the shards, *_train_*.bin and *_val_*.bin.
        shards: Training shards wanted: the first ones of the data set; of text of your own, the
            first ones, by name, of those in the folder.
        dataset: What to download; null: nothing, data_dir holds text of your own.
        tokenizer: What the shards are made with.
        options: Those of TokenDataModule.
    """

    def __init__(
        self,
        data_dir: str = "data/fineweb",
        shards: int = 9,
        dataset: Dataset | None = "fineweb10B",
        tokenizer: TokenizerName = "gpt2",
        **options: Any,
    ) -> None:
        super().__init__(load_tokenizer(tokenizer), **options)
        check_source(dataset, shards)
        self.data_dir = Path(data_dir).expanduser()
        self.shards = shards
        self.dataset: Dataset | None = dataset

    def prepare_data(self) -> None:
        """Download what the stage lacks; to train without a network, a part of it is enough.

        Raises:
            FileNotFoundError: If that fails and not even a part is there.
            ValueError: If the folder holds something else.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        dataset = self._hub_dataset()
        if dataset is None or stage == TrainerFn.PREDICTING:
            return
        check_folder(self.data_dir, dataset)
        evaluates = stage in (TrainerFn.VALIDATING, TrainerFn.TESTING)
        shards = 0 if evaluates else self.shards
        if len(self._there("val")) == 1 and (evaluates or len(self._there("train")) == shards):
            return
        try:
            download(self.data_dir, dataset, shards)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            there = [path.name for path in self._there("train")]
            if evaluates or not there or not self._there("val"):
                raise
            gapless = there == SOURCES[dataset].names("train", len(there))
            hint = f" (shards={len(there)} asks for no others)" if gapless else ""
            rank_zero_warn(f"Training on {len(there)} of {shards} shards{hint}: {error}")

    def shard_paths(self, split: Split) -> list[Path]:
        """The first ``shards`` training shards, or the validation shards.

        Raises:
            FileNotFoundError: If there are none.
            ValueError: If they hold tokens of another kind.
        """
        made = made_with(self.data_dir)
        if made not in (None, self.tokenizer.name):
            raise ValueError(
                f"{self.data_dir} holds tokens of kind {made}, not {self.tokenizer.name}: set "
                f"tokenizer to {made}, for which the network must be made, or data_dir"
            )
        paths = self._there(split)
        if not paths:
            wanted = f"*_{split}_*.bin of {self.tokenizer.name} tokens"
            remedy = (
                "call prepare_data() first"
                if self._hub_dataset()
                else "make it with python -m datamodules.fineweb tokenize INPUT --tokenizer "
                f"{self.tokenizer.name} --output {self.data_dir}, or set data_dir"
            )
            raise FileNotFoundError(f"there is no {wanted} in {self.data_dir}: {remedy}")
        return paths

    def _hub_dataset(self) -> Dataset | None:
        """What data_dir holds of the hub; None: text of one's own."""
        own = (self.data_dir / MANIFEST).exists() or self.tokenizer.name != "gpt2"
        return None if own else self.dataset

    def _there(self, split: Split) -> list[Path]:
        """The wanted shards that are in the folder."""
        dataset = self._hub_dataset()
        if dataset is None:
            paths = find_shards(self.data_dir, split)
            return paths[: self.shards] if split == "train" else paths
        names = SOURCES[dataset].names(split, self.shards)
        return [path for name in names if (path := self.data_dir / name).is_file()]

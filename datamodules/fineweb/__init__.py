"""FineWeb, real web text, as token shards; `python -m datamodules.fineweb` makes them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.files import whole_file
from datamodules.shards import Shard, record_checksum
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing import MANIFEST, recorded_tokenizer
from datamodules.tokens import Split, TokenDataModule
from lit_fanions.checks import check_choice, whole_number

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
    for name in (*source.names("val", shards), *source.names("train", shards)):
        if not (folder / name).is_file():
            _fetch(folder, source.repository, name, reached)
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


class FineWebDataModule(TokenDataModule):
    """FineWeb in shards of 100 million GPT-2 tokens, or any text that was made into shards.

    The shards that the stage needs and the folder lacks are downloaded from the Hugging Face hub
    (200 MB each): for validation and test one, for predict none. Without a network, training uses
    the shards in the folder. A folder holds one data set; shards that were copied into it are
    recognised by their names.

    ``python -m datamodules.fineweb tokenize`` makes shards of bytes or of another text. Nothing is
    downloaded into a folder with such shards, nor with ``dataset: null``.

    Args:
        data_dir: Folder of the shards, *_train_*.bin and *_val_*.bin.
        shards: Number of training shards: the first ones of the data set or, for text of your
            own, the first ones by name in the folder.
        dataset: Data set to download; null: none, data_dir holds text of your own.
        tokenizer: Tokenizer that the shards were made with.
        options: Options of TokenDataModule.
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
        """Download the missing shards; training without a network uses those in the folder."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        dataset = self._hub_dataset()
        if dataset is None or stage == TrainerFn.PREDICTING:
            return
        check_folder(self.data_dir, dataset)
        evaluates = stage in (TrainerFn.VALIDATING, TrainerFn.TESTING)
        shards = 0 if evaluates else self.shards
        complete = evaluates or len(self._found_shards("train")) == shards
        if complete and len(self._found_shards("val")) == 1:
            return
        try:
            download(self.data_dir, dataset, shards)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            found = [path.name for path in self._found_shards("train")]
            if evaluates or not found or not self._found_shards("val"):
                raise
            gapless = found == SOURCES[dataset].names("train", len(found))
            hint = f" (shards={len(found)} asks for no others)" if gapless else ""
            rank_zero_warn(f"Training on {len(found)} of {shards} shards{hint}: {error}")

    def shard_paths(self, split: Split) -> list[Path]:
        """Return the first ``shards`` training shards, or the validation shards."""
        recorded = recorded_tokenizer(self.data_dir)
        if recorded not in (None, self.tokenizer.name):
            raise ValueError(
                f"{self.data_dir} holds tokens of kind {recorded}, not {self.tokenizer.name}: set "
                f"tokenizer to {recorded} (and the network's vocab_size to match), or data_dir"
            )
        paths = self._found_shards(split)
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
        """Return the hub's data set in data_dir; None for the user's own text."""
        own = (self.data_dir / MANIFEST).exists() or self.tokenizer.name != "gpt2"
        return None if own else self.dataset

    def _found_shards(self, split: Split) -> list[Path]:
        """Return those of the wanted shards that are in the folder."""
        dataset = self._hub_dataset()
        if dataset is None:
            paths = find_shards(self.data_dir, split)
            return paths[: self.shards] if split == "train" else paths
        names = SOURCES[dataset].names(split, self.shards)
        return [path for name in names if (path := self.data_dir / name).is_file()]

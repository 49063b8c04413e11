"""FineWeb's shards, or those of any text, as a LightningDataModule."""

from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.fineweb import SOURCES, Dataset, check_folder, check_source, download, find_shards
from datamodules.shards import Split
from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokenizing import MANIFEST, recorded_tokenizer
from datamodules.tokens import TokenDataModule


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

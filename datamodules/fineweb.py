"""FineWeb as token shards."""

from pathlib import Path
from typing import Any

from datamodules.tokenizers import TokenizerName, load_tokenizer
from datamodules.tokens import Split, TokenDataModule


class FineWebDataModule(TokenDataModule):
    """FineWeb in shards of 100 million tokens.

    Args:
        data_dir: Folder of the shards: *_train_*.bin and *_val_*.bin.
        shards: Training shards wanted; the first ones in the folder are used.
        tokenizer: What the shards are made with.
        options: Those of TokenDataModule.
    """

    def __init__(
        self,
        data_dir: str = "data/fineweb",
        shards: int = 9,
        tokenizer: TokenizerName = "gpt2",
        **options: Any,
    ) -> None:
        super().__init__(load_tokenizer(tokenizer), **options)
        if shards < 1:
            raise ValueError(f"shards={shards}: it must be at least 1")
        self.data_dir = Path(data_dir).expanduser()
        self.shards = shards

    def shard_paths(self, split: Split) -> list[Path]:
        """See TokenDataModule."""
        paths = sorted(self.data_dir.glob(f"*_{split}_*.bin"))
        if not paths:
            raise FileNotFoundError(f"there is no *_{split}_*.bin in {self.data_dir}")
        return paths[: self.shards] if split == "train" else paths

"""A stand-in for huggingface_hub, and small FineWeb folders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import FineWebDataModule
from datamodules.shards import write_shard

SMALL = {"batch_tokens": 64, "sequence_length": 16, "micro_batch_size": 2}


class HubError(OSError):
    """A stand-in for an error that the hub answers with."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"{status_code} it is")
        self.response = SimpleNamespace(status_code=status_code)


class Hub:
    """A stand-in for huggingface_hub that writes a shard, or fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fail_at: str | None = None
        self.cut = 0
        self.urls: list[str] = []
        self.answer: Exception | None = None

    def hf_hub_url(self, repo_id: str, filename: str, *, repo_type: str) -> str:
        return f"{repo_type}s/{repo_id}/{filename}"

    def get_hf_file_metadata(self, url: str) -> None:
        self.urls.append(url)
        if self.answer:
            raise self.answer

    def hf_hub_download(
        self, repo_id: str, filename: str, *, repo_type: str, local_dir: Path
    ) -> str:
        assert repo_type == "dataset"
        self.asked.append((repo_id, filename))
        if filename == self.fail_at:
            try:
                raise ConnectionError("Name or service\nnot known")
            except ConnectionError as error:
                raise OSError("a long story about the cache") from error
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, np.full(200, len(self.asked), np.uint16))
        content = path.read_bytes()[: path.stat().st_size - self.cut]
        path.write_bytes(content[:12] + bytes(4) + content[16:])  # the hub's have no checksum
        return str(path)

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.asked]


def module(folder: Path, shards: int = 2, **options: Any) -> FineWebDataModule:
    return FineWebDataModule(str(folder), shards, **{**SMALL, **options})


def in_stage(data: FineWebDataModule, stage: TrainerFn) -> FineWebDataModule:
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))  # type: ignore[assignment]
    return data


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_shard(folder / name, np.arange(200, dtype=np.uint16))


VAL = "fineweb_val_000000.bin"


FIRST, SECOND, THIRD, FOURTH = (f"fineweb_train_00000{number}.bin" for number in range(1, 5))

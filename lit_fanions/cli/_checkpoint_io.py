"""Checkpoint files: written whole or not at all, checked before loading, never run as code."""

import contextlib
import functools
import glob
import io
import os
import pickle
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from enum import EnumMeta
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_fanions.cli.errors import similar_file
from lit_fanions.progress import Meter

_TRUST = "pass --weights_only false if you trust its author"
_DAMAGED = "take an earlier checkpoint, or copy the file again"
# Parts that Lightning reads without a check.
_PARTS = {
    "state_dict": Mapping, "optimizer_states": list, "lr_schedulers": list, "loops": Mapping,
    "callbacks": Mapping, "pytorch-lightning_version": str,
}  # fmt: skip
_RETURNED_WEIGHTS = ".temp.ckpt"  # the file of weights alone that ddp_spawn hands to its parent
_PART = 2**22  # bytes that are read at once
_ABANDONED = 3600  # seconds without a write after which another run does not write a file any more
# What the metadata of a distributed checkpoint may be made of, beside dtypes.
_METADATA_TYPES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
}  # fmt: skip


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it; checks a checkpoint before loading.

    A kill, a full disk or a loss of power while saving leaves the earlier file as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint; object storage and other remote file systems are left to Lightning."""
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with replacing(Path(path)) as file:
                torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint; objects other than weights only with ``weights_only=False``."""
        file: Any = path
        if is_remote(path):
            files, name = url_to_fs(str(path))
            file = io.BytesIO(files.cat_file(name))
            _check_records(file, path)
        else:
            check_checkpoint(path)
        try:
            checkpoint = torch.load(file, map_location, weights_only=weights_only is not False)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(_describe(error, path)) from error
        if Path(path).name == _RETURNED_WEIGHTS and _holds_tensors_alone(checkpoint):
            return checkpoint
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{path} is no checkpoint of a Trainer: it has no state_dict")
        for key, kind in _PARTS.items():
            if key in checkpoint and not isinstance(checkpoint[key], kind):
                found = type(checkpoint[key]).__name__
                raise ValueError(f"{path} is damaged (its {key} is a {found}): {_DAMAGED}")
        return checkpoint


def _holds_tensors_alone(checkpoint: object) -> bool:
    values = checkpoint.values() if isinstance(checkpoint, dict) else [None]
    return all(isinstance(value, torch.Tensor) for value in values)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of ``path`` once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # After an error of the file torch.save raises one of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            reason = f"{cause.strerror}; the file that was there before is unchanged"
            raise OSError(cause.errno, reason, str(path)) from error
        raise
    with contextlib.suppress(OSError):  # Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # left by a kill
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _ABANDONED:
                stale.unlink()


def is_remote(path: str | Path) -> bool:
    """Return True for an URL."""
    return "://" in str(path)


def check_argument(path: str, weights_only: bool) -> None:
    """Refuse a local path that is missing or cannot be trusted, and a URL without encryption."""
    if path.startswith("http://"):
        raise ValueError(f"{path} could be changed on its way: use https://")
    if is_remote(path):
        return
    if not Path(path).exists():
        raise ValueError(f"file does not exist: {path}{similar_file(path)}")
    rank_zero_only(check_checkpoint)(path, weights_only)


def check_checkpoint(path: str | Path, weights_only: bool = True) -> None:
    """Refuse a local checkpoint that is damaged, or a distributed one that holds code.

    Distributed checkpoints, which are folders, are read by torch.distributed.checkpoint: it
    unpickles their metadata and whatever is no tensor without restrictions.
    """
    if Path(path).is_dir():
        _check_folder(Path(path), weights_only)
    else:
        status = os.stat(path)
        _check_file(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _check_file(path: str, size: int, modified: int) -> None:
    """Check a file once, although that is asked before the model is built and when loading."""
    with open(path, "rb") as file:
        _check_records(file, path)


def _check_records(file: IO[bytes], path: object) -> None:
    """Compare a file with the checksums that torch.save writes; its old format has none."""
    start = file.read(2)
    if start[:1] == b"\x80":
        return
    if start != b"PK":
        raise ValueError(f"{path} is no checkpoint" + (": it is empty" if not start else ""))
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            with Meter(f"checking {path}", sum(record.file_size for record in records)) as meter:
                for record in records:
                    with archive.open(record) as content:
                        while part := content.read(_PART):  # compares the checksum at the end
                            meter.advance(len(part))
    except Exception as error:  # any, as the headers may be damaged
        raise ValueError(f"{path} is damaged ({error}): {_DAMAGED}") from error
    file.seek(0)


def _describe(error: Exception, path: object) -> str:
    """Return why torch could not load a file."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return f"{path} holds objects that can run code when they are loaded: {_TRUST}"
    reason = " ".join(str(error).split())[:200]
    return f"{path} cannot be loaded ({type(error).__name__}: {reason}): {_DAMAGED}"


def _check_folder(folder: Path, weights_only: bool) -> None:
    """Check a distributed checkpoint: its metadata, and each tensor and object in its files."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is no distributed checkpoint: it has no file .metadata")
    reader = _MetadataReader if weights_only else pickle.Unpickler
    with (folder / ".metadata").open("rb") as file:
        try:
            metadata = reader(file).load()
            kinds = metadata.state_dict_metadata
            entries = [(info, isinstance(kinds[index.fqn], TensorStorageMetadata))
                       for index, info in metadata.storage_data.items()]  # fmt: skip
        except _Forbidden as error:
            raise ValueError(f"{file.name} calls {error} when it is loaded: {_TRUST}") from error
        except Exception as error:  # any, as the bytes may be damaged
            raise ValueError(f"{file.name} is damaged ({error!r}): {_DAMAGED}") from error
    for info, is_tensor in entries:
        path = folder / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            record = io.BytesIO(file.read(info.length))
        _check_records(record, path)
        if weights_only and not is_tensor:
            try:
                torch.load(record, weights_only=True)
            except Exception as error:
                raise ValueError(_describe(error, path)) from error


class _Forbidden(Exception):
    """A pickle names something that the metadata of a checkpoint has no need of."""


class _MetadataReader(pickle.Unpickler):
    """Reads the metadata of a distributed checkpoint, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_TYPES.get(module, ()):
            return super().find_class(module, name)
        raise _Forbidden(f"{module}.{name}")


def _enum_member(kind: object, name: str) -> object:
    """Return the member that getattr is called for in pickles of Python 3.11.0 to 3.11.3."""
    # Not kind[name]: what is loaded later calls getattr, and a pickle can change an enum's tables.
    member = getattr(kind, name) if isinstance(kind, EnumMeta) else None
    if type(member) is not kind:
        raise _Forbidden("builtins.getattr")
    return member

"""Compare tensors to the last bit: those of two trainings, or of two checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIGESTS = "digests.jsonl"  # in the folder of a run; `lit_fanions.cli.digests` writes it
_PARTS = ("state_dict", "optimizer_states")  # of a checkpoint

Digests = dict[int, dict[str, str]]  # optimizer step -> tensor -> digest


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Return in one line how tensors differ, an empty string if they are equal to the last bit."""
    if before.keys() != after.keys():
        return f"other tensors: {', '.join(sorted(before.keys() ^ after.keys())[:3])}"
    for name, old in before.items():
        new = after[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return f"{name} was {_describe(old)} and is {_describe(new)}"
    changed = [name for name in before if _bits(before[name]) != _bits(after[name])]
    if not changed:
        return ""
    sizes = {name: _largest_difference(before[name], after[name]) for name in changed}
    worst = max(sizes, key=lambda name: sizes[name])
    return f"{sizes[worst]:.2g} relative in {worst} ({len(changed)} of {len(before)} differ)"


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape, dtype and bits."""
    return hashlib.blake2b(_describe(tensor).encode() + _bits(tensor), digest_size=8).hexdigest()


def read_digests(folder: Path) -> Digests:
    """Return the digests of a run's weights by step; empty if it recorded none.

    A last line without its end is left out: the run was killed while it wrote it.

    Raises:
        ValueError: If another line is damaged.
    """
    if not (file := folder / DIGESTS).is_file():
        return {}
    digests = {}
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            digests[entry["step"]] = dict(entry["digests"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is damaged in line {number}") from None
    return digests


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, weights and the optimizer's state, by dotted names.

    Raises:
        ValueError: If the file is damaged, or no checkpoint.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen types for a damaged file
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, and is no checkpoint")
    values = flatten({part: checkpoint.get(part, {}) for part in _PARTS})
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values of nested mappings, lists and tuples by dotted keys."""
    if not isinstance(value, (Mapping, list, tuple)):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        flat |= flatten(part, f"{key}.{name}" if key else str(name))
    return flat


def _bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's entries; zeros of different sign and NaNs differ."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _largest_difference(old: Tensor, new: Tensor) -> float:
    """Return max |new - old| / max |old|; infinite where one of them is not finite."""
    old, new = old.double(), new.double()
    size = float((new - old).abs().max())
    scale = float(old.abs().max()) or 1.0
    return size / scale if math.isfinite(size) else math.inf


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

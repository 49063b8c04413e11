"""Steps that a CUDA graph captures: numbers that change are tensors on the device.

A graph replays kernels with the numbers that they were captured with. All that a captured step must
not read or do is decided in this room.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_fanions.lmo import SOLVERS
from lit_fanions.lmo.powers import takes_products
from lit_fanions.optim.algorithms import ALGORITHMS, Group, is_entrywise

_CHANGING = ("lr", "momentum", "weight_decay")


def check_capturable(group: Group, where: str) -> None:
    """Refuse options of a capturable group that wait for the device or draw on the host."""
    waits = [name for name, value in (("nonfinite", "error"), ("polar", "exact"))
             if group.get(name) == value]  # fmt: skip
    solver = group.get("solver", "auto")
    if solver == "lanczos" or (solver != "auto" and not SOLVERS[solver].warm):
        waits.append("solver")
    if "schatten" in (ALGORITHMS[group["algorithm"]].ball, group.get("blend")):
        known = group["p"] in (1, 2, math.inf) or takes_products(group["p"])
        waits += [] if known else ["p"]  # which takes an eigendecomposition
    if group["capturable"] and waits:
        name = waits[0]
        raise ValueError(
            f"{where}: a step with {name}={group[name]!r} waits for the device or draws on the "
            "host, which a CUDA graph cannot capture: choose another, or leave capturable out"
        )


def is_capturing() -> bool:
    """Return whether a CUDA graph captures what is run now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_capture(groups: Sequence[Group], stepped: Container[Tensor]) -> None:
    """Refuse the capture of a step that would wait for the device.

    Groups that are not capturable wait, and so does a first step, which makes the state.
    """
    for group in groups:
        if not group["capturable"]:
            raise RuntimeError(
                f"a CUDA graph captures this step: make group {group['name']!r} capturable"
            )
        if any(p.grad is not None and p not in stepped for p in group["params"]):
            raise RuntimeError("step a few times before a CUDA graph captures the step")


class DeviceNumbers:
    """lr, momentum and weight decay of capturable groups, in float64 on each group's device."""

    def __init__(self) -> None:
        self._numbers: dict[str, Tensor] = {}

    def upload(self, groups: Sequence[Group]) -> None:
        """Copy the numbers of groups to the device of each group, without a wait."""
        for group in groups:
            if not group["capturable"]:
                continue
            devices = {p.device for p in group["params"]}
            if len(devices) != 1:
                raise RuntimeError(
                    f"group {group['name']!r} is capturable and has parameters on "
                    f"{', '.join(sorted(map(str, devices)))}: give each device a group"
                )
            (device,) = devices
            values = [group[name] for name in _CHANGING]
            host = torch.tensor(
                [0.0 if isinstance(value, Tensor) else value for value in values],
                dtype=torch.float64,
                device="cpu",
                pin_memory=device.type == "cuda" and torch.cuda.is_available(),
            )
            numbers = self._numbers.get(group["name"])
            if numbers is None or numbers.device != device:
                numbers = self._numbers[group["name"]] = torch.empty_like(host, device=device)
            numbers.copy_(host, non_blocking=True)
            for number, value in zip(numbers.unbind(), values, strict=True):
                if isinstance(value, Tensor):
                    number.copy_(value)

    def replace(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group with 0-dimensional tensors in place of its numbers, if capturable.

        A weight decay of 0 stays a number, so that there is no pass for it. torch's fused kernels
        take only lr as a tensor, in float32.
        """
        if not group["capturable"]:
            return group
        lr, momentum, weight_decay = self._numbers[group["name"]].unbind()
        if is_entrywise(group["algorithm"]):
            return {**group, "lr": lr.float()}
        decay = {"weight_decay": weight_decay} if group["weight_decay"] else {}
        return {**group, "lr": lr, "momentum": momentum, **decay}

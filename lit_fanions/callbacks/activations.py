"""Measure the stable ranks of the activations that enter the matrices of a module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lit_fanions.callbacks.lightning_interface import is_compiled, padding
from lit_fanions.lmo import spectrum as spectra

# Most rows of activations that are measured.
_MAX_ROWS = 2048
# Names of the inputs of linear layers and of attention, in the order of their arguments.
_INPUT_NAMES = ("input", "query", "key", "value")

# From the inputs of a module's forward to the rows that its matrices multiply, by weight.
RowsByWeight = Callable[[Sequence[Any]], dict[str, Tensor]]


class ActivationRanks:
    """Measures activations by forward hooks, from ``attach`` to ``detach``.

    Attributes:
        by_weight: Name of a parameter, or of a matrix of it, -> stable rank of what enters it.
    """

    def __init__(self) -> None:
        self.by_weight: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, network: nn.Module) -> None:
        """Add a hook to every module whose inputs are understood.

        Compiled modules get none: a hook would compile them again, with other rounding.
        """
        modules = dict(network.named_modules())
        compiled = [path for path, module in modules.items() if is_compiled(module)]
        for path, module in modules.items():
            rows = _rows_by_weight(module)
            within = any(f"{path}.".startswith(f"{outer}.") or not outer for outer in compiled)
            if rows is not None and not within:
                hook = functools.partial(self._measure, path, rows)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks; the measured ranks stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _measure(
        self, path: str, rows: RowsByWeight, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        inputs = [*args, *(kwargs[name] for name in _INPUT_NAMES if name in kwargs)]
        if not module.training or not inputs or not isinstance(inputs[0], Tensor):
            return
        for weight, x in rows(inputs).items():
            x = x[:: max(1, len(x) // _MAX_ROWS)][:_MAX_ROWS]
            value = float(spectra.stable_rank(spectra.measure(x, leading=True)))
            self.by_weight[f"{path}.{weight}" if path else weight] = value


def _rows_by_weight(module: nn.Module) -> RowsByWeight | None:
    """Return how a module's inputs become rows, or None for a module of another kind."""
    if isinstance(module, nn.Linear):
        return lambda args: {"weight": _rows(args[0])}
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1:
        return lambda args: {"weight": patches(module, args[0].detach())}
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return lambda args: {f"in_proj_weight[{i}]": _rows(x) for i, x in enumerate(args[:3])}
    return None


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Return the rows that a convolution's flattened weight multiplies, of the first images.

    Their shape is (patches, input channels * kernel size), with at least 2048 patches if the batch
    has them. The convolution has no groups; its input may lack a batch dimension.
    """
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:
        x = x.unsqueeze(0)
    positions = x[0, 0].numel()
    x = x[: max(1, 4 * _MAX_ROWS // positions)].float()
    x = F.pad(x, padding(module))  # every padding mode counts as zeros
    if dims == 1:
        x = x.unsqueeze(-2)
    ones = (1,) * (2 - dims)
    unfolded = F.unfold(
        x,
        kernel_size=(*ones, *module.kernel_size),
        dilation=(*ones, *module.dilation),
        stride=(*ones, *module.stride),
    )
    return unfolded.mT.flatten(0, 1)

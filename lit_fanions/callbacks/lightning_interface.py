"""Everything that depends on Lightning's version or on which of its two packages is used.

Lightning exists as ``lightning.pytorch`` and as ``pytorch_lightning``: equal code, different
classes. A callback must be an instance of the Callback of the package whose LightningCLI reads the
YAML, and a logger may come from either. Private attributes of Lightning and torch that the
callbacks read are read here only; ``tests/callbacks/test_lightning_interface.py`` fails for a
version that has renamed one.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero
from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
else:

    def _find(module: str, name: str) -> tuple[Any, ...]:
        """Return a name of each installed Lightning package, first of the one in use."""
        packages = sorted(
            ("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules
        )
        found, logs = [], []
        for package in packages:
            try:
                found.append(getattr(importlib.import_module(package + module), name))
            except Exception:  # not installed, or too old for the installed torch
                continue
            logs.append(rank_zero.log)
        if not found:
            raise ImportError("lit_fanions.callbacks needs Lightning: pip install lightning")
        # Each package makes its own logger that of all messages when it is imported; the user may
        # have set the level of the first one.
        rank_zero.log = logs[0]
        return tuple(found)

    class Callback(*_find("", "Callback")):
        """A callback for the Trainer and the LightningCLI of every installed Lightning package."""

    class MisconfigurationException(*_find(".utilities.exceptions", "MisconfigurationException")):
        """An error in the user's configuration, as every installed Lightning package raises."""

    is_param_in_hook_signature, *_ = _find(
        ".utilities.signature_utils", "is_param_in_hook_signature"
    )


def tensorboard_writer(logger: Any) -> Any | None:
    """Return the SummaryWriter of a TensorBoardLogger of either package; None for other loggers."""
    is_tensorboard = any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)
    return logger.experiment if is_tensorboard else None


def optimizer_steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps before this one, by which Lightning logs metrics.

    ``trainer.global_step`` counts the steps of all optimizers of manual optimization instead.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_compiled(module: nn.Module) -> bool:
    """Return True for a module compiled by ``module.compile()`` or ``torch.compile(module)``."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def padding(convolution: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Return the zeros around a convolution's input as ``torch.nn.functional.pad`` takes them."""
    return [*convolution._reversed_padding_repeated_twice]


def name_without_wrappers(name: str) -> str:
    """Return a parameter's or module's name without the levels that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")

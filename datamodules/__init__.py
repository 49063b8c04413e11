"""Data for the zoo's models, as LightningDataModules.

The classes are imported at first use, so that `python -m datamodules.fineweb` does not load
Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.cifar10 import CIFAR10DataModule
    from datamodules.digit_features import DigitFeaturesDataModule
    from datamodules.digits import DigitsDataModule
    from datamodules.fineweb.data_module import FineWebDataModule
    from datamodules.least_squares import LeastSquaresDataModule
    from datamodules.pydoc_text import PydocDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitFeaturesDataModule",
    "DigitsDataModule",
    "FineWebDataModule",
    "LeastSquaresDataModule",
    "PydocDataModule",
]

_MODULES = {
    "CIFAR10DataModule": "cifar10",
    "DigitFeaturesDataModule": "digit_features",
    "DigitsDataModule": "digits",
    "FineWebDataModule": "fineweb.data_module",
    "LeastSquaresDataModule": "least_squares",
    "PydocDataModule": "pydoc_text",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

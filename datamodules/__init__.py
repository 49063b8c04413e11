"""Data for the zoo's models, as LightningDataModules."""

from datamodules.cifar10 import CIFAR10DataModule
from datamodules.digit_features import DigitFeaturesDataModule
from datamodules.digits import DigitsDataModule
from datamodules.fineweb import FineWebDataModule
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

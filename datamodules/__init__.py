"""Data for the zoo's models, as LightningDataModules."""

from datamodules.cifar10 import CIFAR10DataModule
from datamodules.digits import DigitsDataModule
from datamodules.fineweb import FineWebDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule", "FineWebDataModule"]

"""The protocols between models and data, and that neither room imports the other."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule

from datamodules import (
    CIFAR10DataModule,
    DigitFeaturesDataModule,
    DigitsDataModule,
    FineWebDataModule,
    LeastSquaresDataModule,
    PydocDataModule,
)
from models import Airbench, data
from tests.conftest import subprocess_environment

TOKENS = (
    data.HasVocabulary,
    data.HasDocuments,
    data.HasSequences,
    data.HasTokenizer,
    data.HasPrompts,
)


@pytest.mark.parametrize(
    ("source", "protocols"),
    [
        (CIFAR10DataModule(), [data.HasTrainingImages]),
        (DigitsDataModule(), [data.HasTrainingImages]),
        (FineWebDataModule(), TOKENS),
        (PydocDataModule(), TOKENS),
        (LeastSquaresDataModule(), [data.HasProblems]),
        (DigitFeaturesDataModule(), [data.HasFeatures]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LightningDataModule) else "",
)
def test_data_modules_answer_what_their_models_ask(source, protocols) -> None:
    assert all(isinstance(source, protocol) for protocol in protocols)


@pytest.mark.parametrize(("room", "other"), [("models", "datamodules"), ("datamodules", "models")])
def test_import_of_one_room_loads_nothing_of_the_other(room: str, other: str) -> None:
    names = [room] + [
        f"{room}.{p.stem}" for p in (Path(__file__).parents[2] / room).glob("[!_]*.py")
    ]
    code = f"import sys, {', '.join(names)}; sys.exit('{other}' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=subprocess_environment())


def test_model_without_a_trainer_has_no_data() -> None:
    assert data.attached_data(Airbench(widths=(8, 8, 8))) is None

"""Private interfaces of Lightning that the models read: this version has them."""

import pytest
from lightning.pytorch import LightningModule, Trainer

from models.lightning_internals import attached_trainer, synchronises_batch_norm


def test_attached_trainer_is_the_modules_trainer() -> None:
    module = LightningModule()
    assert attached_trainer(module) is None
    trainer = Trainer(accelerator="cpu", logger=False)
    module.trainer = trainer
    assert attached_trainer(module) is trainer


@pytest.mark.parametrize("sync", [False, True])
def test_synchronised_batch_norm_is_recognised(sync: bool) -> None:
    options = {"strategy": "ddp", "devices": 1, "logger": False}
    trainer = Trainer(accelerator="cpu", sync_batchnorm=sync, **options)
    assert hasattr(trainer.strategy, "_layer_sync")
    assert synchronises_batch_norm(trainer) == sync
    assert not synchronises_batch_norm(None)

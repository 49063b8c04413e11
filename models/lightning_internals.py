"""Private interfaces of Lightning that the models read, each with the reason.

tests/models/test_lightning_internals.py fails with a version of Lightning that lacks one of them.
"""

from lightning.pytorch import LightningModule, Trainer


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, or None; the public property raises an error without one."""
    return module._trainer


def synchronises_batch_norm(trainer: Trainer | None) -> bool:
    """Return whether the trainer would replace batch norms by synchronised ones.

    Nothing public tells what ``Trainer(sync_batchnorm=...)`` or a plugin was given.
    """
    strategy = getattr(trainer, "strategy", None)
    return getattr(strategy, "_layer_sync", None) is not None

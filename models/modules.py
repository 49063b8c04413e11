"""What the models ask of Lightning: their trainer, and hyperparameters that outlive the code."""

import inspect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, or None; the public property raises an error without one."""
    return module._trainer


def save_plain_hyperparameters(
    module: LightningModule, configs: dict[str, dict[str, Any]], ignore: Sequence[str] = ()
) -> None:
    """Save the arguments of the calling ``__init__`` as hyperparameters, configs as plain dicts.

    A pickled dataclass names the file of its class: it would not load once the class has moved,
    nor with weights_only where the class is not registered.

    Args:
        module: The module whose ``__init__`` calls.
        configs: Arguments that are dataclasses, by name, each as a nested dict.
        ignore: Names of arguments that are not saved.
    """
    frame = inspect.currentframe()
    assert frame is not None
    module.save_hyperparameters(ignore=[*configs, *ignore], frame=frame.f_back)
    module.save_hyperparameters(configs)

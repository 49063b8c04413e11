"""Recipes that commands build and train themselves, with temporary logs and without messages.

Apart from the commands, because Lightning's command line needs jsonargparse, which races of
optimizers and solvers do without.
"""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jsonargparse import Namespace

from lit_fanions.cli.app import CLI


class Recipe(CLI):
    """A recipe whose trainer, model and data are built but not run.

    Args:
        args: Arguments of fit, such as ``--config FILE``.
        logs: Folder for its loggers.
    """

    def __init__(self, args: Sequence[str], logs: str) -> None:
        self.logs = logs
        super().__init__(args, run=False)

    def before_instantiate_classes(self) -> None:
        """Redirect the loggers."""
        loggers = self.config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and "save_dir" in logger.init_args:
                logger.init_args.save_dir = self.logs


@contextlib.contextmanager
def builder(*args: str) -> Iterator[Callable[[], Recipe]]:
    """Provide a function that builds a recipe; its logs are deleted at the end.

    Warnings and Lightning's messages are silenced meanwhile.

    Args:
        *args: Arguments of fit.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as logs, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root, sanity = f"--trainer.default_root_dir={logs}", "--trainer.num_sanity_val_steps=0"
            yield lambda: Recipe([*args, root, sanity], logs)
    finally:
        logger.setLevel(level)


def training_batches(recipe: Recipe) -> Iterator[Any]:
    """Yield the training batches of a recipe, epoch after epoch without end, without training."""
    data = recipe.datamodule or recipe.model
    if recipe.datamodule is not None:
        data.trainer = recipe.trainer
        data.prepare_data()
        data.setup("fit")
    loader: Iterable[Any] = data.train_dataloader()
    limit = recipe.trainer.limit_train_batches
    while True:
        length = len(loader)  # type: ignore[arg-type]
        stop = int(limit * length) if isinstance(limit, float) else min(limit, length)
        for index, batch in enumerate(loader):
            yield batch
            if index + 1 == stop:
                break

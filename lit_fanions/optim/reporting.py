"""Messages of the first process only, without Lightning, which plain torch projects do not load."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import torch.distributed as dist

_LOGGER = logging.getLogger("lit_fanions")
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def is_first_process() -> bool:
    """Return whether this process has rank 0, or is the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    ranks = [os.environ[name] for name in _RANKS if name in os.environ]
    return not ranks or ranks[0] == "0"


def inform(message: str, *args: object) -> None:
    """Log a message on the first process; to stderr where the program has set up no logging."""
    if not is_first_process():
        return
    if not _LOGGER.handlers and not logging.getLogger().handlers:
        _LOGGER.addHandler(logging.StreamHandler())
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.propagate = False
    _LOGGER.info(message, *args)


def caller_level() -> int:
    """Return the ``stacklevel`` of a warning that shows the code that uses this package.

    torch's optimizers stand between its functions and are left out too.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("lit_fanions", "torch"):
            break
        frame, level = frame.f_back, level + 1
    return level


def warn(message: str) -> None:
    """Warn on the first process."""
    if is_first_process():
        warnings.warn(message, stacklevel=caller_level())

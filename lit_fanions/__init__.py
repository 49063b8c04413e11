"""Optimizers that step in a norm of your choice: Muon, Neon, k-Fanions and their blends."""

from lit_fanions import bounds, lmo, norms
from lit_fanions.optim.algorithms import oracle
from lit_fanions.optim.config import FanionConfig, Override
from lit_fanions.optim.factory import configure_optimizers, split_parameters
from lit_fanions.optim.fanion import Fanion
from lit_fanions.optim.options import GroupOptions
from lit_fanions.optim.schedules import ScheduleConfig
from lit_fanions.optim.sharpness import SharpnessAscent

__version__ = "0.2.0.dev0"

__all__ = [
    "Fanion",
    "FanionConfig",
    "GroupOptions",
    "Override",
    "ScheduleConfig",
    "SharpnessAscent",
    "bounds",
    "configure_optimizers",
    "lmo",
    "norms",
    "oracle",
    "split_parameters",
]

"""Lightning callbacks: monitor the optimizer, choose a norm, add Fanion to any project.

The classes are imported at first use, so that modules of this package that need no Lightning (the
report reads ``quantities`` and ``figures``) do not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_fanions.callbacks.advisor import NormAdvisor
    from lit_fanions.callbacks.drop_in import FanionOptimizer
    from lit_fanions.callbacks.sharpness import SharpnessAware
    from lit_fanions.callbacks.smoothness import SmoothnessMonitor
    from lit_fanions.callbacks.spectral_monitor import SpectralMonitor
    from lit_fanions.callbacks.step_monitor import StepMonitor

__all__ = [
    "FanionOptimizer",
    "NormAdvisor",
    "SharpnessAware",
    "SmoothnessMonitor",
    "SpectralMonitor",
    "StepMonitor",
]

_MODULES = {
    "FanionOptimizer": "drop_in",
    "NormAdvisor": "advisor",
    "SharpnessAware": "sharpness",
    "SmoothnessMonitor": "smoothness",
    "SpectralMonitor": "spectral_monitor",
    "StepMonitor": "step_monitor",
}


def __getattr__(name: str) -> Any:
    """Import a callback when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]

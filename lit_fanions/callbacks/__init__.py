"""Lightning callbacks: what the optimizer does, which one to use, and how to get it in."""

from lit_fanions.callbacks.advisor import NormAdvisor
from lit_fanions.callbacks.drop_in import FanionOptimizer
from lit_fanions.callbacks.spectral_monitor import SpectralMonitor

__all__ = ["FanionOptimizer", "NormAdvisor", "SpectralMonitor"]

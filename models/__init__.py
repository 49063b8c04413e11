"""Networks to train with the Fanions, as LightningModules."""

from models.airbench import Airbench

__all__ = ["Airbench"]

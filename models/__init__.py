"""Networks to train with the Fanions, as LightningModules; ``data`` says what they need of data."""

from models.airbench import Airbench
from models.gpt import GPTConfig
from models.least_squares import LeastSquares
from models.logistic_regression import LogisticRegression
from models.nanogpt import NanoGPT

__all__ = ["Airbench", "GPTConfig", "LeastSquares", "LogisticRegression", "NanoGPT"]

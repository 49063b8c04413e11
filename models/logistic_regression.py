"""Multinomial logistic regression: section 6.2 of the draft of the paper on the Fanions."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from datamodules.digit_features import Examples
from lit_fanions import FanionConfig
from models.convex import ConvexProblem, check_positive


class LogisticRegression(ConvexProblem):
    """Mean cross entropy of softmax(W x), plus l2 / 2 times the squared Frobenius norm of W.

    W is classes x features and starts at 0; biases are the column of a constant feature. What is
    logged of the training is described at ``ConvexProblem``; val and test have {val,test}/loss,
    without the penalty, and {val,test}/acc.

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        classes: Number of classes.
        features: Number of features.
        l2: The penalty: without it, classes that can be separated have no best W.
        points_per_decade: Steps that are logged from each power of ten to the next.
    """

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        classes: int = 10,
        features: int = 2145,
        l2: float = 1e-3,
        points_per_decade: int = 20,
    ) -> None:
        check_positive(classes=classes, features=features)
        super().__init__(optimizer, 1, classes, features, points_per_decade)
        if not 0 <= l2 < math.inf:
            raise ValueError(f"l2={l2}: it must be a number of at least 0")
        # Checkpoints must hold plain data: a dataclass would not load with weights_only.
        self.save_hyperparameters(ignore="optimizer")
        self.save_hyperparameters({"optimizer": self.fanion_config.to_dict()})
        self.l2 = l2

    def setup(self, stage: str) -> None:
        """Check that the data has as many features.

        Raises:
            ValueError: If it has not.
        """
        given = getattr(getattr(self.trainer, "datamodule", None), "features", self.shape[2])
        if given != self.shape[2]:
            raise ValueError(
                f"the data has {given} features and the model {self.shape[2]}: set features to "
                f"{given}"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Logits of examples: (n, features) -> (n, classes)."""
        return features @ self.weight.mT

    def losses(self, batch: Examples) -> Tensor:
        """The loss, (1,)."""
        penalty = self.l2 / 2 * self.weight.square().sum()
        return (cross_entropy(self(batch.features), batch.labels) + penalty).view(1)

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: Examples, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Examples, batch_idx: int) -> Tensor:
        """Class probabilities, (n, classes)."""
        return self(batch.features).softmax(-1)

    def _evaluate(self, stage: str, batch: Examples) -> None:
        logits = self(batch.features)
        accuracy = (logits.argmax(-1) == batch.labels).to(torch.float64).mean()
        loss = cross_entropy(logits, batch.labels)
        self.log_dict({f"{stage}/loss": loss, f"{stage}/acc": accuracy}, batch_size=len(logits))

"""Multinomial logistic regression: section 6.2 of the draft of the paper on the Fanions."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_fanions import FanionConfig
from lit_fanions.checks import real_number, whole_number
from models.convex import ConvexProblem
from models.data import ClassificationBatch, HasFeatures, attached_data
from models.modules import save_plain_hyperparameters


class LogisticRegression(ConvexProblem):
    """Mean cross entropy of softmax(W x), plus l2 / 2 times the squared Frobenius norm of W.

    W is classes x features and starts at 0; biases are the column of a constant feature.
    ``ConvexProblem`` describes what training logs; val and test log {val,test}/loss, without the
    penalty, and {val,test}/acc.

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        classes: Number of classes.
        features: Number of features.
        l2: Weight of the penalty; with 0, classes that can be separated have no best W.
        points_per_decade: Number of logged steps from each power of ten to the next.
    """

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        classes: int = 10,
        features: int = 2145,
        l2: float = 1e-3,
        points_per_decade: int = 20,
    ) -> None:
        whole_number("classes", classes)
        whole_number("features", features)
        super().__init__(optimizer, 1, classes, features, points_per_decade)
        self.l2 = real_number("l2", l2, 0)
        save_plain_hyperparameters(self, {"optimizer": self.fanion_config.to_dict()})

    def setup(self, stage: str) -> None:
        """Check that the data has as many features as the model.

        Raises:
            ValueError: If it has another number.
        """
        data = attached_data(self)
        if isinstance(data, HasFeatures) and data.features != self.shape[2]:
            raise ValueError(
                f"the data has {data.features} features and the model {self.shape[2]}: set "
                f"features to {data.features}"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of examples: (n, features) -> (n, classes)."""
        return features @ self.weight.mT

    def losses(self, batch: ClassificationBatch) -> Tensor:
        """Return the loss, (1,)."""
        penalty = self.l2 / 2 * self.weight.square().sum()
        return (cross_entropy(self(batch.features), batch.labels) + penalty).view(1)

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", batch)

    def predict_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """Return class probabilities, float64 (n, classes), in the order of the examples.

        ``predict`` saves a list of these to predictions.pt, one entry per batch; with
        ``DigitFeaturesDataModule``, one entry for all test examples.
        """
        return self(batch.features).softmax(-1)

    def _evaluate(self, stage: str, batch: ClassificationBatch) -> None:
        logits = self(batch.features)
        accuracy = (logits.argmax(-1) == batch.labels).double().mean()
        loss = cross_entropy(logits, batch.labels)
        self.log_dict({f"{stage}/loss": loss, f"{stage}/acc": accuracy}, batch_size=len(logits))

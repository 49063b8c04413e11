"""Randomised linear least squares: section 5.1 of the paper on the Fanions."""

from torch import Tensor

from datamodules.least_squares import Problems
from lit_fanions import FanionConfig, bounds
from models.convex import ConvexProblem, own_norm


class LeastSquares(ConvexProblem):
    """F(X) = 1/2 <X - S, M (X - S) N> of several random problems at once (equation 19).

    Logged is also, at the start, problemI/smoothness: the Lipschitz constant of the gradient in the
    norm of the algorithm (``bounds.smoothness``). The rest is described at ``ConvexProblem``.

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        problems: How many; as many as the data has.
        rows: Of the unknown matrices.
        cols: Of the unknown matrices.
        points_per_decade: Steps that are logged from each power of ten to the next.
    """

    apart = True

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        problems: int = 10,
        rows: int = 50,
        cols: int = 50,
        points_per_decade: int = 20,
    ) -> None:
        super().__init__(optimizer, problems, rows, cols, points_per_decade)
        # Checkpoints must hold plain data: a dataclass would not load with weights_only.
        self.save_hyperparameters(ignore="optimizer")
        self.save_hyperparameters({"optimizer": self.fanion_config.to_dict()})

    def setup(self, stage: str) -> None:
        """Check that the data has problems of this size.

        Raises:
            ValueError: If it has others.
        """
        given = getattr(getattr(self.trainer, "datamodule", None), "shape", self.shape)
        if given != self.shape:
            raise ValueError(
                f"the data has (problems, rows, cols) = {given} and the model {self.shape}: give "
                "both the same"
            )

    def losses(self, batch: Problems) -> Tensor:
        """F of each problem: (problems,)."""
        difference = self.weight - batch.target
        return (difference * (batch.left @ difference @ batch.right)).sum((-2, -1)) / 2

    def training_step(self, batch: Problems, batch_idx: int) -> Tensor:
        """Return the sum of the losses; at the start, log the smoothness."""
        if self.trainer.global_step == 0:
            norm = own_norm(self._group, *self.shape[1:])
            values = bounds.smoothness(norm, batch.left, batch.right).tolist()
            self.write({f"problem{i}/smoothness": value for i, value in enumerate(values)})
        return super().training_step(batch, batch_idx)

"""Randomised linear least squares: section 5.1 of the paper on the Fanions."""

from torch import Tensor

from lit_fanions import FanionConfig, bounds, oracle
from models.convex import ConvexProblem
from models.data import HasProblems, LeastSquaresBatch, attached_data
from models.modules import save_plain_hyperparameters


class LeastSquares(ConvexProblem):
    """F(X) = 1/2 <X - S, M (X - S) N> of several random problems at once (equation 19).

    Beside what ``ConvexProblem`` logs, problemI/smoothness is logged at the start: the Lipschitz
    constant of the gradient in the norm of the algorithm (``bounds.smoothness``).

    Args:
        optimizer: Algorithm and step size, in the group ``matrix``.
        problems: Number of problems, the same as in the data.
        rows: Number of rows of the unknown matrices.
        cols: Number of columns of the unknown matrices.
        points_per_decade: Number of logged steps from each power of ten to the next.
    """

    logs_each_problem = True

    def __init__(
        self,
        optimizer: FanionConfig = FanionConfig(),
        problems: int = 10,
        rows: int = 50,
        cols: int = 50,
        points_per_decade: int = 20,
    ) -> None:
        super().__init__(optimizer, problems, rows, cols, points_per_decade)
        save_plain_hyperparameters(self, {"optimizer": self.fanion_config.to_dict()})

    def setup(self, stage: str) -> None:
        """Check that the data has problems of this size.

        Raises:
            ValueError: If it has problems of another size.
        """
        data = attached_data(self)
        if isinstance(data, HasProblems) and data.shape != self.shape:
            raise ValueError(
                f"the data has (problems, rows, cols) = {data.shape} and the model {self.shape}: "
                "give both the same"
            )

    def losses(self, batch: LeastSquaresBatch) -> Tensor:
        """Return F of each problem: (problems,)."""
        difference = self.weight - batch.target
        return (difference * (batch.left @ difference @ batch.right)).sum((-2, -1)) / 2

    def training_step(self, batch: LeastSquaresBatch, batch_idx: int) -> Tensor:
        """Return the sum of the losses; at the start, log the smoothness."""
        if self.trainer.global_step == 0:
            norm = oracle(self._group, *self.shape[1:]).norm()
            values = bounds.smoothness(norm, batch.left, batch.right).tolist()
            self.log_now({f"problem{i}/smoothness": value for i, value in enumerate(values)})
        return super().training_step(batch, batch_idx)

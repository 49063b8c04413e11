"""Sharpness-aware minimisation for any Lightning module under automatic optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from lit_fanions.callbacks.extra_pass import RecordedBatch
from lit_fanions.callbacks.lightning_interface import Callback, MisconfigurationException
from lit_fanions.optim.algorithms import Rank
from lit_fanions.optim.sharpness import SharpnessAscent

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SharpnessAware(Callback):
    """Step with the gradient at W + rho * D(G) instead of G, the gradient at W (SAM, nu-SAM).

    ``optim.sharpness.SharpnessAscent`` has the method and the meaning of the arguments. After the
    backward pass of a batch the matrices are moved uphill, ``training_step`` and its backward pass
    run again on the same batch with the same random numbers, and the matrices are restored: a step
    takes twice the time. Clipping, schedules and monitors see the second gradient. Logged values
    and the running statistics of batch norms are those of the first pass; metric objects that
    ``training_step`` updates count each batch twice. Works with any optimizer, float32 and
    bfloat16, DDP and FSDP2, and leaves nothing behind that a checkpoint would need.

    Args:
        rho: Radius of the step uphill, in the norm of the ball; at least 0.
        algorithm: Name of the ball, as for ``Fanion``; ``neon`` is nu-SAM, ``nsgd`` SAM.
        rank: Rank of the algorithms that have one; None is the algorithm's own.
        exact: Restore the matrices to the bit from a copy; False keeps the perturbation only.

    Raises:
        MisconfigurationException: With manual optimization, accumulated gradients or a gradient
            scaler, where the second pass would not repeat the first.
        ValueError: If an argument is not one of these.
    """

    def __init__(
        self,
        rho: float = 0.05,
        algorithm: str = "neon",
        rank: Rank | None = None,
        exact: bool = True,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "rho": rho, "algorithm": algorithm, "rank": rank, "exact": exact
        }  # fmt: skip
        SharpnessAscent(nn.Module(), **self._arguments)  # checks them
        self._ascent: SharpnessAscent | None = None
        self._batch: RecordedBatch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training whose step this callback cannot repeat."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "SharpnessAware needs automatic optimization: in a manual training_step open a "
                "lit_fanions.SharpnessAscent around the second backward pass"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "SharpnessAware does not work with a gradient scaler (precision 16-mixed): use "
                "bf16-mixed or 32-true"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices, of which some may be frozen in one epoch and not in the next."""
        self._ascent = SharpnessAscent(pl_module, **self._arguments)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch and the states of the random generators."""
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "SharpnessAware does not work with accumulate_grad_batches = "
                f"{trainer.accumulate_grad_batches}: the second pass repeats one batch; set it to 1"
            )
        self._batch = RecordedBatch.now(pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Replace the gradient by that at the perturbed matrices."""
        assert self._ascent is not None and self._batch is not None
        if all(p.grad is None for p in pl_module.parameters()):  # training_step returned None
            return
        with self._ascent:
            optimizer.zero_grad()
            with self._batch.replay(trainer, pl_module) as loss:
                if loss is not None:
                    trainer.strategy.backward(loss, optimizer)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Release the batch."""
        self._batch = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the batch and the parameters."""
        self._batch = self._ascent = None

"""A project with a LightningCLI of its own: `config.yaml` chooses the optimizer, not the code.

cd examples/lightning_cli
python module.py fit --config config.yaml                           # Fanion, from the YAML
python module.py fit --config config.yaml --trainer.callbacks null  # AdamW, from the module
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    """Two linear layers that know nothing of Fanion.

    Args:
        width: Hidden units.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 4)
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch."""
        x, labels = batch
        loss = torch.nn.functional.cross_entropy(self.network(x), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that the callback in `config.yaml` replaces."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Random(L.LightningDataModule):
    """Random vectors of four quarters; the class is the quarter with the largest sum.

    Args:
        size: Number of vectors.
    """

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        x = torch.randn(size, 16, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(x, x.view(size, 4, 4).sum(-1).argmax(-1))

    def train_dataloader(self) -> DataLoader:
        """Return batches of 64."""
        return DataLoader(self.data, batch_size=64)


if __name__ == "__main__":
    trainer = LightningCLI(Classifier, Random).trainer
    print(f"{type(trainer.optimizers[0]).__name__}: loss {trainer.callback_metrics['loss']:.3f}")

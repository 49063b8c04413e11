"""Plain Lightning: a ResNet of torchvision on random images, one line for the optimizer.

python examples/lightning_resnet.py
"""

import lightning as L
import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

from lit_fanions import configure_optimizers


class Classifier(L.LightningModule):
    """A ResNet-18 with four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=4)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """Return the optimizer: F-Muon for filters and matrices, AdamW for the rest."""
        return configure_optimizers(self, algorithm="muon", lr=0.02)


def main(steps: int = 3) -> float:
    """Train on one batch, shown again and again, and return the last loss."""
    L.seed_everything(0)
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(4, (16,)))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=steps, logger=False, enable_checkpointing=False
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=16))
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    print(f"training loss: {main():.3f}")

"""Lightning Fabric: the optimizer is set up like any other.

python examples/fabric.py
"""

import torch
from lightning.fabric import Fabric

from lit_fanions import configure_optimizers


def main(steps: int = 50) -> float:
    """Fit a small network to random labels and return the last loss."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    made = configure_optimizers(
        network,
        total_steps=steps,
        algorithm="muon",
        lr=0.05,
        other={"lr": 1e-2},
        schedule={"shape": "linear"},
    )
    network, optimizer = fabric.setup(network, made["optimizer"])
    schedule = made["lr_scheduler"]["scheduler"]
    inputs, labels = torch.randn(64, 16), torch.randint(4, (64,))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        fabric.backward(loss)
        optimizer.step()
        schedule.step()
    return loss.item()


if __name__ == "__main__":
    print(f"training loss: {main():.3f}")

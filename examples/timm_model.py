"""A model of timm in a plain loop, with the reason for each parameter.

python examples/timm_model.py
"""

import timm
import torch

from lit_fanions import configure_optimizers, split_parameters


def main(steps: int = 3) -> float:
    """Train a small vision transformer on random images and return the last loss."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    print(split_parameters(network))
    optimizer = configure_optimizers(network, lr=0.02, other={"lr": 1e-3})["optimizer"]
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"training loss: {main():.3f}")

"""A plain training loop, typed: mypy and pyright check it against this package.

python examples/typed.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_fanions import Fanion, FanionConfig, GroupOptions, lmo, norms, split_parameters
from lit_fanions.callbacks import SpectralMonitor


def make_optimizer(network: nn.Module) -> Fanion:
    """Return F-Muon for the matrices and AdamW for the rest."""
    config = FanionConfig(
        matrix=GroupOptions(algorithm="f_muon", lr=0.02, alpha=0.5),
        other=GroupOptions(algorithm="adamw", lr=3e-3),
    )
    split = split_parameters(network, config)
    names: list[str] = [assignment.name for assignment in split if assignment.group == "matrix"]
    assert names == ["0.weight"], split
    matrices = [p for name, p in network.named_parameters() if name in names]
    others = [p for name, p in network.named_parameters() if name not in names]
    return Fanion(
        [
            {"params": matrices, "algorithm": "f_muon", "lr": 0.02},
            {"params": others, "algorithm": "adamw", "lr": 3e-3},
        ]
    )


def duality_gap(m: Tensor) -> float:
    """Return how far a direction stays behind the dual norm of a momentum, relative to it."""
    ball: norms.Norm = norms.Blend(norms.Spectral(), 0.5)
    d: Tensor = lmo.direction(m, alpha=0.5)
    dual: Tensor = ball.dual(m)
    return 1 - float((m * d).sum() / dual)


def main(steps: int = 20) -> float:
    """Fit a line to noise and return the last loss."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = make_optimizer(network)
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    loss = torch.tensor(torch.inf)
    for _ in range(steps):
        loss = nn.functional.mse_loss(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def make_monitor() -> SpectralMonitor:
    """Return a callback for a Lightning Trainer."""
    return SpectralMonitor(every_n_steps=10)


if __name__ == "__main__":
    print(f"loss {main():.3f}, duality gap {duality_gap(torch.randn(64, 32)):.4f}")

"""A network with every kind of matrix, data for it, and runs of a few steps."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_fanions import configure_optimizers

BATCHES = 6


class Net(LightningModule):
    """Embedding, convolution, attention (q, k, v apart), experts, linear layer, head.

    Args:
        config: Configuration of the optimizer.
        torch_optimizer: True for torch's SGD with lr .05 and momentum.
        dropout: Probability; with it a callback that draws random numbers changes the run.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        torch_optimizer: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.config, self.torch_optimizer = config or {}, torch_optimizer
        torch.manual_seed(3)
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 12, 3)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 12, 10) / 4)
        self.down = nn.Linear(10, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.embed(x).mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down((x.unsqueeze(1) @ self.experts).relu().sum(1))
        return self.head(self.dropout(x.mean(1)))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.torch_optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return configure_optimizers(self, self.config)


MATRICES = [
    "attention.in_proj_weight[0]", "attention.in_proj_weight[1]", "attention.in_proj_weight[2]",
    "attention.out_proj.weight", "conv.weight", "down.weight",
    "experts[0]", "experts[1]", "experts[2]",
]  # fmt: skip


def loader(batches: int = BATCHES, batch_size: int = 4) -> DataLoader:
    x = torch.randint(0, 9, (batches * batch_size, 5), generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(x, (x.sum(-1) % 3).long()), batch_size=batch_size)


def trainer(path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": path, "accelerator": "cpu", "max_epochs": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [*callbacks],
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**{**settings, **options})


def fit(
    path: Path,
    net: LightningModule,
    *callbacks: Callback,
    validate: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    seed_everything(0, verbose=False)
    made = trainer(path, *callbacks, **options)
    made.fit(net, loader(), loader(2) if validate else None, ckpt_path=ckpt_path)
    return made


def everything(run: Trainer) -> dict[str, Tensor]:
    """Return weights and optimizer state by name."""
    names = {p: name for name, p in run.lightning_module.named_parameters()}
    tensors = dict(run.lightning_module.state_dict())
    for p, state in run.optimizers[0].state.items():
        tensors |= {f"{names[p]}: {key}": value for key, value in state.items()}
    return {key: torch.as_tensor(value).detach().clone() for key, value in tensors.items()}


def assert_bit_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []

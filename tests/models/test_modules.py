"""What the models ask of Lightning: their trainer, and plain data as hyperparameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_fanions import FanionConfig
from models import Airbench, GPTConfig, LeastSquares, LogisticRegression, NanoGPT
from models.modules import attached_trainer

CONFIG = FanionConfig.from_dict({"matrix": {"lr": 0.3}})
SMALL = {"vocab_size": 17, "layers": 1, "width": 8, "heads": 2, "mlp_width": 8}
MODELS: list[tuple[type[LightningModule], dict[str, Any]]] = [
    (Airbench, {"widths": (8, 8, 8)}),
    (NanoGPT, {"network": GPTConfig(**SMALL), "init_from": "elsewhere.ckpt"}),
    (LeastSquares, {"rows": 3}),
    (LogisticRegression, {"features": 5}),
]


@pytest.mark.parametrize(("kind", "options"), MODELS)
def test_checkpoint_holds_plain_hyperparameters(kind, options, tmp_path: Path) -> None:
    model = kind(optimizer=CONFIG, **options)
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["optimizer"] == CONFIG.to_dict()
    assert "init_from" not in saved
    if kind is NanoGPT:
        assert saved["network"] == vars(GPTConfig(**SMALL))
    loaded = kind.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    assert loaded.fanion_config == CONFIG and loaded.hparams == model.hparams


def test_attached_trainer_is_the_modules_trainer() -> None:
    module = LightningModule()
    assert attached_trainer(module) is None
    trainer = Trainer(accelerator="cpu", logger=False)
    module.trainer = trainer
    assert attached_trainer(module) is trainer

"""Small NanoGPTs, their data and their Trainers."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules import FineWebDataModule
from models import GPTConfig, NanoGPT

BOS = 256


NETWORK: dict[str, Any] = {
    "vocab_size": 257, "context_length": 64, "layers": 2, "width": 16, "heads": 2,
    "mlp_width": 32, "bos": BOS,
}  # fmt: skip


SPEEDRUN = {
    **dataclasses.asdict(GPTConfig.speedrun()), **NETWORK,
    "layers_without_attention": (), "long_window_layers": (1,), "value_embeddings": 1,
    "embedding_dtype": "float32", "context_length": 400, "window": 300,
}  # fmt: skip


SGD = {"algorithm": "sgd", "lr": 1e-4}  # not AdamW, which blows up the rounding in zeros


OPTIMIZER = {
    "matrix": {"lr": 0.02},
    "other": {"lr": 0.01},
    "schedule": {"shape": "linear", "cooldown": 0.7},
}


def data(folder: Path, **options: Any) -> FineWebDataModule:
    settings = {
        "batch_tokens": 256, "sequence_length": 32, "micro_batch_size": 8, "shuffle": True,
        "val_tokens": 640, "tokenizer": "bytes", "shards": 1,
    }  # fmt: skip
    return FineWebDataModule(str(folder), **{**settings, **options})


def model(**options: Any) -> NanoGPT:
    seed_everything(0, verbose=False)
    return NanoGPT(**{"optimizer": OPTIMIZER, "network": NETWORK, **options})


def trainer(folder: Path, steps: int = 6, **options: Any) -> Trainer:
    settings = {
        "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "enable_checkpointing": False, "default_root_dir": folder, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**{**settings, **options})


class Losses(Callback):
    """Records train/loss after each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.values.append(float(trainer.callback_metrics["train/loss"]))


def weights(module: NanoGPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def recipe(folder: Path, name: str, shards: Path, steps: int, **network: Any) -> list[str]:
    """Write a recipe into the folder; return the arguments of fit."""
    content = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": steps, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": name, "version": ""},
            },
            "callbacks": {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "every_n_train_steps": 5, "save_last": True, "save_top_k": 0,
                    "dirpath": str(folder / name),
                },
            },
        },
        "model": {
            "class_path": "models.NanoGPT",
            "init_args": {"optimizer": OPTIMIZER, "network": {**NETWORK, **network}},
        },
        "data": {
            "class_path": "datamodules.FineWebDataModule",
            "init_args": {
                "data_dir": str(shards), "batch_tokens": 2048, "sequence_length": 32,
                "micro_batch_size": 16, "shuffle": True, "val_tokens": 320,
                "val_every_n_steps": 20, "tokenizer": "bytes", "shards": 1,
            },
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]

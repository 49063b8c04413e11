"""The trainings whose checkpoints lie in this folder, and the script that made them.

The files were made by the code before the redesign of 2026, commit c4f2888, in its checkout, with
this file on the path:

    PYTHONPATH=. python .../tests/checkpoints/trainings.py .../tests/checkpoints

Later versions must load them and go on to the same weights, which each file holds beside the
checkpoint. Never make the files anew by the code that is tested; a version that changes what a
checkpoint holds adds files of its own.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_fanions import Fanion

SAVED, LAST = 5, 8  # optimizer steps at the checkpoint and at the end
GROUPS: list[dict[str, Any]] = [
    {"algorithm": "muon", "lr": 0.02, "weight_decay": 0.1},
    {"algorithm": "neon", "lr": 0.05, "solver": "subspace"},
    {"algorithm": "fanion", "lr": 0.03, "rank": 2, "solver": "subspace", "oversampling": 1},
    {"algorithm": "dion", "lr": 0.02, "rank": 3},
    {"algorithm": "f_muon", "lr": 0.02, "alpha": 0.7, "polar": "jordan", "polar_steps": 3},
    {"algorithm": "kyfan", "lr": 0.05, "rank": 2, "solver": "subspace"},
    {"algorithm": "adamw", "lr": 0.003, "momentum": 0.8, "beta2": 0.95},
    {"algorithm": "sgd", "lr": 0.1, "momentum": 0.85, "nesterov": True},
    {"algorithm": "signum", "lr": 0.001},
]
SHAPE = (10, 8)
# Each kind of state dict: the parameters' dtype, whether they have names, options of all matrices.
KINDS: dict[str, tuple[torch.dtype, bool, dict[str, Any]]] = {
    "named": (torch.float32, True, {}),
    "unnamed": (torch.float32, False, {}),
    "bfloat16": (torch.bfloat16, True, {"momentum_dtype": "float32"}),
}


def optimizer(kind: str) -> tuple[Fanion, list[nn.Parameter]]:
    """Return a Fanion with a group of one parameter for each of GROUPS.

    Args:
        kind: One of KINDS.

    Returns:
        The optimizer and its parameters, which are zero.
    """
    dtype, named, options = KINDS[kind]
    parameters = [nn.Parameter(torch.zeros(SHAPE, dtype=dtype)) for _ in GROUPS]
    groups = []
    for i, (p, group) in enumerate(zip(parameters, GROUPS, strict=True)):
        own = {} if group["algorithm"] in ("adamw", "sgd") else options
        params = [(f"block.{i}.weight", p)] if named else [p]
        groups.append({"name": f"group{i}", "params": params, **group, **own})
    return Fanion(groups), parameters


def step(fanion: Fanion, parameters: list[nn.Parameter], gradients: Tensor) -> Tensor:
    """Make a step for each of some stacked gradients, (steps, parameters, *SHAPE).

    Returns:
        The weights after the last step, (parameters, *SHAPE).
    """
    for gradient in gradients:
        for p, grad in zip(parameters, gradient, strict=True):
            p.grad = grad.clone()
        fanion.step()
    return torch.stack([p.detach().clone() for p in parameters])


def airbench() -> tuple[LightningModule, LightningDataModule]:
    """Return the smallest Airbench, whose epochs have eleven steps of digits."""
    import datamodules
    import models

    optimizer = {
        "matrix": {"algorithm": "f_muon", "lr": 0.1, "momentum": 0.6, "renormalize": True},
        "other": {"algorithm": "sgd", "lr": 0.02, "momentum": 0.85, "nesterov": True},
        "overrides": {"head": {"lr": 0.1, "schedule": {"shape": "linear", "steps": 0.75}}},
        "schedule": {"shape": "linear"},
    }
    model = models.Airbench(optimizer, widths=(3, 4, 4), whiten=0, test_tta=0)
    return model, datamodules.DigitsDataModule(batch_size=128)


def nanogpt(folder: Path) -> tuple[LightningModule, LightningDataModule]:
    """Return the smallest NanoGPT, whose steps have two micro-batches of made-up text.

    Args:
        folder: Where the text is written.
    """
    import datamodules
    import models

    for split, count in (("train", 2000), ("val", 200)):
        places = np.arange(count)
        tokens = (97 + places * places // 7 % 26).astype("<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count  # magic number, version, tokens
        shard = folder / f"text_{split}_000000.bin"
        shard.write_bytes(header.tobytes() + tokens.tobytes())
    optimizer = {
        "matrix": {"algorithm": "fanion", "rank": 2, "lr": 0.02, "solver": "subspace"},
        "other": {"algorithm": "adamw", "lr": 0.003, "beta2": 0.95},
        "schedule": {"shape": "linear", "cooldown": 0.7},
    }
    network = {
        **{"vocab_size": 257, "context_length": 16, "layers": 1, "width": 8, "heads": 1},
        **{"mlp_width": 16, "merged_qkv": True, "bos": 256},
    }
    data = datamodules.FineWebDataModule(
        str(folder),
        shards=1,
        tokenizer="bytes",
        batch_tokens=128,
        sequence_length=16,
        micro_batch_size=4,
        shuffle=True,
    )
    return models.NanoGPT(optimizer, network=network), data


def trainer(folder: Path, *callbacks: ModelCheckpoint) -> Trainer:
    """Return a Trainer of LAST steps on the CPU, which logs nothing and never validates."""
    return Trainer(
        accelerator="cpu",
        max_steps=LAST,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def weights(module: nn.Module) -> Tensor:
    """Return all parameters of a module in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _save_optimizers(folder: Path) -> None:
    for kind, (dtype, *_) in KINDS.items():
        generator = torch.Generator().manual_seed(0)
        shape = LAST, len(GROUPS), *SHAPE
        gradients = torch.randn(shape, generator=generator).to(dtype)
        gradients[2, :, 0, 0] = torch.nan  # a step that is skipped
        fanion, parameters = optimizer(kind)
        for p in parameters:
            p.data.normal_(std=0.1, generator=generator)
        before = step(fanion, parameters, gradients[:SAVED])
        saved = {
            "state_dict": fanion.state_dict(),
            "weights": before,
            "gradients": gradients[SAVED:],
        }
        # The state dict refers to the state, which goes on.
        file = folder / f"optimizer_{kind}.pt"
        torch.save(saved, file)
        after = step(fanion, parameters, gradients[SAVED:])
        torch.save({**torch.load(file), "after": after}, file)


def _save_lightning(file: Path, module: LightningModule, data: LightningDataModule) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        keep = ModelCheckpoint(
            temporary, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1
        )
        trainer(Path(temporary), keep).fit(module, data)
        checkpoint = torch.load(Path(temporary, f"step={SAVED}.ckpt"))
    del checkpoint["callbacks"]  # of the callback above, with this machine's folders
    torch.save({**checkpoint, "weights_after": weights(module)}, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    _save_optimizers(target)
    seed_everything(0)
    _save_lightning(target / "airbench.ckpt", *airbench())
    with tempfile.TemporaryDirectory() as text:
        seed_everything(0)
        _save_lightning(target / "nanogpt.ckpt", *nanogpt(Path(text)))

"""Private interfaces of Lightning that the data modules use: this version has them."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from datamodules.lightning_internals import (
    batches_trained,
    replace_progress,
    rescale_batches_trained,
    saved_progress,
)


def test_counts_of_batches_are_in_trainer_and_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=3, accumulate_grad_batches=2, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    assert batches_trained(trainer) == 0
    trainer.fit(BoringModel())
    assert batches_trained(trainer) == 6
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    progress = saved_progress(checkpoint)
    counts = {"ready": 6, "started": 6, "processed": 6, "completed": 6}
    assert progress["current"] == progress["total"] == counts
    assert {"current", "total", "is_last_batch"} == progress.keys()
    state = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
    assert state["_batches_that_stepped"] == 3
    replace_progress(checkpoint, {"new": 1}, undone=1)
    assert saved_progress(checkpoint) == {"new": 1} and state["_batches_that_stepped"] == 2
    rescale_batches_trained(trainer, 2, 5)
    assert batches_trained(trainer) == 15

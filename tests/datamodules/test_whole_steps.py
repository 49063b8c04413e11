"""Resume and repeated fits with any number of micro-batches per step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loops.progress import _BatchProgress

from datamodules.whole_steps import at_whole_step
from tests.datamodules.token_runs import (
    FakeTrainer,
    Recorder,
    SaveAfter,
    Tiny,
    assert_continues,
    fit,
)

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def test_contradicting_trainer_settings_are_refused(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    data = Tiny(text[0])
    data.trainer = FakeTrainer(0, 1, accumulate_grad_batches=3)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=3: leave it out, .* make it 2"):
        data.setup("fit")
    for given in (1, 2):
        data.trainer = FakeTrainer(0, 1, accumulate_grad_batches=given)
        data.setup("fit")
        data.setup("fit")
        assert data.trainer.accumulate_grad_batches == 2 and len(data.trainer.callbacks) == 1
    for name, setting in (
        ("val_check_interval", 0.5),
        ("val_check_interval", 7),
        ("val_check_interval", None),
        ("check_val_every_n_epoch", 2),
    ):
        data = Tiny(text[0], val_every_n_steps=3)
        data.trainer = FakeTrainer(0, 1)
        setattr(data.trainer, name, setting)
        with pytest.raises(ValueError, match="val_every_n_steps=3 and the trainer's"):
            data.setup("fit")


def test_next_fit_starts_from_the_users_settings(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    trainer = FakeTrainer(0, 1)
    batches = _BatchProgress()
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches))

    def apply(**options: Any) -> tuple[Any, ...]:
        data = Tiny(text[0], **options)
        data.trainer = trainer
        data.setup("fit")
        return (
            trainer.accumulate_grad_batches,
            trainer.val_check_interval,
            trainer.check_val_every_n_epoch,
        )

    assert apply(micro_batch_size=4, val_every_n_steps=3) == (2, 6, None)
    assert apply(micro_batch_size=2, val_every_n_steps=4) == (3, 12, None)
    assert apply(micro_batch_size=1) == (6, 1.0, 1)
    trainer.accumulate_grad_batches = 5
    with pytest.raises(ValueError, match="accumulate_grad_batches=5: leave it out"):
        apply(micro_batch_size=2)
    trainer.accumulate_grad_batches = 6
    trainer.val_check_interval = 0.5
    assert apply(micro_batch_size=6) == (1, 0.5, 1)
    with pytest.raises(ValueError, match="both say when to validate"):
        apply(val_every_n_steps=3)


def progress(
    current: int, total: int, completed: int = 0, ready: int = 0, is_last: bool = False
) -> dict[str, Any]:
    """Return Lightning's counts after ``total`` batches; completed and ready are offsets."""
    return {
        name: {
            "ready": n + ready,
            "started": n + ready,
            "processed": n,
            "completed": n + completed,
        }
        for name, n in (("current", current), ("total", total))
    } | {"is_last_batch": is_last}


@pytest.mark.parametrize(
    ("saved", "old", "new", "expected", "taken_back"),
    [
        # whole steps stay unchanged
        (progress(4, 14), 2, 2, progress(4, 14), False),
        (progress(4, 14, -1), 2, 2, progress(4, 14, -1), False),
        (progress(10, 20, 0, 0, True), 2, 2, progress(10, 20, 0, 0, True), False),
        (progress(0, 10), 1, 1, progress(0, 10), False),
        # epochs of 5 batches (limit_train_batches), 2 per step
        (progress(5, 15, 0, 0, True), 2, 2, progress(5, 15, 0, 0, True), False),
        (progress(2, 17), 2, 2, progress(2, 17), False),
        (progress(3, 18), 2, 2, progress(2, 17, -1), True),
        # another number of batches per step
        (progress(4, 14), 2, 3, progress(6, 21), False),
        (progress(4, 14, -1), 2, 1, progress(2, 7, -1), False),
        (progress(10, 20, -1, 0, True), 2, 6, progress(30, 60, -1, 0, True), False),
        # within a step: as if saved at the end of the step before
        (progress(5, 15), 2, 2, progress(4, 14, -1), True),
        (progress(5, 15, -1), 2, 3, progress(6, 21, -1), True),
        (progress(5, 15, 0, 1), 3, 2, progress(2, 8, -1), True),
        (progress(1, 11, -1), 2, 2, progress(0, 10, -1), True),
        # within the first batch of a step
        (progress(4, 14, 0, 1), 2, 2, progress(4, 14, -1), True),
        (progress(4, 14, 0, 1), 1, 1, progress(4, 14, -1), True),
        (progress(9, 19, 0, 1, True), 2, 2, progress(8, 18, -1), True),
    ],
)
def test_progress_is_rewritten_to_whole_steps(
    saved: dict[str, Any], old: int, new: int, expected: dict[str, Any], taken_back: bool
) -> None:
    assert at_whole_step(saved, old, new) == (expected, taken_back)


def test_next_fits_of_a_trainer_continue_with_other_micro_batches(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    """Fits of one Trainer with 2, 3 and 1 batches per step take the steps of a single fit."""
    folder = text[0]
    full = fit(folder, max_steps=12)
    model = Recorder()
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=5, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    for steps, micro in ((5, 3), (7, 2), (12, 6)):
        trainer.fit_loop.epoch_loop.max_steps = steps
        options = {"micro_batch_size": micro, "shuffle": True, "val_every_n_steps": 4}
        trainer.fit(model, datamodule=Tiny(folder, **options))
    assert dict(model.steps) == {step: model.steps[step] for step in range(12)}
    assert {step: sorted(seen) for step, seen in model.steps.items()} == full.steps
    assert model.validations == full.validations


@pytest.mark.parametrize(("micro", "workers"), [(2, 0), (2, 2), (1, 0), (6, 0)])
def test_resume_anywhere_equals_the_uninterrupted_fit(
    text: tuple[Path, np.ndarray, np.ndarray], micro: int, workers: int
) -> None:
    """Saved with 3 batches per step (15 per epoch), resumed with 3, 6 and 1."""
    folder = text[0]
    at_validation = ModelCheckpoint(folder, "val-{step}", every_n_train_steps=0, every_n_epochs=1)
    at_validation.save_top_k = -1
    full = fit(folder, SaveAfter(folder), at_validation, options={"micro_batch_size": 2})
    options = {"micro_batch_size": micro, "num_workers": workers}
    points = [(f"batch{done}", done // 3) for done in (1, 3, 5, 12, 13, 15, 16, 24, 29, 30)]
    for name, done in [*points, ("val-step=4", 4), ("val-step=8", 8)]:
        if workers and done not in (1, 4, 9):
            continue  # they take a moment to start
        resumed = fit(folder, ckpt_path=folder / f"{name}.ckpt", options=options)
        assert_continues(resumed, full, done)


@pytest.mark.parametrize("fail_at", [0, 1, 12, 14, 15, 20])
@pytest.mark.parametrize("micro", [2, 3])
def test_resume_repeats_a_failed_step(
    text: tuple[Path, np.ndarray, np.ndarray], fail_at: int, micro: int
) -> None:
    folder = text[0]
    full = fit(folder)
    fit(
        folder, OnExceptionCheckpoint(folder, "failed"), fail_at=fail_at,
        options={"micro_batch_size": 2},
    )  # fmt: skip
    path = folder / "failed.ckpt"
    resumed = fit(folder, ckpt_path=path, options={"micro_batch_size": micro})
    assert_continues(resumed, full, fail_at // 3)


def test_resume_with_a_model_that_asks_for_the_number_of_steps(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder = text[0]
    epochs = {"max_steps": -1, "max_epochs": 3, "ask_for_steps": True}
    full = fit(folder, SaveAfter(folder), **epochs)
    for done, micro in ((8, 4), (13, 1), (20, 6), (21, 2)):
        path = folder / f"batch{done}.ckpt"
        resumed = fit(folder, ckpt_path=path, options={"micro_batch_size": micro}, **epochs)
        assert_continues(resumed, full, done // 2)


def test_resume_with_limited_epochs(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """7 of 15 batches are two whole steps and one with a third of its batch."""
    folder = text[0]
    options = {"micro_batch_size": 2, "val_every_n_steps": None}
    full = fit(folder, SaveAfter(folder), options=options, limit_train_batches=7)
    for done, step in ((3, 1), (6, 2), (7, 3), (9, 3), (10, 4), (14, 6)):
        path = folder / f"batch{done}.ckpt"
        resumed = fit(folder, ckpt_path=path, options=options, limit_train_batches=7)
        assert_continues(resumed, full, step)


def test_finished_fit_can_be_prolonged(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder = text[0]
    full = fit(folder, max_steps=12)
    for steps in (5, 7):
        last = ModelCheckpoint(folder, f"{steps}", save_last=False, every_n_train_steps=steps)
        fit(folder, last, max_steps=steps)
        resumed = fit(folder, ckpt_path=folder / f"{steps}.ckpt", options={"micro_batch_size": 1})
        assert_continues(resumed, full, steps)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("batch", [8, 10, 13])
def test_resume_with_another_number_of_processes(
    text: tuple[Path, np.ndarray, np.ndarray],
    one_thread: None,
    first: int,
    then: int,
    batch: int,
) -> None:
    """One process takes 4 batches per step, two processes take 2.

    So batch 8 ends a step in both cases, batch 10 only with two processes, batch 13 never.
    """
    folder = text[0]
    options = {"batch_tokens": 56, "micro_batch_size": 2, "val_tokens": 33}
    full = fit(folder, options=options, max_steps=9)
    saved = fit(
        folder, SaveAfter(folder), world_size=first, options=options, max_steps=7, max_epochs=-1
    )
    path = folder / f"batch{batch}.ckpt"
    resumed = fit(folder, ckpt_path=path, world_size=then, options=options, max_steps=9)
    assert saved.steps == {step: seen for step, seen in full.steps.items() if step < 7}
    assert [count for _, count in resumed.validations] == [33] * len(resumed.validations)
    assert_continues(resumed, full, batch // (4 // first))

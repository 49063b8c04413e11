"""Image batches on the device: ranks, evaluation and exact resume."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from datamodules import augmentation as aug
from tests.datamodules.image_runs import (
    BY_STEPS,
    COUNT,
    TEST_COUNT,
    Recorder,
    Tiny,
    assert_continues,
    assert_same_batches,
    fit,
    random_images,
    ready,
)

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


def test_epoch_shows_each_example_once_without_a_partial_batch() -> None:
    loader = ready().train_dataloader()
    assert len(loader) == 4
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert [tuple(pixels.shape) for pixels, _ in batches] == [(10, 3, 32, 32)] * 4
        labels = torch.cat([labels for _, labels in batches])
        assert len(labels.unique()) == 40
        orders.append(labels)
    assert not torch.equal(*orders)


def test_abandoned_iteration_leads_to_the_next_epoch() -> None:
    loader, other = ready().train_dataloader(), ready().train_dataloader()
    next(iter(loader))
    list(other)
    assert_same_batches(list(loader), list(other))


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_partition_each_global_batch(world_size: int) -> None:
    whole = list(ready().train_dataloader())
    shares = [list(ready(rank, world_size).train_dataloader()) for rank in range(world_size)]
    joined = [
        (torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*shares, strict=True)
    ]
    assert_same_batches(joined, whole)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_shows_every_example_once_over_all_ranks(world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        data = ready(rank, world_size)
        loaders = data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
        first = list(loaders[0])
        assert len(first) == len(loaders[0]) == 3  # the same on each rank: no rank waits
        for loader in loaders:
            assert_same_batches(list(loader), first)
        shares.append(torch.cat([labels for _, labels in first]))
        expected = aug.normalize(
            random_images(TEST_COUNT, seed=TEST_COUNT)[shares[-1]],
            torch.tensor(data.mean),
            torch.tensor(data.std),
        )
        assert torch.equal(torch.cat([pixels for pixels, _ in first]), expected)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(TEST_COUNT))


def test_one_process_evaluates_in_order() -> None:
    labels = torch.cat([labels for _, labels in ready().predict_dataloader()])
    assert torch.equal(labels, torch.arange(TEST_COUNT))


def test_batch_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 .* 3 ranks: choose a multiple of 3"):
        ready(0, 3).train_dataloader()
    with pytest.raises(ValueError, match="batch_size=46: choose at most 45"):
        ready(batch_size=46).train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ({"flip": "vertical"}, "flip 'vertical' is none of alternating, random, none"),
        ({"translate": -1}, "translate must be a whole number of at least 0, got -1"),
        ({"translate": 32}, "translate=32: choose 0 to 31 pixels"),
        ({"cutout": 33}, "cutout=33: choose 0 to 32 pixels"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"show_images": -1}, "show_images must be a whole number of at least 0, got -1"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiny(**options)


def test_loader_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\) first"):
        Tiny().train_dataloader()


def test_setup_reads_only_what_the_stage_needs() -> None:
    data = Tiny()
    data.setup("test")
    list(data.test_dataloader())
    with pytest.raises(RuntimeError, match="train images are not loaded"):
        data.training_images(1)


def test_training_images_are_the_first_ones_unaugmented() -> None:
    data = ready()
    expected = aug.normalize(
        random_images(COUNT, seed=COUNT), torch.tensor(data.mean), torch.tensor(data.std)
    )
    assert torch.equal(data.training_images(7), expected[:7])
    assert torch.equal(data.training_images(1000), expected)


def test_default_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    zero = list(ready(seed=0).train_dataloader())
    assert_same_batches(list(ready(seed=None).train_dataloader()), zero)
    seven = list(ready(seed=7).train_dataloader())
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert_same_batches(list(ready(seed=None).train_dataloader()), seven)
    assert_same_batches(list(ready(seed=0).train_dataloader()), zero)


@pytest.mark.parametrize("position", [0, 1, 3, 4])
def test_loader_continues_at_the_saved_position(position: int) -> None:
    uninterrupted = ready().train_dataloader()
    expected = [batch for _ in range(3) for batch in uninterrupted]
    loader = ready().train_dataloader()
    list(loader)
    iterator = iter(loader)
    for _ in range(position):
        next(iterator)
    state = copy.deepcopy(loader.state_dict())
    resumed = ready().train_dataloader()
    resumed.load_state_dict(state)
    rest = [batch for _ in range(1 if position == 4 else 2) for batch in resumed]
    assert_same_batches(rest, expected[4 + position :])


@pytest.mark.parametrize("ask_for_steps", [False, True])
@pytest.mark.parametrize("options", [{}, BY_STEPS], ids=["epochs", "steps"])
def test_resume_equals_the_uninterrupted_fit(
    tmp_path: Any, options: dict[str, int], ask_for_steps: bool
) -> None:
    # Checkpoints in the middle of an epoch, at its last batch (4, 8) and after its validation.
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    every_epoch = ModelCheckpoint(tmp_path, "end-{step}", save_top_k=-1)
    full = fit(tmp_path, every_step, every_epoch, ask_for_steps=ask_for_steps, **options)
    assert len(full.seen) == 12
    for name, done in (("step=1", 1), ("step=6", 6), ("step=8", 8), ("end-step=8", 8)):
        path = str(tmp_path / f"{name}.ckpt")
        resumed = fit(tmp_path, ckpt_path=path, ask_for_steps=ask_for_steps, **options)
        assert_continues(resumed, full, done)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_epochs": 2}, {}),
        ({"max_epochs": -1, "max_steps": 6}, BY_STEPS),
        ({"max_epochs": -1, "max_steps": 8}, BY_STEPS),
    ],
)
def test_finished_fit_can_be_prolonged(
    tmp_path: Any, first: dict[str, int], then: dict[str, int]
) -> None:
    full = fit(tmp_path, **then)
    short = fit(tmp_path, **first)
    path = tmp_path / "finished.ckpt"
    short.finished_trainer.save_checkpoint(path)
    assert_continues(fit(tmp_path, ckpt_path=str(path), **then), full, len(short.seen))


def test_resume_repeats_a_failed_batch(tmp_path: Any) -> None:
    full = fit(tmp_path)
    fit(tmp_path, OnExceptionCheckpoint(tmp_path, "failed"), fail_at=6)
    assert_continues(fit(tmp_path, ckpt_path=str(tmp_path / "failed.ckpt")), full, 6)


def test_limited_epochs_start_from_their_own_order(tmp_path: Any) -> None:
    limited = fit(tmp_path, limit_train_batches=3, num_sanity_val_steps=2)
    full = fit(tmp_path, num_sanity_val_steps=0)
    assert limited.seen == [batch for i, batch in enumerate(full.seen) if i % 4 != 3]


def test_overfit_batches_shows_the_same_images_in_every_epoch(tmp_path: Any) -> None:
    seen = fit(tmp_path, overfit_batches=2).seen
    assert seen[0] != seen[1]
    assert seen == 3 * seen[:2]
    assert seen[:2] == fit(tmp_path).seen[:2]


def test_resume_with_overfit_batches(tmp_path: Any) -> None:
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    full = fit(tmp_path, every_step, overfit_batches=2)
    resumed = fit(tmp_path, ckpt_path=str(tmp_path / "step=3.ckpt"), overfit_batches=2)
    assert_continues(resumed, full, 3)


def test_second_fit_of_a_trainer_continues(tmp_path: Any) -> None:
    full = fit(tmp_path)
    module = fit(tmp_path, max_epochs=2)
    trainer: Trainer = module.finished_trainer
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=Tiny())
    assert [labels for labels, _ in module.seen] == [labels for labels, _ in full.seen]


def test_resuming_with_another_recipe_warns(tmp_path: Any) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6))
    data = ready(batch_size=5)
    checkpoint = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    data.load_state_dict(checkpoint["Tiny"])
    with pytest.warns(UserWarning, match=r"'batch_size': 5.*'batch_size': 10"):
        data.train_dataloader()


def test_show_images_adds_a_grid_to_tensorboard(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for show, tags in ((4, ["train/images"]), (0, [])):
        logger = TensorBoardLogger(tmp_path, name=f"show{show}")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            logger=logger,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Recorder(), datamodule=Tiny(show_images=show))
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert events.Tags()["images"] == tags
        if tags:
            shown = events.Images("train/images")[0]
            assert shown.width == shown.height == 2 * 34 + 2  # 2 x 2 images in frames of 2 pixels


class RankRecorder(Recorder):
    """Saves the labels that its rank trained and validated on."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        self.folder = folder

    def validation_step(self, batch: aug.Batch, batch_idx: int) -> None:
        self.validated = [*getattr(self, "validated", []), *batch[1].tolist()]

    def on_validation_epoch_end(self) -> None:
        torch.save((self.seen, self.validated), self.folder / f"rank{self.global_rank}.pt")


def test_two_processes_share_each_batch(tmp_path: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children cannot use the parent's thread pool
    try:
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            max_epochs=1,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
        )
        trainer.fit(RankRecorder(tmp_path), datamodule=Tiny())
    finally:
        torch.set_num_threads(threads)
    seen, validated = zip(*(torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)), strict=True)
    whole = [labels.tolist() for _, labels in ready().train_dataloader()]
    assert [a[0] + b[0] for a, b in zip(*seen, strict=True)] == whole
    assert sorted(validated[0] + validated[1]) == list(range(TEST_COUNT))

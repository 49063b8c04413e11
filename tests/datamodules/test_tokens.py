"""Language-model batches: the same on any number of processes, in training and evaluation."""

import contextlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from datamodules import windows as win
from datamodules.shards import write_shard
from tests.datamodules.token_runs import (
    BOS,
    LENGTH,
    SEQUENCES,
    VAL,
    FakeTrainer,
    SaveAfter,
    Tiny,
    fit,
    ready,
    windows_of,
)

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"align_documents": True}])
def test_epoch_equals_its_definition(
    text: tuple[Path, np.ndarray, np.ndarray], options: dict[str, bool], workers: int
) -> None:
    folder, train, _ = text
    data = ready(folder, **options, num_workers=workers, micro_batch_size=6, batch_tokens=48)
    if options.get("align_documents"):
        starts = win.aligned_windows(np.flatnonzero(train == BOS), len(train), LENGTH)
        data = ready(folder, **options, num_workers=workers, micro_batch_size=2, batch_tokens=16)
    else:
        starts = np.arange(0, len(train) - LENGTH, LENGTH)
    per_step = data.micro_batch_size
    loader = data.train_dataloader()
    assert len(loader) == len(starts) // per_step > 1
    for epoch in range(2):
        order = win.shuffled(starts, 0, epoch) if options.get("shuffle") else starts
        batches = list(loader)
        assert len(batches) == len(loader)
        for step, batch in enumerate(batches):
            for tensor in batch:
                assert tensor.dtype == torch.int64 and tensor.is_contiguous()
                assert tensor.shape == (per_step, LENGTH)
            part = order[step * per_step : (step + 1) * per_step]
            assert windows_of(batch) == [tuple(train[s : s + LENGTH + 1].tolist()) for s in part]


@pytest.mark.parametrize("micro", [1, 2, 4, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_steps_are_the_same_on_any_number_of_processes(
    text: tuple[Path, np.ndarray, np.ndarray], world_size: int, micro: int
) -> None:
    folder, train, _ = text
    starts = win.shuffled(np.arange(31) * LENGTH, 0, 0)
    steps: dict[int, list[Any]] = defaultdict(list)
    shapes = set()
    for rank in range(world_size):
        data = ready(folder, rank, world_size, shuffle=True, micro_batch_size=micro)
        passes = data.trainer.accumulate_grad_batches
        assert passes == -(-SEQUENCES // (world_size * micro))
        batches = list(data.train_dataloader())
        assert len(batches) == 5 * passes
        for index, batch in enumerate(batches):
            steps[index // passes] += windows_of(batch)
            shapes.add(tuple(batch[0].shape))
    assert len(shapes) == 1
    assert shapes.pop()[0] == -(-SEQUENCES // (world_size * passes)) <= micro
    for step in range(5):
        part = starts[step * SEQUENCES : (step + 1) * SEQUENCES]
        expected = [tuple(train[s : s + LENGTH + 1].tolist()) for s in part]
        assert sorted(steps[step]) == sorted(expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("val_tokens", [None, 1, 7, 8, 9, 30, 44, 45, 1000])
def test_every_validation_target_counts_once(
    text: tuple[Path, np.ndarray, np.ndarray], val_tokens: int | None, world_size: int
) -> None:
    folder, _, val = text
    count = min(val_tokens or VAL, VAL - 1)
    pairs: list[tuple[int, int]] = []
    lengths, shapes = set(), set()
    for rank in range(world_size):
        options = {"val_tokens": val_tokens, "val_sequence_length": 5, "val_batch_size": 3}
        data = ready(folder, rank, world_size, shuffle=True, **options)
        too_many = val_tokens is not None and val_tokens >= VAL
        with pytest.warns(match="have only 44") if too_many else contextlib.nullcontext():
            loader = data.test_dataloader()
        batches = list(loader)
        lengths.add(len(loader))
        assert len(batches) == len(loader)
        for inputs, targets in batches:
            shapes.add(tuple(inputs.shape))
            counted = targets != win.IGNORED
            pairs += zip(inputs[counted].tolist(), targets[counted].tolist(), strict=True)
        assert [x.tolist() for x, _ in loader] == [x.tolist() for x, _ in batches]
    assert len(lengths) == len(shapes) == 1
    (size, length) = shapes.pop()
    assert size <= 3 and length == 5
    expected = zip(val[:count].tolist(), val[1 : count + 1].tolist(), strict=True)
    assert sorted(pairs) == sorted(expected)


def test_one_process_evaluates_in_order(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, _, val = text
    data = ready(folder, align_documents=True, batch_tokens=8)
    inputs = torch.cat([x.flatten() for x, y in data.val_dataloader()])
    assert inputs[: VAL - 1].tolist() == val[:-1].tolist()


def test_data_module_has_the_tokenizers_vocabulary(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    data = ready(text[0])
    assert (data.vocab_size, data.bos) == (257, 256)
    assert data.tokenizer.token_bytes().sum() == 256


@pytest.mark.parametrize("world_size", [1, 2])
def test_prompts_start_with_bos_and_are_divided(tmp_path: Path, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        data = Tiny(tmp_path, prompts=["ab", "é", ""])
        data.trainer = FakeTrainer(rank, world_size)
        data.setup("predict")  # needs no shards
        seen += [ids.tolist() for ids in data.predict_dataloader()]
    assert sorted(seen) == [[[256]], [[256, 97, 98]], [[256, 195, 169]]]


def test_processes_that_share_a_model_get_all_prompts(tmp_path: Path) -> None:
    for rank in range(2):
        data = Tiny(tmp_path, prompts=["ab", "é", ""])
        data.trainer = FakeTrainer(rank, 2)
        data.trainer.strategy = ModelParallelStrategy()
        loader = data.predict_dataloader()
        assert len(loader) == 3
        assert [ids.tolist() for ids in loader] == [[[256, 97, 98]], [[256, 195, 169]], [[256]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be a whole number of at least 1, got 0"),
        ({"batch_tokens": 50}, "batch_tokens=50 must be a multiple of .*=8: choose 48"),
        ({"sequence_length": 0}, "sequence_length must be a whole number of at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number"),
        ({"val_tokens": 0}, "val_tokens must be a whole number"),
        ({"val_sequence_length": 0}, "val_sequence_length must be a whole number"),
        ({"val_batch_size": -1}, "val_batch_size must be a whole number"),
        ({"val_every_n_steps": 0}, "val_every_n_steps must be a whole number"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0, got -1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"prompts": "Once"}, "prompts='Once': give a list"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiny(tmp_path, **options)


def test_too_few_tokens_are_refused(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"are 32 sequences of 8, and the 251 .* only 31: choose"):
        ready(text[0], batch_tokens=256)
    with pytest.raises(ValueError, match=r"are 12 sequences .* only 7 that start with a document"):
        ready(text[0], batch_tokens=96, align_documents=True)
    write_shard(text[0] / "t_val_000000.bin", np.zeros(1, np.uint16))
    with pytest.raises(ValueError, match=r"t_val_000000\.bin holds one token"):
        Tiny(text[0]).setup("test")


def test_tokens_of_another_tokenizer_are_refused(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    write_shard(text[0] / "t_train_000002.bin", np.full(101, 257, np.uint16))
    with pytest.raises(ValueError, match=r"t_train_000002\.bin holds token 257, .* has 257"):
        list(ready(text[0]).train_dataloader())


def test_shard_that_changes_in_use_is_refused(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    loader = ready(text[0]).train_dataloader()
    with (text[0] / "t_train_000000.bin").open("r+b") as file:
        file.truncate(1024)
    with pytest.raises(RuntimeError, match=r"t_train_000000\.bin was changed or removed"):
        list(loader)


def test_loaders_before_setup_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"train shards are not open: call setup\('fit'\)"):
        Tiny(tmp_path).train_dataloader()
    with pytest.raises(RuntimeError, match=r"val shards are not open: call setup\('test'\)"):
        Tiny(tmp_path).val_dataloader()
    with pytest.raises(ValueError, match="set prompts"):
        Tiny(tmp_path).predict_dataloader()


def test_fit_trains_on_the_defined_windows(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, train, _ = text
    result = fit(folder, options={"val_tokens": 40})
    assert result.validations == [(4, 40), (8, 40), (12, 40)]  # an epoch has 5 steps
    for step in range(12):
        epoch, within = divmod(step, 5)
        part = win.shuffled(np.arange(31) * LENGTH, 0, epoch)[within * 6 : within * 6 + 6]
        assert result.steps[step] == sorted(tuple(train[s : s + 9].tolist()) for s in part)


def test_validation_intervals_may_exceed_epochs(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    result = fit(text[0], options={"val_every_n_steps": 7}, max_steps=21)
    assert [step for step, _ in result.validations] == [7, 14, 21]


def test_trainers_own_validation_interval_is_kept(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    result = fit(text[0], options={"val_every_n_steps": None}, max_steps=10)
    assert [step for step, _ in result.validations] == [5, 10]  # after each epoch


def test_fast_dev_run_validates(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    result = fit(text[0], fast_dev_run=True)
    assert len(result.steps) == len(result.validations) == 1


def test_resume_with_other_data_warns(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder = text[0]
    fit(folder, SaveAfter(folder), max_steps=2)
    path = folder / "batch4.ckpt"
    fit(folder, ckpt_path=path, max_steps=3, options={"micro_batch_size": 1})
    (folder / "t_train_000003.bin").unlink()
    with pytest.warns(UserWarning, match=r"Resuming with .* 'shards': \[\['t_train_000000"):
        fit(folder, ckpt_path=path, max_steps=3)


def test_torchs_global_generator_is_left_alone(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    data = ready(text[0], num_workers=1)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"align_documents": True}])
def test_overfit_batches_trains_on_the_same_windows_in_every_epoch(
    text: tuple[Path, np.ndarray, np.ndarray], options: dict[str, bool]
) -> None:
    result = fit(
        text[0], overfit_batches=2, max_steps=6,
        options={**options, "batch_tokens": 16, "val_every_n_steps": None},
    )  # fmt: skip
    first = [result.steps[0], result.steps[1]]
    assert first[0] != first[1]
    assert [result.steps[step] for step in range(6)] == 3 * first

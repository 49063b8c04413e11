"""Language-model batches: windows, processes, evaluation, and exact resume."""

import contextlib
import itertools
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loops.progress import _BatchProgress
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn.functional import cross_entropy

from datamodules import tokens as tk
from datamodules.shards import write_shard
from datamodules.tokenizers import ByteTokenizer, GPT2Tokenizer, load_tokenizer

BOS = 256
SIZES = (70, 3, 101, 77)  # 251 tokens: 31 windows of 8, of which 6 make a step and 5 an epoch
VAL = 45
LENGTH, SEQUENCES = 8, 6

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def make_text(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write shards whose training windows all differ; returns both splits' tokens."""
    rng = np.random.default_rng(0)
    train, val = (rng.integers(0, 256, n).astype(np.uint16) for n in (sum(SIZES), VAL))
    train[[3, 4, 30, 72, 73, 74, 75, 120, 160, 161, 200, 230, 249]] = BOS
    for i, part in enumerate(np.split(train, np.cumsum(SIZES)[:-1])):
        write_shard(folder / f"t_train_{i:06d}.bin", part)
    write_shard(folder / "t_val_000000.bin", val)
    return train.astype(np.int64), val.astype(np.int64)


class Tiny(tk.TokenDataModule):
    """The shards of a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        defaults = {
            "batch_tokens": SEQUENCES * LENGTH, "sequence_length": LENGTH, "micro_batch_size": 4,
            "seed": 0,
        }  # fmt: skip
        super().__init__(ByteTokenizer(), **{**defaults, **options})
        self.folder = folder

    def shard_paths(self, split: tk.Split) -> list[Path]:
        return sorted(self.folder.glob(f"*_{split}_*.bin"))


class FakeTrainer:
    """As much of a Trainer as a DataModule asks for outside a fit."""

    training = False
    fast_dev_run = False
    val_check_interval = 1.0
    check_val_every_n_epoch = 1

    def __init__(self, rank: int, world_size: int, accumulate_grad_batches: int = 1) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()
        self.accumulate_grad_batches = accumulate_grad_batches
        self.callbacks: list[Callback] = []


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    return tmp_path, *make_text(tmp_path)


def ready(folder: Path, rank: int = 0, world_size: int = 1, **options: Any) -> Tiny:
    data = Tiny(folder, **options)
    data.trainer = FakeTrainer(rank, world_size)
    data.setup("fit")
    return data


def windows_of(batch: tk.Batch) -> list[tuple[int, ...]]:
    """The sequences of a batch, one token longer than their inputs; those without targets not."""
    inputs, targets = batch
    found = []
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        if any(token != tk.IGNORED for token in y):
            assert x[1:] == y[:-1]
            found.append((*x, y[-1]))
        else:
            assert x == [BOS] * len(x)
    return found


# --- windows ---


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 16, 17, 100])
def test_consecutive_windows_use_all_they_can(tokens: int) -> None:
    starts = tk.consecutive_windows(tokens, LENGTH).tolist()
    assert starts == [s for s in range(0, tokens, LENGTH) if s + LENGTH < tokens]


@pytest.mark.parametrize("seed", range(5))
def test_aligned_windows_are_the_greedy_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.random(400) < 0.15
    expected, at = [], 0
    while at + LENGTH < len(tokens):
        if tokens[at]:
            expected.append(at)
            at += LENGTH
        else:
            at += 1
    documents = np.flatnonzero(tokens)
    assert tk.aligned_windows(documents, len(tokens), LENGTH).tolist() == expected
    assert tk.aligned_windows(documents[:0], len(tokens), LENGTH).tolist() == []


def test_shuffling_is_a_function_of_seed_and_epoch_alone() -> None:
    starts = np.arange(50) * 8
    orders = {
        (seed, epoch): tk.shuffled(starts, seed, epoch).tolist()
        for seed in range(3)
        for epoch in range(3)
    }
    np.random.seed(9)
    assert all(tk.shuffled(starts, *key).tolist() == order for key, order in orders.items())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert all(sorted(order) == starts.tolist() for order in orders.values())


@pytest.mark.parametrize(
    ("count", "pieces"), list(itertools.product([1, 2, 5, 6, 7, 12], [1, 2, 3, 5]))
)
def test_pieces_follow_tensor_split(count: int, pieces: int) -> None:
    parts = np.array_split(np.arange(count), pieces)
    for index, part in enumerate(parts):
        assert list(range(*tk.piece(count, pieces, index))) == part.tolist()


# --- batches ---


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"align_documents": True}])
def test_an_epoch_is_its_definition(
    text: tuple[Path, np.ndarray, np.ndarray], options: dict[str, bool], workers: int
) -> None:
    folder, train, _ = text
    data = ready(folder, **options, num_workers=workers, micro_batch_size=6, batch_tokens=48)
    if options.get("align_documents"):
        starts = tk.aligned_windows(np.flatnonzero(train == BOS), len(train), LENGTH)
        data = ready(folder, **options, num_workers=workers, micro_batch_size=2, batch_tokens=16)
    else:
        starts = np.arange(0, len(train) - LENGTH, LENGTH)
    per_step = data.micro_batch_size
    loader = data.train_dataloader()
    assert len(loader) == len(starts) // per_step > 1
    for epoch in range(2):
        order = tk.shuffled(starts, 0, epoch) if options.get("shuffle") else starts
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
def test_any_number_of_processes_sees_the_same_steps(
    text: tuple[Path, np.ndarray, np.ndarray], world_size: int, micro: int
) -> None:
    folder, train, _ = text
    starts = tk.shuffled(np.arange(31) * LENGTH, 0, 0)
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
            counted = targets != tk.IGNORED
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


def test_the_tokenizer_is_the_models_too(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    data = ready(text[0])
    assert (data.vocab_size, data.bos) == (257, 256)
    assert data.tokenizer.token_bytes().sum() == 256


@pytest.mark.parametrize("world_size", [1, 2])
def test_prompts_start_as_documents_do(tmp_path: Path, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        data = Tiny(tmp_path, prompts=["ab", "é", ""])
        data.trainer = FakeTrainer(rank, world_size)
        data.setup("predict")  # needs no shards
        seen += [ids.tolist() for ids in data.predict_dataloader()]
    assert sorted(seen) == [[[256]], [[256, 97, 98]], [[256, 195, 169]]]


def test_processes_that_share_a_model_have_the_same_prompts(tmp_path: Path) -> None:
    for rank in range(2):
        data = Tiny(tmp_path, prompts=["ab", "é", ""])
        data.trainer = FakeTrainer(rank, 2)
        data.trainer.strategy = ModelParallelStrategy()
        loader = data.predict_dataloader()
        assert len(loader) == 3
        assert [ids.tolist() for ids in loader] == [[[256, 97, 98]], [[256, 195, 169]], [[256]]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prompt_that_fills_the_models_context(tmp_path: Path, rank: int) -> None:
    """It is refused on all processes: one that stops alone leaves others waiting."""
    data = Tiny(tmp_path, prompts=["", "seven b"])
    data.trainer = FakeTrainer(rank, 2)
    config = SimpleNamespace(context_length=9)
    data.trainer.lightning_module = SimpleNamespace(network=SimpleNamespace(config=config))
    assert len(data.predict_dataloader()) == 1
    config.context_length = 8
    with pytest.raises(ValueError, match=r"prompt 'seven b'… has 8 tokens, .* context is 8: short"):
        data.predict_dataloader()


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens=0: it must be at least 1"),
        ({"batch_tokens": 50}, "batch_tokens=50 must be a multiple of .*=8: choose 48"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"val_tokens": 0}, "val_tokens=0"),
        ({"val_sequence_length": 0}, "val_sequence_length=0"),
        ({"val_batch_size": -1}, "val_batch_size=-1"),
        ({"val_every_n_steps": 0}, "val_every_n_steps=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"prompts": "Once"}, "prompts='Once': give a list"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiny(tmp_path, **options)


def test_too_few_tokens(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"are 32 sequences of 8, and the 251 .* only 31: choose"):
        ready(text[0], batch_tokens=256)
    with pytest.raises(ValueError, match=r"are 12 sequences .* only 7 that start with a document"):
        ready(text[0], batch_tokens=96, align_documents=True)
    write_shard(text[0] / "t_val_000000.bin", np.zeros(1, np.uint16))
    with pytest.raises(ValueError, match=r"t_val_000000\.bin holds one token"):
        Tiny(text[0]).setup("test")


def test_tokens_of_another_tokenizer(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    write_shard(text[0] / "t_train_000002.bin", np.full(101, 257, np.uint16))
    with pytest.raises(ValueError, match=r"t_train_000002\.bin holds token 257, .* has 257"):
        list(ready(text[0]).train_dataloader())


def test_a_shard_that_changes_in_use(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    loader = ready(text[0]).train_dataloader()
    with (text[0] / "t_train_000000.bin").open("r+b") as file:
        file.truncate(1024)
    with pytest.raises(RuntimeError, match=r"t_train_000000\.bin was changed or removed"):
        list(loader)


def test_without_setup_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"train shards are not open: call setup\('fit'\)"):
        Tiny(tmp_path).train_dataloader()
    with pytest.raises(RuntimeError, match=r"val shards are not open: call setup\('test'\)"):
        Tiny(tmp_path).val_dataloader()
    with pytest.raises(ValueError, match="set prompts"):
        Tiny(tmp_path).predict_dataloader()


def test_the_trainer_may_not_say_otherwise(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    data = Tiny(text[0])
    data.trainer = FakeTrainer(0, 1, accumulate_grad_batches=3)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=3: leave it out, .* make it 2"):
        data.setup("fit")
    for given in (1, 2):
        data.trainer = FakeTrainer(0, 1, accumulate_grad_batches=given)
        data.setup("fit")
        data.setup("fit")
        assert data.trainer.accumulate_grad_batches == 2 and len(data.trainer.callbacks) == 1
    for name, said in (
        ("val_check_interval", 0.5),
        ("val_check_interval", 7),
        ("val_check_interval", None),
        ("check_val_every_n_epoch", 2),
    ):
        data = Tiny(text[0], val_every_n_steps=3)
        data.trainer = FakeTrainer(0, 1)
        setattr(data.trainer, name, said)
        with pytest.raises(ValueError, match="val_every_n_steps=3 and the trainer's"):
            data.setup("fit")


def test_what_the_trainer_was_told_is_not_what_the_user_said(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    trainer = FakeTrainer(0, 1)
    batches = _BatchProgress()
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches))

    def tell(**options: Any) -> tuple[Any, ...]:
        data = Tiny(text[0], **options)
        data.trainer = trainer
        data.setup("fit")
        return (
            trainer.accumulate_grad_batches,
            trainer.val_check_interval,
            trainer.check_val_every_n_epoch,
        )

    assert tell(micro_batch_size=4, val_every_n_steps=3) == (2, 6, None)
    assert tell(micro_batch_size=2, val_every_n_steps=4) == (3, 12, None)
    assert tell(micro_batch_size=1) == (6, 1.0, 1)
    trainer.accumulate_grad_batches = 5
    with pytest.raises(ValueError, match="accumulate_grad_batches=5: leave it out"):
        tell(micro_batch_size=2)
    trainer.accumulate_grad_batches = 6
    trainer.val_check_interval = 0.5
    assert tell(micro_batch_size=6) == (1, 0.5, 1)
    with pytest.raises(ValueError, match="both say when to validate"):
        tell(val_every_n_steps=3)


# --- the position in a checkpoint ---


def progress(
    current: int, total: int, completed: int = 0, ready: int = 0, is_last: bool = False
) -> dict[str, Any]:
    """Lightning's counts after ``total`` batches; completed and ready are off by that much."""
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
        # regular ones stay what they are
        (progress(4, 14), 2, 2, progress(4, 14), False),
        (progress(4, 14, -1), 2, 2, progress(4, 14, -1), False),
        (progress(10, 20, 0, 0, True), 2, 2, progress(10, 20, 0, 0, True), False),
        (progress(0, 10), 1, 1, progress(0, 10), False),
        # epochs that limit_train_batches cuts to 5 batches of 2 a step
        (progress(5, 15, 0, 0, True), 2, 2, progress(5, 15, 0, 0, True), False),
        (progress(2, 17), 2, 2, progress(2, 17), False),
        (progress(3, 18), 2, 2, progress(2, 17, -1), True),
        # another number of batches per step
        (progress(4, 14), 2, 3, progress(6, 21), False),
        (progress(4, 14, -1), 2, 1, progress(2, 7, -1), False),
        (progress(10, 20, -1, 0, True), 2, 6, progress(30, 60, -1, 0, True), False),
        # in the middle of a step: as if saved at the end of the last one
        (progress(5, 15), 2, 2, progress(4, 14, -1), True),
        (progress(5, 15, -1), 2, 3, progress(6, 21, -1), True),
        (progress(5, 15, 0, 1), 3, 2, progress(2, 8, -1), True),
        (progress(1, 11, -1), 2, 2, progress(0, 10, -1), True),
        # before the first batch of a step was through
        (progress(4, 14, 0, 1), 2, 2, progress(4, 14, -1), True),
        (progress(4, 14, 0, 1), 1, 1, progress(4, 14, -1), True),
        (progress(9, 19, 0, 1, True), 2, 2, progress(8, 18, -1), True),
    ],
)
def test_progress_is_counted_in_whole_steps(
    saved: dict[str, Any], old: int, new: int, expected: dict[str, Any], taken_back: bool
) -> None:
    assert tk.at_whole_step(saved, old, new) == (expected, taken_back)


# --- fits ---


class Recorder(LightningModule):
    """Trains a bigram model in double precision and notes what it sees."""

    def __init__(self, fail_at: int = -1, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.ask_for_steps = ask_for_steps
        self.table = torch.nn.Embedding(257, 257, dtype=torch.float64)
        torch.nn.init.zeros_(self.table.weight)
        self.fail_at = fail_at
        self.batches = 0
        self.steps: dict[int, list[Any]] = defaultdict(list)
        self.validations: list[tuple[int, int]] = []

    def loss(self, batch: tk.Batch) -> Tensor:
        inputs, targets = batch
        return cross_entropy(self.table(inputs).flatten(0, 1), targets.flatten(), reduction="sum")

    def training_step(self, batch: tk.Batch, batch_idx: int) -> Tensor:
        if self.batches == self.fail_at:
            raise ArithmeticError("as the test wants it")
        self.batches += 1
        trainer = self.trainer
        assert trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.global_step
        self.steps[trainer.global_step] += windows_of(batch)
        return self.loss(batch) * trainer.world_size * trainer.accumulate_grad_batches / 48

    def on_validation_epoch_start(self) -> None:
        self.counted = 0

    def validation_step(self, batch: tk.Batch, batch_idx: int) -> None:
        self.counted += int((batch[1] != tk.IGNORED).sum())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append((self.trainer.global_step, self.counted))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # sets the loader up before the checkpoint's states are restored
            assert self.trainer.estimated_stepping_batches == 15
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class SaveAfter(Callback):
    """Saves in the middle of everything: after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"batch{done}.ckpt")


class Report(Callback):
    """Writes down what each process saw; the weights too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Recorder)
        seen = dict(pl_module.steps), pl_module.validations, pl_module.table.weight.detach()
        torch.save(seen, self.folder / f"rank{trainer.global_rank}.pt")


class Result:
    """What all processes of a fit saw together."""

    def __init__(self, folder: Path, world_size: int) -> None:
        parts = [
            torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)
        ]
        self.steps = {
            step: sorted(window for part in parts for window in part[0][step])
            for step in parts[0][0]
        }
        self.validations = [
            (step, sum(part[1][i][1] for part in parts)) for i, (step, _) in enumerate(parts[0][1])
        ]
        self.weight = parts[0][2]
        assert all(torch.equal(part[2], self.weight) for part in parts)


def fit(
    folder: Path,
    *callbacks: Callback,
    world_size: int = 1,
    ckpt_path: Path | None = None,
    fail_at: int = -1,
    ask_for_steps: bool = False,
    max_steps: int = 12,
    options: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> Result:
    seed_everything(0, verbose=False)
    for old in folder.glob("rank*.pt"):
        old.unlink()
    trainer = Trainer(
        **{"max_epochs": -1, "max_steps": max_steps, **trainer_options},
        accelerator="cpu",
        devices=world_size,
        strategy="ddp_fork" if world_size > 1 else "auto",
        callbacks=[*callbacks, Report(folder)],
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    data = Tiny(folder, **{"shuffle": True, "val_every_n_steps": 4, **(options or {})})
    with contextlib.suppress(ArithmeticError):
        trainer.fit(
            Recorder(fail_at, ask_for_steps),
            datamodule=data,
            ckpt_path=ckpt_path and str(ckpt_path),
        )
    if fail_at >= 0:
        return None  # type: ignore[return-value]
    return Result(folder, world_size)


def assert_goes_on(resumed: Result, full: Result, done: int) -> None:
    assert resumed.steps == {step: seen for step, seen in full.steps.items() if step >= done}
    later = [validation for validation in full.validations if validation[0] > done]
    assert [v for v in resumed.validations if v[0] > done] == later
    torch.testing.assert_close(resumed.weight, full.weight, rtol=0, atol=1e-12)


def test_a_fit_steps_as_told(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, train, _ = text
    result = fit(folder, options={"val_tokens": 40})
    assert result.validations == [(4, 40), (8, 40), (12, 40)]  # an epoch has 5 steps
    for step in range(12):
        epoch, within = divmod(step, 5)
        part = tk.shuffled(np.arange(31) * LENGTH, 0, epoch)[within * 6 : within * 6 + 6]
        assert result.steps[step] == sorted(tuple(train[s : s + 9].tolist()) for s in part)


def test_intervals_longer_than_epochs(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    result = fit(text[0], options={"val_every_n_steps": 7}, max_steps=21)
    assert [step for step, _ in result.validations] == [7, 14, 21]


def test_the_trainers_own_interval(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    result = fit(text[0], options={"val_every_n_steps": None}, max_steps=10)
    assert [step for step, _ in result.validations] == [5, 10]  # after each epoch


def test_a_trainers_next_fit_goes_on_with_other_batches(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    """Three fits of one Trainer, with 2, 3 and 1 batches a step: 12 steps as of a single fit."""
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


def test_a_trial_run_validates_too(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    result = fit(text[0], fast_dev_run=True)
    assert len(result.steps) == len(result.validations) == 1


@pytest.mark.parametrize(("micro", "workers"), [(2, 0), (2, 2), (1, 0), (6, 0)])
def test_resumed_anywhere_it_sees_what_the_uninterrupted_one_sees(
    text: tuple[Path, np.ndarray, np.ndarray], micro: int, workers: int
) -> None:
    """Saved with 3 batches a step (15 an epoch), resumed with 3, 6 and 1."""
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
        assert_goes_on(resumed, full, done)


@pytest.mark.parametrize("fail_at", [0, 1, 12, 14, 15, 20])
@pytest.mark.parametrize("micro", [2, 3])
def test_a_step_that_failed_is_repeated(
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
    assert_goes_on(resumed, full, fail_at // 3)


def test_a_model_may_ask_for_the_number_of_steps(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder = text[0]
    epochs = {"max_steps": -1, "max_epochs": 3, "ask_for_steps": True}
    full = fit(folder, SaveAfter(folder), **epochs)
    for done, micro in ((8, 4), (13, 1), (20, 6), (21, 2)):
        path = folder / f"batch{done}.ckpt"
        resumed = fit(folder, ckpt_path=path, options={"micro_batch_size": micro}, **epochs)
        assert_goes_on(resumed, full, done // 2)


def test_limited_epochs_go_on_too(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """7 of 15 batches: two whole steps and one of a third of the batch."""
    folder = text[0]
    options = {"micro_batch_size": 2, "val_every_n_steps": None}
    full = fit(folder, SaveAfter(folder), options=options, limit_train_batches=7)
    for done, step in ((3, 1), (6, 2), (7, 3), (9, 3), (10, 4), (14, 6)):
        path = folder / f"batch{done}.ckpt"
        resumed = fit(folder, ckpt_path=path, options=options, limit_train_batches=7)
        assert_goes_on(resumed, full, step)


def test_a_finished_fit_can_be_prolonged(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder = text[0]
    full = fit(folder, max_steps=12)
    for steps in (5, 7):
        last = ModelCheckpoint(folder, f"{steps}", save_last=False, every_n_train_steps=steps)
        fit(folder, last, max_steps=steps)
        resumed = fit(folder, ckpt_path=folder / f"{steps}.ckpt", options={"micro_batch_size": 1})
        assert_goes_on(resumed, full, steps)


def test_other_data_is_a_warning(text: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder = text[0]
    fit(folder, SaveAfter(folder), max_steps=2)
    path = folder / "batch4.ckpt"
    fit(folder, ckpt_path=path, max_steps=3, options={"micro_batch_size": 1})
    (folder / "t_train_000003.bin").unlink()
    with pytest.warns(UserWarning, match=r"Resuming with .* 'shards': \[\['t_train_000000"):
        fit(folder, ckpt_path=path, max_steps=3)


def test_nothing_is_drawn_from_torchs_generator(
    text: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    data = ready(text[0], num_workers=1)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children cannot use the parent's thread pool
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("batch", [8, 10, 13])
def test_another_number_of_processes_goes_on(
    text: tuple[Path, np.ndarray, np.ndarray],
    one_thread: None,
    first: int,
    then: int,
    batch: int,
) -> None:
    """One process takes 4 batches a step and two take 2: 8 ends a step, also one with validation;
    10 ends one in one of them, 13 none."""
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
    assert_goes_on(resumed, full, batch // (4 // first))


# --- tokenizers ---


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("né\n")
    assert ids.dtype == np.uint16 and ids.tolist() == [110, 195, 169, 10]
    assert tokenizer.decode(ids) == "né\n"
    assert tokenizer.decode([256, 110, 195, 256, 255]) == "<|endoftext|>n�<|endoftext|>�"
    assert tokenizer.decode(torch.tensor([110, 195, 169])) == "né" and tokenizer.decode([]) == ""
    assert tokenizer.encode("<|endoftext|>").max() < 256
    assert tokenizer.encode("a\ud800b").tolist() == [97, 63, 98]
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]
    with pytest.raises(ValueError, match=r"token 257 cannot be decoded: .* 257 tokens"):
        tokenizer.decode([257])


class SmallGPT2(GPT2Tokenizer):
    """GPT-2's tokenizer with a vocabulary that needs no download."""

    vocab_size = 259
    bos = 258


def small_encoding(name: str) -> Any:
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    specials = {"<|endoftext|>": 258}
    return tiktoken.Encoding(
        name, pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=specials
    )


def test_byte_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", small_encoding)
    tokenizer = SmallGPT2()
    ids = tokenizer.encode("abcab é")
    assert ids.dtype == np.uint16 and ids.tolist() == [257, 256, 32, 195, 169]
    assert tokenizer.decode(ids) == "abcab é"
    assert tokenizer.decode([258, 257, 195]) == "<|endoftext|>abc�"
    assert tokenizer.encode("<|endoftext|>").max() < 258
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [2, 3, 0]
    with pytest.raises(ValueError, match="token 259"):
        tokenizer.decode([1, 259])


def test_gpt2() -> None:
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.bos) == (50257, 50256)
    try:
        ids = tokenizer.encode("Hello world")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert ids.tolist() == [15496, 995] and tokenizer.decode(ids) == "Hello world"
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (50257,) and lengths[ids.tolist()].tolist() == [5, 6]
    assert lengths[50256] == 0 and lengths[:50256].min() == 1


def test_a_vocabulary_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def refuse(name: str) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(FileNotFoundError, match=r"\(Name or service not known\).*TIKTOKEN_CACHE"):
        load_tokenizer("gpt2").encode("a")
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tiktoken"):
        load_tokenizer("gpt2").encode("a")
    with pytest.raises(ValueError, match="tokenizer='words': choose gpt2 or bytes"):
        load_tokenizer("words")  # type: ignore[arg-type]

"""The on-device image loader: augmentation, sharding and exact resume."""

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from datamodules import images as im

COUNT, TEST_COUNT = 45, 23

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class Tiny(im.ImageDataModule):
    """Random images; the label of an example is its index."""

    mean = (0.5, 0.4, 0.6)
    std = (0.25, 0.2, 0.3)

    def __init__(self, batch_size: int = 10, **options: Any) -> None:
        defaults = {
            "flip": "alternating", "translate": 2, "cutout": 4, "seed": 0, "show_images": 0
        }  # fmt: skip
        super().__init__(batch_size, **{**defaults, **options})

    def read(self, split: im.Split) -> im.Batch:
        count = COUNT if split == "train" else TEST_COUNT
        return random_images(count, seed=count), torch.arange(count)


class FakeTrainer:
    """As much of a Trainer as a DataModule asks for outside a fit."""

    training = False

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


class Recorder(LightningModule):
    """Trains one linear layer and notes the batches it sees."""

    def __init__(self, fail_at: int = -1, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 1)
        self.fail_at, self.ask_for_steps = fail_at, ask_for_steps
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: im.Batch, batch_idx: int) -> Tensor:
        pixels, labels = batch
        if len(self.seen) == self.fail_at:
            raise ArithmeticError("as the test wants it")
        self.seen.append((labels.tolist(), pixels.double().sum().item()))
        return self.layer(pixels.flatten(1)).square().mean()

    def validation_step(self, batch: im.Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # sets the loader up before the checkpoint's states are restored
            assert self.trainer.estimated_stepping_batches == 12
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def random_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def ready(rank: int = 0, world_size: int = 1, **options: Any) -> Tiny:
    data = Tiny(**options)
    data.trainer = FakeTrainer(rank, world_size)
    data.setup("fit")
    return data


def assert_same_batches(actual: list[im.Batch], expected: list[im.Batch]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# --- augmentation ---


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_reflect_pad_is_torchs_reflection(margin: int) -> None:
    images = random_images(4, size=7)
    expected = torch.nn.functional.pad(images.double(), (margin,) * 4, mode="reflect")
    assert torch.equal(im.reflect_pad(images, margin).double(), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_crop_takes_the_named_window(memory_format: torch.memory_format) -> None:
    images = random_images(5, size=9).contiguous(memory_format=memory_format)
    index = torch.tensor([4, 0, 0, 2, 3, 1])
    top, left = torch.tensor([0, 4, 1, 2, 3, 0]), torch.tensor([4, 0, 3, 3, 1, 2])
    cropped = im.crop(images, index, top, left, 5)
    for window, i, y, x in zip(cropped, index, top, left, strict=True):
        assert torch.equal(window, images[i, :, y : y + 5, x : x + 5])


def test_mirror_flips_columns_of_the_masked_images_only() -> None:
    images = random_images(3, size=4)
    flipped = im.mirror(images, torch.tensor([True, False, True]))
    for i, mask in enumerate([True, False, True]):
        for column in range(4):
            source = 3 - column if mask else column
            assert torch.equal(flipped[i, :, :, column], images[i, :, :, source])


def test_cut_out_paints_one_square_and_nothing_else() -> None:
    images = random_images(3, size=8)
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)
    top, left = torch.tensor([0, 5, 2]), torch.tensor([5, 0, 3])
    painted = im.cut_out(images, top, left, 3, fill)
    for i in range(3):
        for row in range(8):
            for column in range(8):
                inside = top[i] <= row < top[i] + 3 and left[i] <= column < left[i] + 3
                expected = fill if inside else images[i, :, row, column]
                assert torch.equal(painted[i, :, row, column], expected)


def test_normalize() -> None:
    images = random_images(6)
    mean, std = torch.tensor([0.5, 0.4, 0.6]), torch.tensor([0.25, 0.2, 0.3])
    normalized = im.normalize(images, mean, std)
    expected = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalized.double(), expected, atol=1e-6, rtol=1e-6)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, random_images(6))


def draw(**options: Any) -> im.Draw:
    defaults = {"seed": 0, "epoch": 0, "flip": "alternating", "translate": 2, "cutout": 4}
    return im.draw_epoch(1000, 32, **{**defaults, **options})


def test_draw_is_a_function_of_seed_and_epoch_alone() -> None:
    def same(a: im.Draw, b: im.Draw) -> dict[str, bool]:
        return {name: torch.equal(value, getattr(b, name)) for name, value in vars(a).items()}

    np.random.seed(1)
    torch.manual_seed(1)
    first = draw(seed=3, epoch=2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert all(same(first, draw(seed=3, epoch=2)).values())
    assert not any(same(first, draw(seed=4, epoch=2)).values())
    other_epoch = same(first, draw(seed=3, epoch=4))
    assert other_epoch.pop("mirrored")  # that is what alternating means
    assert not any(other_epoch.values())
    # Neighbouring seeds and epochs do not meet, as seed + epoch would.
    assert not torch.equal(draw(seed=0, epoch=1).order, draw(seed=1, epoch=0).order)


def test_draw_keeps_to_its_ranges_and_reaches_their_ends() -> None:
    chosen = draw(translate=2, cutout=4)
    assert torch.equal(chosen.order.sort().values, torch.arange(1000))
    for shift in (chosen.top, chosen.left):
        assert (shift.min(), shift.max()) == (0, 4)
    for corner in (chosen.hole_top, chosen.hole_left):
        assert (corner.min(), corner.max()) == (0, 28)


def test_flips() -> None:
    mirrored = [draw(flip="alternating", epoch=epoch).mirrored for epoch in range(4)]
    assert 400 < mirrored[0].sum() < 600
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0]) and torch.equal(mirrored[3], mirrored[1])
    by_coin = [draw(flip="random", epoch=epoch).mirrored for epoch in range(2)]
    assert 400 < (by_coin[0] ^ by_coin[1]).sum() < 600
    assert not draw(flip="none").mirrored.any()


def test_switching_one_augmentation_leaves_the_others() -> None:
    plain, changed = draw(cutout=0, flip="none"), draw(cutout=8, flip="random")
    for name in ("order", "top", "left"):
        assert torch.equal(getattr(plain, name), getattr(changed, name))


def test_train_epoch_is_the_slow_way_done_fast() -> None:
    images, labels, epoch = random_images(COUNT), torch.arange(COUNT), 3
    fill = torch.tensor([9, 8, 7], dtype=torch.uint8)
    options = {"seed": 5, "flip": "alternating", "translate": 3, "cutout": 6}
    padded = im.reflect_pad(images, 3)
    augmented, targets = im.train_epoch(padded, labels, fill, epoch, batch_size=10, **options)
    drawn = im.draw_epoch(COUNT, 32, epoch=epoch, **options)
    assert torch.equal(targets, drawn.order[:40])
    for picture, example in zip(augmented, targets, strict=True):
        y, x = drawn.top[example], drawn.left[example]
        expected = padded[example, :, y : y + 32, x : x + 32].clone()
        if drawn.mirrored[example]:
            expected = expected.flip(-1)
        y, x = drawn.hole_top[example], drawn.hole_left[example]
        expected[:, y : y + 6, x : x + 6] = fill[:, None, None]
        assert torch.equal(picture, expected)


# --- epochs and ranks ---


def test_an_epoch_shows_every_example_once_but_the_last_partial_batch() -> None:
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


def test_breaking_off_goes_to_the_next_epoch() -> None:
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
        expected = im.normalize(
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


def test_batch_size_must_fit() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 .* 3 ranks: choose a multiple of 3"):
        ready(0, 3).train_dataloader()
    with pytest.raises(ValueError, match="batch_size=46: choose at most 45"):
        ready(batch_size=46).train_dataloader()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"flip": "vertical"},
        {"translate": -1},
        {"translate": 32},
        {"cutout": 33},
        {"seed": -1},
        {"show_images": -1},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Tiny(**options)


def test_without_setup_it_says_so() -> None:
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
    expected = im.normalize(
        random_images(COUNT, seed=COUNT), torch.tensor(data.mean), torch.tensor(data.std)
    )
    assert torch.equal(data.training_images(7), expected[:7])
    assert torch.equal(data.training_images(1000), expected)


def test_the_seed_is_seed_everythings_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    zero = list(ready(seed=0).train_dataloader())
    assert_same_batches(list(ready(seed=None).train_dataloader()), zero)
    seven = list(ready(seed=7).train_dataloader())
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert_same_batches(list(ready(seed=None).train_dataloader()), seven)
    assert_same_batches(list(ready(seed=0).train_dataloader()), zero)


# --- resume ---


@pytest.mark.parametrize("position", [0, 1, 3, 4])
def test_a_loader_goes_on_where_the_saved_one_stood(position: int) -> None:
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


def fit(
    tmp_path: Any,
    *callbacks: Any,
    ckpt_path: str | None = None,
    fail_at: int = -1,
    ask_for_steps: bool = False,
    **options: Any,
) -> Recorder:
    seed_everything(0, verbose=False)
    module = Recorder(fail_at, ask_for_steps)
    trainer = Trainer(
        **{"max_epochs": 3, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    with contextlib.suppress(ArithmeticError):
        trainer.fit(module, datamodule=Tiny(), ckpt_path=ckpt_path)
    module.finished_trainer = trainer
    return module


def assert_goes_on(resumed: Recorder, full: Recorder, done: int) -> None:
    assert resumed.seen == full.seen[done:]
    assert torch.equal(resumed.layer.weight, full.layer.weight)


BY_STEPS = {"max_epochs": -1, "max_steps": 12}


@pytest.mark.parametrize("ask_for_steps", [False, True])
@pytest.mark.parametrize("options", [{}, BY_STEPS], ids=["epochs", "steps"])
def test_a_resumed_fit_sees_what_the_uninterrupted_one_sees(
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
        assert_goes_on(resumed, full, done)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_epochs": 2}, {}),
        ({"max_epochs": -1, "max_steps": 6}, BY_STEPS),
        ({"max_epochs": -1, "max_steps": 8}, BY_STEPS),
    ],
)
def test_a_finished_fit_can_be_prolonged(
    tmp_path: Any, first: dict[str, int], then: dict[str, int]
) -> None:
    full = fit(tmp_path, **then)
    short = fit(tmp_path, **first)
    path = tmp_path / "finished.ckpt"
    short.finished_trainer.save_checkpoint(path)
    assert_goes_on(fit(tmp_path, ckpt_path=str(path), **then), full, len(short.seen))


def test_a_batch_that_failed_is_repeated(tmp_path: Any) -> None:
    full = fit(tmp_path)
    fit(tmp_path, OnExceptionCheckpoint(tmp_path, "failed"), fail_at=6)
    assert_goes_on(fit(tmp_path, ckpt_path=str(tmp_path / "failed.ckpt")), full, 6)


def test_limited_epochs_still_are_epochs(tmp_path: Any) -> None:
    limited = fit(tmp_path, limit_train_batches=3, num_sanity_val_steps=2)
    full = fit(tmp_path, num_sanity_val_steps=0)
    assert limited.seen == [batch for i, batch in enumerate(full.seen) if i % 4 != 3]


def test_two_fits_with_one_trainer_go_on(tmp_path: Any) -> None:
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


# --- images in TensorBoard ---


def test_images_are_shown_on_request(tmp_path: Any) -> None:
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


# --- real processes ---


class RankRecorder(Recorder):
    """Writes down what its rank saw."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        self.folder = folder

    def validation_step(self, batch: im.Batch, batch_idx: int) -> None:
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

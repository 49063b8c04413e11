"""Augmentation against slow references, and its random choices."""

from typing import Any

import numpy as np
import pytest
import torch

from datamodules import augmentation as aug
from tests.datamodules.image_runs import COUNT, random_images

pytestmark = [  # these tests resume without the callback that saved
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.* was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_reflect_pad_equals_torchs_reflection(margin: int) -> None:
    images = random_images(4, size=7)
    expected = torch.nn.functional.pad(images.double(), (margin,) * 4, mode="reflect")
    assert torch.equal(aug.reflect_pad(images, margin).double(), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_crop_takes_the_given_window(memory_format: torch.memory_format) -> None:
    images = random_images(5, size=9).contiguous(memory_format=memory_format)
    index = torch.tensor([4, 0, 0, 2, 3, 1])
    top, left = torch.tensor([0, 4, 1, 2, 3, 0]), torch.tensor([4, 0, 3, 3, 1, 2])
    cropped = aug.crop(images, index, top, left, 5)
    for window, i, y, x in zip(cropped, index, top, left, strict=True):
        assert torch.equal(window, images[i, :, y : y + 5, x : x + 5])


def test_mirror_flips_columns_of_the_masked_images_only() -> None:
    images = random_images(3, size=4)
    flipped = aug.mirror(images, torch.tensor([True, False, True]))
    for i, mask in enumerate([True, False, True]):
        for column in range(4):
            source = 3 - column if mask else column
            assert torch.equal(flipped[i, :, :, column], images[i, :, :, source])


def test_cut_out_paints_one_square_and_nothing_else() -> None:
    images = random_images(3, size=8)
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8)
    top, left = torch.tensor([0, 5, 2]), torch.tensor([5, 0, 3])
    painted = aug.cut_out(images, top, left, 3, fill)
    for i in range(3):
        for row in range(8):
            for column in range(8):
                inside = top[i] <= row < top[i] + 3 and left[i] <= column < left[i] + 3
                expected = fill if inside else images[i, :, row, column]
                assert torch.equal(painted[i, :, row, column], expected)


def test_normalize_equals_the_formula() -> None:
    images = random_images(6)
    mean, std = torch.tensor([0.5, 0.4, 0.6]), torch.tensor([0.25, 0.2, 0.3])
    normalized = aug.normalize(images, mean, std)
    expected = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalized.double(), expected, atol=1e-6, rtol=1e-6)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, random_images(6))


def draw(**options: Any) -> aug.Draw:
    defaults = {"seed": 0, "epoch": 0, "flip": "alternating", "translate": 2, "cutout": 4}
    options = {**defaults, **options}
    epoch = options.pop("epoch")
    return aug.draw_epoch(1000, 32, epoch, aug.ImageRecipe(batch_size=10, **options))


def test_draw_depends_on_seed_and_epoch_alone() -> None:
    def same(a: aug.Draw, b: aug.Draw) -> dict[str, bool]:
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


def test_draw_covers_its_ranges() -> None:
    chosen = draw(translate=2, cutout=4)
    assert torch.equal(chosen.order.sort().values, torch.arange(1000))
    for shift in (chosen.top, chosen.left):
        assert (shift.min(), shift.max()) == (0, 4)
    for corner in (chosen.hole_top, chosen.hole_left):
        assert (corner.min(), corner.max()) == (0, 28)


def test_flips_alternate_or_follow_a_coin() -> None:
    mirrored = [draw(flip="alternating", epoch=epoch).mirrored for epoch in range(4)]
    assert 400 < mirrored[0].sum() < 600
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0]) and torch.equal(mirrored[3], mirrored[1])
    by_coin = [draw(flip="random", epoch=epoch).mirrored for epoch in range(2)]
    assert 400 < (by_coin[0] ^ by_coin[1]).sum() < 600
    assert not draw(flip="none").mirrored.any()


def test_one_augmentation_does_not_change_the_others() -> None:
    plain, changed = draw(cutout=0, flip="none"), draw(cutout=8, flip="random")
    for name in ("order", "top", "left"):
        assert torch.equal(getattr(plain, name), getattr(changed, name))


def test_train_epoch_equals_the_slow_reference() -> None:
    images, labels, epoch = random_images(COUNT), torch.arange(COUNT), 3
    fill = torch.tensor([9, 8, 7], dtype=torch.uint8)
    recipe = aug.ImageRecipe(5, 10, "alternating", translate=3, cutout=6)
    padded = aug.reflect_pad(images, 3)
    augmented, targets = aug.train_epoch(padded, labels, fill, epoch, recipe)
    drawn = aug.draw_epoch(COUNT, 32, epoch, recipe)
    assert torch.equal(targets, drawn.order[:40])
    for picture, example in zip(augmented, targets, strict=True):
        y, x = drawn.top[example], drawn.left[example]
        expected = padded[example, :, y : y + 32, x : x + 32].clone()
        if drawn.mirrored[example]:
            expected = expected.flip(-1)
        y, x = drawn.hole_top[example], drawn.hole_left[example]
        expected[:, y : y + 6, x : x + 6] = fill[:, None, None]
        assert torch.equal(picture, expected)

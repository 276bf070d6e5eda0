"""Crops, flips and shifts against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import augment


@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_random_crop_lies_inside_the_image(width, height, seed):
    left, top, right, bottom = augment.crop_box(
        width, height, np.random.default_rng(seed)
    )
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_crops_have_the_published_area_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.crop_box(500, 400, rng) for _ in range(2000)])
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
    ratios, areas = widths / heights, widths * heights / (500 * 400)
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    assert areas.min() > 0.079 and areas.max() <= 1
    assert areas.min() < 0.1 and areas.max() > 0.9
    # As often wider than high as higher than wide, but for the largest that do not fit.
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000)])
def test_a_strip_gives_its_centre(width, height):
    left, top, right, bottom = augment.crop_box(width, height, np.random.default_rng(0))
    assert (right - left) / (bottom - top) == pytest.approx(
        4 / 3 if width > height else 3 / 4, abs=0.1
    )
    assert left == (width - right + left) // 2
    assert top == (height - bottom + top) // 2


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_crop_flip_is_the_crop_resized_and_mirrored_every_other_time():
    image = picture(50, 40)
    mirrored = 0
    for draw in range(200):
        rng = np.random.default_rng(draw)
        box = augment.crop_box(50, 40, rng)
        expected = np.asarray(
            image.resize((16, 16), Image.Resampling.BILINEAR, box=box)
        )
        found = np.asarray(augment.crop_flip(image, 16, draw))
        if np.array_equal(found, expected[:, ::-1]):
            mirrored += 1
        else:
            np.testing.assert_array_equal(found, expected)
    assert 70 < mirrored < 130


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (20, 90)])
def test_the_centre_crop_of_224_is_that_of_256(size):
    image = picture(*size)
    width, height = size
    scale = 256 / min(size)
    width, height = math.floor(width * scale), math.floor(height * scale)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(augment.centre_crop(image, 224), expected)


@given(
    height=st.integers(1, 20), width=st.integers(1, 20), draw=st.integers(0, 2**64 - 1)
)
def test_shift_moves_and_fills_with_zeros(height, width, draw):
    images = np.random.default_rng(0).integers(1, 256, (2, height, width, 2), np.uint8)
    draws = np.array([draw, 0], np.uint64)
    shifted = augment.shift(images, draws)
    assert shifted.shape == images.shape
    assert shifted.dtype == images.dtype
    for image, moved, bits in zip(images, shifted, (draw, 0), strict=True):
        dy = bits % (2 * (height // 8) + 1) - height // 8
        dx = (bits >> 32) % (2 * (width // 8) + 1) - width // 8
        for y in range(height):
            for x in range(width):
                inside = 0 <= y + dy < height and 0 <= x + dx < width
                expected = image[y + dy, x + dx] if inside else [0, 0]
                assert list(moved[y, x]) == list(expected)


def test_shift_reaches_every_offset_equally():
    draws = np.random.PCG64(0).random_raw(9000)
    dot = np.zeros((1, 8, 8, 1), np.uint8)
    dot[0, 4, 4] = 1
    places = augment.shift(np.repeat(dot, 9000, 0), draws).sum(0)[3:6, 3:6, 0]
    assert places.sum() == 9000
    assert places.min() > 850

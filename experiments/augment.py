"""Crops, flips and shifts of images, each a pure function of an image and a draw.

A *draw* is 64 random bits that belong to one (seed, epoch, record); see
`experiments.data`. The same draw gives the same pixels, in whichever thread, on
whichever host and after whichever restart.

The library is Pillow (MIT-CMU licence). Looked at in November 2026, by release and
by what each needs:

* albumentations (MIT): last release May 2025, its README says unmaintained; its
  successor albumentationsx is AGPL-3.0, which a permissive project cannot depend on.
* torchvision (BSD, October 2026) and kornia (Apache-2.0, alive): both need torch,
  hundreds of megabytes beside jax, and draw from a process-wide generator, so two
  threads cannot reproduce a record's crop.
* dm-pix (Apache-2.0, June 2026) and augmax (Apache-2.0): alive, but they work on jax
  arrays of one fixed shape, whereas a photograph is cropped before it has one.
* imgaug (MIT): last release February 2020. scikit-image: no random transformations.
* Pillow: a release every quarter, the latest in October 2026, no dependencies, already
  needed to decode; `Image.resize(size, box=...)` crops and antialiases in one C call
  that releases the interpreter lock. What is left to choose is where the crop lies.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

CROP_AREA = (0.08, 1.0)
"""Area of a random crop as a fraction of the image's (arXiv:1409.4842, section 6)."""

CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop (arXiv:1409.4842, section 6)."""


def crop_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Chooses a crop of random area and aspect ratio.

    Args:
      width: Width of the image, pixels.
      height: Height of the image, pixels.
      rng: Where the random numbers come from.

    Returns:
      (left, top, right, bottom) in pixels, inside the image. An image so narrow that
      ten tries do not fit gives its largest centred crop with a permitted ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * CROP_RATIO[1]))
    h = min(height, round(width / CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_flip(image: Image.Image, size: int, draw: int) -> Image.Image:
    """A random crop resized to a square, mirrored in one case of two.

    Args:
      image: The image to augment.
      size: Side of the result, pixels.
      draw: The 64 random bits of this (seed, epoch, record).

    Returns:
      An image of `size` x `size` pixels.
    """
    rng = np.random.default_rng(draw)
    box = crop_box(image.width, image.height, rng)
    crop = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to 8/7 of `size` (256 for 224) and cuts the middle.

    Args:
      image: The image to crop.
      size: Side of the result, pixels.

    Returns:
      An image of `size` x `size` pixels.
    """
    shorter = round(size * 8 / 7)
    scale = shorter / min(image.size)
    width, height = (max(shorter, int(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def shift(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Moves every image by up to an eighth of its side, filling with zeros.

    Args:
      images: (B, H, W, C), any dtype.
      draws: (B,) uint64, the random bits of each (seed, epoch, record).

    Returns:
      (B, H, W, C) of the same dtype: image b is moved by dy(b) rows and dx(b) columns,
      each uniform over -H//8..H//8 and -W//8..W//8.
    """
    count, height, width, _ = images.shape
    reach_y, reach_x = height // 8, width // 8
    padded = np.pad(images, ((0, 0), (reach_y, reach_y), (reach_x, reach_x), (0, 0)))
    top = (draws % np.uint64(2 * reach_y + 1)).astype(np.int64)
    left = ((draws >> np.uint64(32)) % np.uint64(2 * reach_x + 1)).astype(np.int64)
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    which = np.arange(count)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]

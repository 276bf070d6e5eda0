"""Records become arrays: in memory for small sets, decoded when asked for photographs.

`ArraySplit` decodes a small source once and keeps it (Fashion-MNIST: 55 MB), so that
a batch is an indexing; `ImageSplit` decodes, crops and normalises photographs on all
cores. Both give the same batch for the same record numbers and draws.
"""

from __future__ import annotations

import concurrent.futures
import copy
import os
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np
from PIL import Image

from experiments import augment
from experiments.sources import Source, decode_image


class Split(Protocol):
    """What `experiments.data.Data` needs of one split."""

    image_shape: tuple[int, int, int]
    read_options: grain.ReadOptions

    def __len__(self) -> int: ...

    def gather(self, records: np.ndarray, draws: np.ndarray | None) -> dict:
        """Batch of the given records; `draws` (uint64, one each) asks to augment."""
        ...


class ArraySplit:
    """A small split, decoded once and held in memory as uint8.

    Args:
      source: The records; all are read and decoded here.
      image_shape: (H, W, C) of the result; images of another size are resized.
      mean: (C,) mean pixel value.
      std: (C,) standard deviation of the pixel values.
    """

    # Reading is an indexing of arrays: a thread would cost more than it hides.
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

    def __init__(
        self,
        source: Source,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.image_shape = image_shape
        height, width, channels = image_shape
        self._mean, self._std = (np.asarray(x, np.float32) for x in (mean, std))
        self.images = np.empty((len(source), *image_shape), np.uint8)
        self.labels = np.empty(len(source), np.int32)
        mode = "L" if channels == 1 else "RGB"
        for record, (payload, label) in enumerate(source):
            if source.raw_shape == image_shape:
                pixels = np.frombuffer(payload, np.uint8)
            else:
                image = decode_image(source, record, payload, mode)
                if image.size != (width, height):
                    image = image.resize((width, height), Image.Resampling.BILINEAR)
                pixels = np.asarray(image)
            self.images[record] = pixels.reshape(image_shape)
            self.labels[record] = label

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, records: np.ndarray) -> ArraySplit:
        """The split of some records, (n,) numbers, in the order given."""
        part = copy.copy(self)
        part.images, part.labels = self.images[records], self.labels[records]
        return part

    def join(self, other: ArraySplit) -> ArraySplit:
        """The split of these records and, after them, those of another."""
        both = copy.copy(self)
        both.images = np.concatenate([self.images, other.images])
        both.labels = np.concatenate([self.labels, other.labels])
        return both

    def gather(self, records: np.ndarray, draws: np.ndarray | None) -> dict:
        """Batch of the given records: "image" f32 (B, H, W, C), "label" i32 (B,).

        Args:
          records: (B,) record numbers.
          draws: (B,) uint64 to shift each image by, or None: as stored.
        """
        images = self.images[records]
        if draws is not None:
            images = augment.shift(images, draws)
        images = (images.astype(np.float32) - self._mean) / self._std
        return {"image": images, "label": self.labels[records]}


class ImageSplit:
    """A split of photographs of any size, decoded record by record in threads.

    Args:
      source: The records.
      size: Side of the square images to make, pixels.
      mean: (3,) mean pixel value, red green blue, 0..255.
      std: (3,) standard deviation.
    """

    # One batch is worked on by all cores; one more is kept ready.
    read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

    def __init__(
        self, source: Source, size: int, mean: Sequence[float], std: Sequence[float]
    ):
        self.image_shape: tuple[int, int, int] = (size, size, 3)
        self._source = source
        # One row of pixels, (W * 3,): a broadcast along three colours is five times
        # as slow.
        self._mean, self._std = (
            np.tile(np.asarray(x, np.float32), size) for x in (mean, std)
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self._source)

    def gather(self, records: np.ndarray, draws: np.ndarray | None) -> dict:
        """Batch of the given records: "image" f32 (B, H, W, 3), "label" i32 (B,).

        Args:
          records: (B,) record numbers.
          draws: (B,) uint64 to crop and flip each image by, or None: the centre crop.
        """
        images = np.empty((len(records), *self.image_shape), np.float32)
        labels = np.empty(len(records), np.int32)
        size = self.image_shape[0]

        def fill(row: int) -> None:
            record = int(records[row])
            payload, labels[row] = self._source[record]
            image = decode_image(self._source, record, payload, "RGB")
            if draws is None:
                image = augment.centre_crop(image, size)
            else:
                image = augment.crop_flip(image, size, int(draws[row]))
            rows = images[row].reshape(size, -1)
            np.subtract(np.asarray(image).reshape(size, -1), self._mean, out=rows)
            rows /= self._std

        # The list waits for every row and raises the first row's error.
        list(self._pool.map(fill, range(len(records))))
        return {"image": images, "label": labels}

"""Data sets as deterministic, resumable, host-sharded batches. Never a download.

    data = load("digits")
    batches = data.train_batches(64, seed=0)     # endless; a Grain iterator
    batch = next(batches)                        # {"image": f32 (64, 8, 8, 1), ...}
    position = batches.get_state()               # {"next_index": 1}; JSON, or Orbax
    batches.set_state(position)                  # the exact next batch again
    for batch in data.test_batches(256): ...     # once through; the last one padded

| name | images | pixels | mean, standard deviation | augmentation |
|---|---|---|---|---|
| `digits` | 8×8×1, bundled | 0..16 | 4.886, 6.014 | none |
| `fashion_mnist` | 28×28×1 | 0..255 | 72.94, 90.02 | none, or "shift" |
| `imagenet2012` | 224×224×3 | 0..255 | per colour, below | "crop_flip", or none |
| `image_folder` | 224×224×3 | 0..255 | those of ImageNet | "crop_flip", or none |

Order. Epoch e of seed s visits the records in an order that is a function of (s, e)
alone: hosts, restarts and threads do not enter. Batch k of a run on n hosts is the
global batch k of a run on one host, dealt out: host h takes its rows h, h+n, h+2n, ...
so that the hosts' shares are disjoint and together the whole, and a run may be resumed
on another number of hosts. What does not fill a global batch is dropped, each epoch
another remainder. The random bits of an augmentation belong to (seed, epoch, record).

The order is one argsort per epoch and a small set's batch one indexing. Grain's own
chain of `shuffle`, slice and `batch` calls Python several times per record, 30 times
the work: about what a small network needs to train on the image.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from experiments.sources import (
    BUNDLED,
    DataError,
    Folder,
    Records,
    default_data_path,
)
from experiments.splits import ArraySplit, ImageSplit, Split

__all__ = ["Data", "DataError", "load"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean red, green and blue of ImageNet's training images, 0..255."""

IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation of the same."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of a set before it is opened."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...]  # the default first
    num_classes: int | None = None
    test: str = "test"
    source: str = ""  # what `--source` of the prepare command means; "": not needed


_KNOWN = {
    "digits": _Known(8, 1, (4.886,), (6.014,), ("none", "shift"), 10),
    "fashion_mnist": _Known(
        28, 1, (72.94,), (90.02,), ("none", "shift"), 10, source="DIR_WITH_IDX_FILES"
    ),
    "imagenet2012": _Known(
        224,
        3,
        IMAGENET_MEAN,
        IMAGENET_STD,
        ("crop_flip", "none"),
        1000,
        "validation",
        "DIR_WITH_TARS",
    ),
    "image_folder": _Known(
        224, 3, IMAGENET_MEAN, IMAGENET_STD, ("crop_flip", "none"), None
    ),
}


def load(
    name: str,
    data_path: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    augment: str | None = None,
) -> Data:
    """Opens a data set and checks that it is whole.

    Args:
      name: "digits", "fashion_mnist", "imagenet2012" or "image_folder".
      data_path: Where the set is. For the first three a directory in TFDS's layout,
        DIR/NAME/VERSION/, or that version's directory itself; None is the bundled set
        for digits and `default_data_path()` for the others. For "image_folder" the
        directory with train/CLASS/*.jpg and val/CLASS/* (or test/CLASS/*): required.
      image_size: Side of the square images, pixels; None: the set's own (8, 28, 224).
      augment: Of training images: "none", "shift" (digits, fashion_mnist; up to an
        eighth of the side) or "crop_flip" (the others: random crop of 8..100 % of the
        area, resized, mirrored in one case of two). None: the set's default. Without
        "crop_flip", photographs are resized to 8/7 and centre-cropped, as in tests.

    Returns:
      The set. digits and fashion_mnist are decoded into memory here.

    Raises:
      DataError: Unknown name, size or augmentation; a missing set (the message holds
        the command that makes it) or a damaged one (it names the file).
    """
    known = _KNOWN.get(name)
    if known is None:
        raise DataError(f"no data set {name!r}; there are {', '.join(_KNOWN)}")
    chosen = known.augment[0] if augment is None else augment
    if chosen not in known.augment:
        raise DataError(
            f"augment={augment!r} is not for {name}, which takes "
            f"{' or '.join(known.augment)}"
        )
    size = known.size if image_size is None else image_size
    if size < 1:
        raise DataError(f"image_size={image_size}: a side is at least 1 pixel")

    if name == "image_folder":
        train, test = _open_folder(data_path)
    else:
        train, test = _open_records(name, known, data_path)
    if known.num_classes not in (None, train.num_classes):
        raise DataError(
            f"{name} has {known.num_classes} classes, but this set declares "
            f"{train.num_classes}"
        )
    if known.channels == 1:
        shape = (size, size, known.channels)
        splits = [ArraySplit(s, shape, known.mean, known.std) for s in (train, test)]
    else:
        splits = [ImageSplit(s, size, known.mean, known.std) for s in (train, test)]
    return Data(name, train.num_classes, splits[0], splits[1], chosen)


def _open_records(
    name: str, known: _Known, data_path: str | os.PathLike | None
) -> tuple[Records, Records]:
    """Finds the newest version of a TFDS set and opens its two splits."""
    if data_path is None:
        root = BUNDLED if name == "digits" else default_data_path()
    else:
        root = Path(data_path).expanduser()
    if (root / "dataset_info.json").is_file():
        folder, root = root, root.parent.parent
    else:
        versions = [
            info.parent
            for info in root.glob(f"{name}/*/dataset_info.json")
            if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
        ]
        folder = max(
            versions,
            key=lambda path: [int(x) for x in path.name.split(".")],
            default=None,
        )
    command = f"python -m experiments.prepare {name}"
    command += f" --source {known.source}" if known.source else ""
    command += f" --data-path {shlex.quote(str(root))}" if root != BUNDLED else ""
    if folder is None:
        raise DataError(f"{name} is not in {root}; make it with: {command}")
    remedy = f"make the set again with: {command} --overwrite"
    return (
        Records(folder, name, "train", remedy),
        Records(folder, name, known.test, remedy),
    )


def _open_folder(data_path: str | os.PathLike | None) -> tuple[Folder, Folder]:
    """Opens train/ and val/ (or test/) of an image folder, with the same classes."""
    layout = "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"
    if data_path is None:
        raise DataError(f"image_folder needs data_path=DIR with {layout}")
    root = Path(data_path).expanduser()
    train = root / "train"
    test = root / "val" if (root / "val").is_dir() else root / "test"
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a directory; image_folder needs {layout}")
    classes, test_classes = (
        {
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        }
        for folder in (train, test)
    )
    if not classes:
        raise DataError(f"{train} has no class directories; it needs {layout}")
    if classes != test_classes:
        raise DataError(
            f"the classes differ: only in {train}: "
            f"{sorted(classes - test_classes) or 'none'}; only in {test}: "
            f"{sorted(test_classes - classes) or 'none'}"
        )
    names = sorted(classes)
    return Folder(train, names), Folder(test, names)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set with a training and a test split; made by `load`.

    Attributes:
      name: The set's name, as given to `load`.
      num_classes: Labels are 0..num_classes-1.
      train: The training split.
      test: The test split.
      augment: "none", "shift" or "crop_flip".
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    augment: str = "none"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.train.image_shape

    @property
    def num_train(self) -> int:
        """Number of training records."""
        return len(self.train)

    @property
    def num_test(self) -> int:
        """Number of test records."""
        return len(self.test)

    @property
    def stem(self) -> str:
        """The first layers that suit the images: "small" (to 64 px) or "imagenet"."""
        return "small" if max(self.image_shape[:2]) <= 64 else "imagenet"

    def train_batches(
        self, batch_size: int, *, seed: int, num_hosts: int = 1, host: int = 0
    ) -> grain.DatasetIterator:
        """Endless shuffled batches; every epoch in another order.

        Args:
          batch_size: Records per batch on this host.
          seed: Of the order and of the augmentation; not negative.
          num_hosts: How many hosts share the records.
          host: Which of them this is, 0..num_hosts-1.

        Returns:
          Grain's iterator of {"image": f32 (B, H, W, C) normalised, "label": i32 (B,)}.
          `get_state()` is a dict that JSON holds, {"next_index": batches given};
          `set_state` continues with exactly the next batch of the same arguments. Orbax
          saves it with `grain.checkpoint.CheckpointSave`.

        Raises:
          DataError: The batch of all hosts is larger than the training split, or an
            argument is out of range.
        """
        batch_size = _checked(batch_size, num_hosts, host)
        if operator.index(seed) < 0:
            raise DataError(f"seed={seed}: seeds are 0 or more")
        if batch_size * num_hosts > self.num_train:
            raise DataError(
                f"batch_size={batch_size} on {num_hosts} host(s) makes "
                f"{batch_size * num_hosts} records a step, but {self.name} has only "
                f"{self.num_train} for training: choose at most "
                f"{self.num_train // num_hosts}"
            )
        source = _TrainBatches(
            self.train, batch_size, seed, num_hosts, host, self.augment != "none"
        )
        return _iterate(source, self.train)

    def test_batches(
        self, batch_size: int, *, num_hosts: int = 1, host: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """The test records once, in order, never augmented.

        Args:
          batch_size: Records per batch on this host.
          num_hosts: How many hosts share the records.
          host: Which of them this is, 0..num_hosts-1.

        Returns:
          Iterator of {"image", "label", "valid": f32 (B,)}. Every batch has batch_size
          rows; where the records end, rows are zero with valid = 0. All hosts give the
          same number of batches, as a collective evaluation needs.

        Raises:
          DataError: An argument is out of range.
        """
        batch_size = _checked(batch_size, num_hosts, host)
        source = _TestBatches(self.test, batch_size, num_hosts, host)
        return _iterate(source, self.test)


def _checked(batch_size: int, num_hosts: int, host: int) -> int:
    """Returns batch_size as a Python int, or raises."""
    batch_size = operator.index(batch_size)
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: a batch holds at least 1 record")
    if not 0 <= host < num_hosts:
        raise DataError(f"host={host} of num_hosts={num_hosts}: hosts count from 0")
    return batch_size


def _iterate(source, split: Split) -> grain.DatasetIterator:
    """Grain's iterator over a random-access source of batches."""
    dataset = grain.MapDataset.source(source).to_iter_dataset(split.read_options)
    return iter(dataset)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, records: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of the records in an epoch, and 64 random bits for each record.

    Sorted raw bits rather than `Generator.permutation`: NumPy keeps the bit stream the
    same for ever, the methods that use it only within a version.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(records), kind="stable")
    return order, bits.random_raw(records)


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
    """Batch k of an endless shuffled run, for any k."""

    split: Split
    batch_size: int
    seed: int
    num_hosts: int
    host: int
    augment: bool

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        everyone = self.batch_size * self.num_hosts
        epoch, step = divmod(int(k), len(self.split) // everyone)
        order, draws = _epoch(self.seed, epoch, len(self.split))
        batch = order[step * everyone : (step + 1) * everyone]
        records = batch[self.host :: self.num_hosts]
        return self.split.gather(records, draws[records] if self.augment else None)


@dataclasses.dataclass(frozen=True)
class _TestBatches:
    """Batch k of the test split, padded."""

    split: Split
    batch_size: int
    num_hosts: int
    host: int

    def __len__(self) -> int:
        return -(-len(self.split) // (self.batch_size * self.num_hosts))

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        everyone = self.batch_size * self.num_hosts
        batch = np.arange(int(k) * everyone, (int(k) + 1) * everyone)
        records = batch[self.host :: self.num_hosts]
        valid = records < len(self.split)
        found = self.split.gather(records[valid], None)
        padding = self.batch_size - int(valid.sum())
        padded = {
            key: np.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1))
            for key, value in found.items()
        }
        return padded | {"valid": valid.astype(np.float32)}

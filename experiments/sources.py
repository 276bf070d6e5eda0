"""Where the bytes of a data set come from: TFDS ArrayRecord files, or image files.

A *source* has a length, gives `(payload, label)` for a record number, and names that
record in words for an error message. Nothing here needs TensorFlow.
"""

from __future__ import annotations

import bisect
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

BUNDLED = Path(__file__).parent / "datasets"
"""Where the sets that come with the repository are."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Endings of the files that an image folder counts as images, in either case."""


class DataError(ValueError):
    """A data set is missing, incomplete, damaged or asked for wrongly."""


def default_data_path() -> Path:
    """TFDS's habitual place: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    place = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(place).expanduser()


class Source(Protocol):
    """Records by number: encoded or raw image bytes and a class."""

    num_classes: int

    raw_shape: tuple[int, ...] | None
    """Shape of a payload of plain uint8 pixels; None: it is an encoded image."""

    def __len__(self) -> int: ...

    def __getitem__(self, record: int) -> tuple[bytes, int]: ...

    def __iter__(self) -> Iterator[tuple[bytes, int]]: ...

    def where(self, record: int) -> str:
        """Names the record for an error message."""
        ...


class Records:
    """One split of a TFDS set stored as ArrayRecord, read by record number.

    Record numbers run over the set's files in order. Opening compares the number of
    records in every file with the number that `dataset_info.json` promises; ArrayRecord
    keeps a hash of every record, so flipped bytes are found when the record is read.

    Args:
      folder: The folder that holds `dataset_info.json`.
      name: Name of the set; another set in the folder is an error.
      split: Name of the split.
      remedy: What to do when the set is damaged; ends every error message.

    Raises:
      DataError: The folder, the split or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, name: str, split: str, remedy: str):
        import tensorflow_datasets as tfds

        self._remedy = remedy
        try:
            builder: Any = tfds.builder_from_directory(folder)
            info = builder.info
        except Exception as error:  # TFDS lets protobuf's and json's own errors through
            raise DataError(
                f"{folder}: dataset_info.json or features.json cannot be read "
                f"({error}); {remedy}"
            ) from error
        if info.name != name:
            raise DataError(f"{folder} holds the set {info.name!r}, not {name!r}")
        if split not in info.splits:
            raise DataError(
                f"{folder} has no split {split!r}, only {sorted(info.splits)}; {remedy}"
            )
        form = getattr(info.file_format, "value", None)
        if form != "array_record":
            raise DataError(f"{folder} holds {form} files, not array_record; {remedy}")
        self._files = [Path(path) for path in info.splits[split].filepaths]
        lengths = info.splits[split].shard_lengths
        for path, length in zip(self._files, lengths, strict=True):
            self._check_count(path, length)
        self._ends = list(itertools.accumulate(lengths))
        self._records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        encoded = isinstance(info.features["image"], tfds.features.Image)
        self.raw_shape = None if encoded else tuple(info.features["image"].shape)
        self.num_classes = info.features["label"].num_classes

    def _check_count(self, path: Path, promised: int) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        if not path.is_file():
            raise DataError(f"{path} is missing; {self._remedy}")
        try:
            reader = ArrayRecordReader(os.fspath(path))
            found = reader.num_records()
            reader.close()  # a damaged index is only reported here
        except RuntimeError as error:
            raise DataError(f"{path} is damaged ({error}); {self._remedy}") from error
        if found != promised:
            raise DataError(
                f"{path} holds {found} records, but dataset_info.json promises "
                f"{promised}; {self._remedy}"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, record: int) -> str:
        """Names a record by its number in its file, and the file."""
        shard = bisect.bisect_right(self._ends, record)
        first = self._ends[shard - 1] if shard else 0
        return f"record {record - first} of {self._files[shard]}"

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        try:
            return self._parse(record, self._records[record])
        except RuntimeError as error:
            raise self._damage(record, error) from error

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        # A thousand at a time: five times faster than one by one.
        for start in range(0, len(self), 1000):
            block = range(start, min(start + 1000, len(self)))
            try:
                found = self._records.__getitems__(list(block))
            except RuntimeError:  # one of them is damaged; which one?
                yield from (self[record] for record in block)
            else:
                yield from map(self._parse, block, found)

    def _parse(self, record: int, found: bytes) -> tuple[bytes, int]:
        """Image bytes and label of a serialised example."""
        # TFDS's own message type, but not its decoder, which costs four times as much
        # as everything else in reading a small image.
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            example = tf_example_pb2.Example.FromString(found)  # pyright: ignore
            feature = example.features.feature
            payload = feature["image"].bytes_list.value[0]
            label = int(feature["label"].int64_list.value[0])
            if self.raw_shape is not None and len(payload) != math.prod(self.raw_shape):
                raise IndexError(
                    f"{len(payload)} bytes are not {self.raw_shape} pixels"
                )
        except (DecodeError, IndexError) as error:
            raise self._damage(record, error) from error
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.where(record)} has label {label}, outside 0.."
                f"{self.num_classes - 1}; {self._remedy}"
            )
        return payload, label

    def _damage(self, record: int, error: Exception) -> DataError:
        """What to raise for a record that cannot be read."""
        return DataError(f"{self.where(record)} is damaged ({error}); {self._remedy}")


class Folder:
    """Image files in one directory per class.

    Args:
      folder: The directory that holds the class directories.
      classes: Names of the classes; the position of a name is its label.

    Raises:
      DataError: A class directory holds no image.
    """

    raw_shape: tuple[int, ...] | None = None

    def __init__(self, folder: Path, classes: Sequence[str]):
        self.num_classes = len(classes)
        self._files: list[tuple[Path, int]] = []
        for label, name in enumerate(classes):
            names = sorted(
                entry.name
                for entry in os.scandir(folder / name)
                if entry.name.lower().endswith(IMAGE_SUFFIXES)
                and not entry.name.startswith(".")
            )
            if not names:
                raise DataError(
                    f"{folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})"
                )
            self._files += [(folder / name / file, label) for file in names]

    def __len__(self) -> int:
        return len(self._files)

    def where(self, record: int) -> str:
        """Names a record by its path."""
        return str(self._files[record][0])

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return (self[record] for record in range(len(self)))

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        path, label = self._files[record]
        try:
            return path.read_bytes(), label
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from error


def decode_image(source: Source, record: int, payload: bytes, mode: str) -> Image.Image:
    """Decodes the payload of a record.

    Args:
      source: Where the record is from.
      record: Its number.
      payload: Its bytes.
      mode: Pillow's name of the colours wanted: "L" (grey) or "RGB".

    Returns:
      The image in that mode.

    Raises:
      DataError: The bytes are not an image that Pillow reads; names the record.
    """
    try:
        if source.raw_shape is not None:
            pixels = np.frombuffer(payload, np.uint8).reshape(source.raw_shape)
            return Image.fromarray(pixels.squeeze(-1)).convert(mode)
        with Image.open(io.BytesIO(payload)) as image:
            wide = image.mode == "I" and image.getextrema()[1] > 255
            if wide or image.mode == "F":
                raise ValueError(f"pixels of mode {image.mode} have no known range")
            if image.mode.startswith("I;16"):  # Pillow would cut values above 255
                pixels = (np.asarray(image) >> 8).astype(np.uint8)
                return Image.fromarray(pixels).convert(mode)
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{source.where(record)} is not a readable image ({error}); replace it or "
            "take it out of the set"
        ) from error

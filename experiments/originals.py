"""Data sets as their authors hand them out: what `prepare` turns into ArrayRecord.

Each function checks that its files are there and returns an `Original`; the images are
read when the examples are asked for, one at a time.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from experiments.sources import DataError

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of one split.

    Attributes:
      count: How many the published split has.
      read: Called once; yields dicts that the set's features encode.
    """

    count: int
    read: Callable[[], Iterator[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Original:
    """A data set before it is written.

    Attributes:
      name: TFDS name, also of the directory.
      version: "major.minor.patch", the directory below.
      features: Feature name to TFDS feature.
      splits: Split name to its examples.
      size: Bytes that the written set needs, roughly.
      about: description, homepage and citation, for `dataset_info.json`.
    """

    name: str
    version: str
    features: dict[str, Any]
    splits: dict[str, Examples]
    size: int
    about: dict[str, str]


def digits() -> Original:
    """The 1,797 handwritten digits of scikit-learn, split 1,437 to 360.

    The split is `RandomState(0).permutation(1797)`, a stream that NumPy has frozen: its
    first 1,437 entries are the training records, the rest the test records, in that
    order. Thirteen people wrote the digits and the split does not separate them: an
    accuracy on it is for comparing methods, not for comparing with unseen writers.

    Raises:
      DataError: scikit-learn is not installed.
    """
    import tensorflow_datasets as tfds

    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(
            "the digits are read from scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.RandomState(0).permutation(len(images))

    def examples(records: np.ndarray) -> Iterator[dict[str, Any]]:
        for record in records:
            yield {"image": images[record], "label": int(labels[record])}

    return Original(
        name="digits",
        version="1.0.0",
        features={
            "image": tfds.features.Tensor(
                shape=(8, 8, 1), dtype=np.uint8, encoding="bytes"
            ),
            "label": tfds.features.ClassLabel(num_classes=10),
        },
        splits={
            "train": Examples(1437, lambda: examples(order[:1437])),
            "test": Examples(360, lambda: examples(order[1437:])),
        },
        size=2**19,
        about={
            "description": "Optical Recognition of Handwritten Digits: 8x8 images, "
            "pixels 0..16. The test part of the UCI set, as scikit-learn ships it.",
            "homepage": "https://archive.ics.uci.edu/dataset/80",
            "citation": "Alpaydin, E. & Kaynak, C. (1998). Optical Recognition of "
            "Handwritten Digits. UCI Machine Learning Repository. "
            "https://doi.org/10.24432/C50P49",
        },
    )


def fashion_mnist(source: Path) -> Original:
    """Fashion-MNIST (arXiv:1708.07747) from its four idx files, gzipped or not.

    Args:
      source: Directory with train-images-idx3-ubyte, train-labels-idx1-ubyte and the
        same two of t10k, each with or without ".gz".

    Raises:
      DataError: A file is missing, cut short, of another kind or does not fit the
        others; names it.
    """
    import tensorflow_datasets as tfds

    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(_find_idx(source, f"{stem}-images-idx3-ubyte"), 3)
        label_file = _find_idx(source, f"{stem}-labels-idx1-ubyte")
        labels = read_idx(label_file, 1)
        if images.shape[1:] != (28, 28):
            raise DataError(
                f"{source}: {stem} images are {images.shape[1]}x{images.shape[2]} "
                "pixels, those of Fashion-MNIST 28x28"
            )
        if len(labels) != len(images):
            raise DataError(
                f"{label_file} has {len(labels)} labels for {len(images)} images"
            )
        if len(labels) == 0 or labels.max() > 9:
            raise DataError(f"{label_file}: labels are not 0..9 or there are none")
        splits[split] = Examples(len(labels), _pairs(images, labels))
    return Original(
        name="fashion_mnist",
        version="1.0.0",
        features={
            "image": tfds.features.Tensor(
                shape=(28, 28, 1), dtype=np.uint8, encoding="bytes"
            ),
            "label": tfds.features.ClassLabel(names=FASHION_CLASSES),
        },
        splits=splits,
        size=1000 * sum(split.count for split in splits.values()),
        about={
            "description": "Fashion-MNIST: 28x28 grey images of clothes.",
            "homepage": "https://github.com/zalandoresearch/fashion-mnist",
            "citation": "Xiao, H., Rasul, K. & Vollgraf, R. (2017). Fashion-MNIST. "
            "arXiv:1708.07747",
        },
    )


def _pairs(images: np.ndarray, labels: np.ndarray):
    """A function that yields the examples of these arrays."""

    def examples() -> Iterator[dict[str, Any]]:
        for image, label in zip(images, labels, strict=True):
            yield {"image": image[..., None], "label": int(label)}

    return examples


def _find_idx(source: Path, name: str) -> Path:
    """The file of that name in a directory, gzipped or plain."""
    for path in (source / f"{name}.gz", source / name):
        if path.is_file():
            return path
    raise DataError(
        f"{source / name}[.gz] is missing; Debian's package dataset-fashion-mnist has "
        "the four files in /usr/share/datasets/fashion-mnist"
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes.

    Args:
      path: The file; gzipped when its name ends in ".gz".
      rank: Number of dimensions that it must have.

    Returns:
      uint8 array.

    Raises:
      DataError: The file is cut short, longer than its header says, or has another
        magic number; names the file and both numbers.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(
            f"{path} cannot be unpacked ({error}); fetch it again"
        ) from error
    start = 4 + 4 * rank
    if len(raw) < start:
        raise DataError(f"{path} has only {len(raw)} bytes; an idx header has {start}")
    # Two zero bytes, 8 for unsigned bytes, the rank; then the sizes, big-endian.
    magic, wanted = int.from_bytes(raw[:4], "big"), 0x0800 + rank
    if magic != wanted:
        raise DataError(
            f"{path} starts with magic number {magic:#010x}; an idx file of rank "
            f"{rank} starts with {wanted:#010x}"
        )
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    pixels = int(np.prod(shape, dtype=np.int64))
    if len(raw) - start != pixels:
        raise DataError(
            f"{path} holds {len(raw) - start} values, its header promises {pixels}; "
            "fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def imagenet2012(source: Path) -> Original:
    """ILSVRC 2012 from its two archives; features and labels as TFDS writes them.

    TFDS's own builder cannot do this without TensorFlow: past one gigabyte it sorts
    through TensorFlow's files. Here images are written in the archives' order, which
    costs training nothing, since ArrayRecord is read in any order.

    Args:
      source: Directory with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as
        image-net.org hands them out.

    Raises:
      DataError: An archive is missing; names it. While reading: an archive or an image
        in it is damaged, or has an unknown name.
    """
    import tensorflow_datasets as tfds

    train = source / "ILSVRC2012_img_train.tar"
    validation = source / "ILSVRC2012_img_val.tar"
    missing = [str(path) for path in (train, validation) if not path.is_file()]
    if missing:
        raise DataError(
            f"missing: {', '.join(missing)}; register at "
            "https://image-net.org/download-images to obtain them"
        )
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    classes = (lists / "labels.txt").read_text().split()
    validation_labels = (lists / "validation_labels.txt").read_text().split()
    return Original(
        name="imagenet2012",
        version="5.1.0",
        features={
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=classes),
            "file_name": tfds.features.Text(),
        },
        splits={
            "train": Examples(1_281_167, lambda: _imagenet_train(train, set(classes))),
            "validation": Examples(
                50_000, lambda: _imagenet_validation(validation, validation_labels)
            ),
        },
        size=train.stat().st_size + validation.stat().st_size,
        about={
            "description": "ILSVRC 2012: photographs of 1,000 classes.",
            "homepage": "https://image-net.org/",
            "citation": "Russakovsky, O. et al. (2015). ImageNet Large Scale Visual "
            "Recognition Challenge. arXiv:1409.0575",
        },
    )


def _imagenet_train(path: Path, classes: set[str]) -> Iterator[dict[str, Any]]:
    """Examples of the training archive: one archive per class inside it."""
    with path.open("rb") as file:
        for name, archive in _members(file, str(path)):
            label = name.removesuffix(".tar")
            if label not in classes:
                raise DataError(f"{path}: {name} is not an ImageNet class's archive")
            for file_name, image in _members(io.BytesIO(archive), f"{path}: {name}"):
                yield {
                    "image": rgb_jpeg(image, f"{path}: {name}: {file_name}"),
                    "label": label,
                    "file_name": file_name,
                }


def _imagenet_validation(path: Path, labels: list[str]) -> Iterator[dict[str, Any]]:
    """Examples of the validation archive; line i of the labels is image number i."""
    with path.open("rb") as file:
        for file_name, image in _members(file, str(path)):
            number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", file_name)
            if number is None or not 1 <= int(number[1]) <= len(labels):
                raise DataError(f"{path}: {file_name} is not a validation image's name")
            yield {
                "image": rgb_jpeg(image, f"{path}: {file_name}"),
                "label": labels[int(number[1]) - 1],
                "file_name": file_name,
            }


def _members(archive: BinaryIO, where: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file in a tar."""
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:  # a directory has no contents
                    yield member.name, file.read()
            # tarfile takes a header that it cannot read for the end.
            archive.seek(tar.offset)
            if archive.read(512) != bytes(512):
                raise tarfile.TarError(f"no header and no end at byte {tar.offset:,}")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where} is damaged ({error}); fetch it again") from error


def rgb_jpeg(payload: bytes, where: str) -> bytes:
    """Returns a JPEG in RGB or grey; one that is already comes back byte for byte.

    ImageNet holds 22 JPEGs in CMYK and one PNG under a JPEG's name.

    Args:
      payload: The image file.
      where: Names it in the error message.

    Raises:
      DataError: Pillow cannot read the image.
    """
    try:
        with Image.open(io.BytesIO(payload)) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return payload
            fixed = io.BytesIO()
            image.convert("RGB").save(fixed, "JPEG", quality=100, subsampling=0)
            return fixed.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is not a readable image ({error})") from error

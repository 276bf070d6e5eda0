"""Makes a data set on this machine from files that you already have.

Nothing is downloaded. The result is TFDS ArrayRecord, DIR/NAME/VERSION/, which the
experiments read without TensorFlow. An existing set is kept unless --overwrite is
given, and a run that fails or is stopped leaves no half-written set.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments import originals
from experiments.presets import PRESETS
from experiments.sources import BUNDLED, DataError, default_data_path
from experiments.write import write_set


@dataclasses.dataclass(frozen=True)
class Digits:
    """UCI handwritten digits: 1,797 images of 8x8 pixels, 0.5 MB, a second.

    The repository holds the result already; this is how it was made. Reads the images
    from scikit-learn (pip install scikit-learn).
    """

    data_path: Path = BUNDLED
    """Directory of data sets to write into."""
    overwrite: bool = False
    """Replace the set that is there."""

    def original(self) -> originals.Original:
        """The set to write."""
        return originals.digits()


@dataclasses.dataclass(frozen=True)
class FashionMnist:
    """Fashion-MNIST: 70,000 images of 28x28 pixels, 70 MB, about ten seconds.

    The four idx files are in Debian's package dataset-fashion-mnist, under
    /usr/share/datasets/fashion-mnist.
    """

    source: Path
    """Directory with train-images-idx3-ubyte[.gz] and the three other idx files."""
    data_path: Path = dataclasses.field(default_factory=default_data_path)
    """Directory of data sets to write into."""
    overwrite: bool = False
    """Replace the set that is there."""

    def original(self) -> originals.Original:
        """The set to write."""
        return originals.fashion_mnist(self.source)


@dataclasses.dataclass(frozen=True)
class Imagenet2012:
    """ImageNet (ILSVRC 2012): 1,331,167 photographs, 155 GB.

    Reads the two archives that image-net.org hands out after registration, copies every
    JPEG byte for byte and re-encodes the 23 that are not RGB or grey JPEGs.
    """

    source: Path
    """Directory with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar."""
    data_path: Path = dataclasses.field(default_factory=default_data_path)
    """Directory of data sets to write into; needs as much room as the archives."""
    overwrite: bool = False
    """Replace the set that is there."""

    def original(self) -> originals.Original:
        """The set to write."""
        return originals.imagenet2012(self.source)


Command = (
    Annotated[Digits, tyro.conf.subcommand("digits")]
    | Annotated[FashionMnist, tyro.conf.subcommand("fashion_mnist")]
    | Annotated[Imagenet2012, tyro.conf.subcommand("imagenet2012")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
      arguments: What follows `python -m experiments.prepare`; None: of this process.

    Raises:
      SystemExit: Status 1 with a message on standard error when the set cannot be made.
    """
    command = tyro.cli(
        Command,
        args=arguments,
        prog="python -m experiments.prepare",
        description=__doc__,
    )
    try:
        original = command.original()
        folder, counts = write_set(
            original, command.data_path.expanduser(), overwrite=command.overwrite
        )
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was left behind")
    images = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{original.name}: {images} images")
    following = "python -m experiments.imagenet"
    if command.data_path != BUNDLED:
        sets = {preset: p.options.data.dataset for preset, p in PRESETS.items()}
        preset = next(preset for preset in sets if sets[preset] == original.name)
        following += f" {preset} --data-path {shlex.quote(str(command.data_path))}"
    print(f"{folder} is ready; next: {following}")


if __name__ == "__main__":
    main()

"""Data sets written from fake originals, read back, interrupted and refused."""

import collections
import errno
import gzip
import io
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import originals, prepare, write
from experiments.data import DataError, load
from experiments.sources import BUNDLED, Records
from nmjax.training import run_folder

REPOSITORY = Path(__file__).parents[2]
FILES = {
    "train-images-idx3-ubyte": 20,
    "train-labels-idx1-ubyte": 20,
    "t10k-images-idx3-ubyte": 8,
    "t10k-labels-idx1-ubyte": 8,
}


def contents(folder):
    """Every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def idx(array):
    """An idx file, from its definition."""
    header = bytes([0, 0, 8, array.ndim])
    for size in array.shape:
        header += size.to_bytes(4, "big")
    return header + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A directory with four small idx files, two of them gzipped."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in FILES.items():
        if "images" in name:
            array = rng.integers(0, 256, (count, 28, 28), np.uint8)
            (folder / name).write_bytes(idx(array))
        else:
            array = np.arange(count, dtype=np.uint8) % 10
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return folder


def run(*arguments):
    prepare.main([str(argument) for argument in arguments])


# --- digits


def test_digits_are_written_byte_for_byte_the_same(tmp_path, capsys):
    pytest.importorskip("sklearn")
    for name in ("one", "two"):
        run("digits", "--data-path", tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4
    # The bundled files could differ in compression, by the version of array_record.
    for split in ("train", "test"):
        fresh = Records(tmp_path / "one" / "digits" / "1.0.0", "digits", split, "")
        bundled = Records(BUNDLED / "digits" / "1.0.0", "digits", split, "")
        assert list(fresh) == list(bundled)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"{tmp_path}/two/digits/1.0.0 is ready; next: python -m experiments.imagenet "
        f"digits-resnet8-2to4 --data-path {tmp_path}/two"
    )


def test_digits_without_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="error: .* pip install scikit-learn"):
        run("digits", "--data-path", tmp_path)


def test_the_bundled_set_is_small_and_has_its_licence():
    files = contents(BUNDLED)
    assert sum(map(len, files.values())) < 1_000_000
    licence = files[Path("digits/LICENSE.txt")].decode()
    for words in ("Alpaydin", "10.24432/C50P49", "Attribution 4.0", "scikit-learn"):
        assert words in licence


# --- Fashion-MNIST


def test_fashion_mnist_is_read_back(fashion, tmp_path, capsys):
    out = tmp_path / "with space"
    run("fashion_mnist", "--source", fashion, "--data-path", out)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "fashion_mnist: 20 train, 8 test images",
        f"{out}/fashion_mnist/1.0.0 is ready; next: python -m experiments.imagenet "
        f"fashion-resnet8-2to4 --data-path '{out}'",
    ]
    assert "images/s" in captured.err  # the progress bar
    data = load("fashion_mnist", out)
    assert (data.num_train, data.num_test, data.num_classes) == (20, 8, 10)
    assert data.image_shape == (28, 28, 1)
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    raw = (fashion / "train-images-idx3-ubyte").read_bytes()
    assert data.train.images.tobytes() == raw[16:]
    assert not list(out.rglob(".*"))


def test_tfds_itself_reads_what_is_written(fashion, tmp_path):
    import tensorflow_datasets as tfds

    original = originals.fashion_mnist(fashion)
    folder, counts = write.write_set(original, tmp_path / "out", progress=False)
    assert counts == {"train": 20, "test": 8}
    builder = tfds.builder_from_directory(folder)
    assert builder.info.features["label"].names[9] == "Ankle boot"
    source = builder.as_data_source("train")
    assert len(source) == 20
    assert source[3]["label"] == 3
    raw = (fashion / "train-images-idx3-ubyte").read_bytes()
    assert source[3]["image"].tobytes() == raw[16 + 3 * 784 : 16 + 4 * 784]


def test_a_set_that_tfds_wrote_as_png_is_read_too(fashion, tmp_path):
    import dataclasses

    import tensorflow_datasets as tfds

    original = originals.fashion_mnist(fashion)

    def as_images(examples):
        for example in examples.read():
            image = Image.fromarray(example["image"][..., 0])
            yield example | {"image": image}

    png = dataclasses.replace(
        original,
        features={
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        },
        splits={
            name: originals.Examples(split.count, lambda split=split: as_images(split))
            for name, split in original.splits.items()
        },
    )
    write.write_set(png, tmp_path / "png", progress=False)
    write.write_set(original, tmp_path / "raw", progress=False)
    one = load("fashion_mnist", tmp_path / "png")
    other = load("fashion_mnist", tmp_path / "raw")
    np.testing.assert_array_equal(one.train.images, other.train.images)
    np.testing.assert_array_equal(one.test.labels, other.test.labels)


def test_large_sets_are_split_into_files(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 5 * 800)
    original = originals.fashion_mnist(fashion)
    folder, _ = write.write_set(original, tmp_path / "out", progress=False)
    names = sorted(path.name for path in folder.glob("*train*"))
    assert names == [
        f"fashion_mnist-train.array_record-{i:05}-of-00004" for i in range(4)
    ]
    data = load("fashion_mnist", tmp_path / "out")
    raw = (fashion / "train-images-idx3-ubyte").read_bytes()
    assert data.train.images.tobytes() == raw[16:]
    records = Records(folder, "fashion_mnist", "train", "")
    assert records.where(0) == f"record 0 of {folder / names[0]}"
    assert records.where(12) == f"record 2 of {folder / names[2]}"


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def relabel(path):
    path.write_bytes(gzip.compress(idx(np.full(20, 10, np.uint8))))


def shorten(path):
    path.write_bytes(gzip.compress(idx(np.zeros(19, np.uint8))))


def swap(path):
    path.write_bytes(gzip.compress(idx(np.zeros((20, 28, 28), np.uint8))))


def resize(path):
    path.write_bytes(idx(np.zeros((20, 20, 20), np.uint8)))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte", Path.unlink, r"\[.gz\] is missing; Debian"),
        (
            "train-images-idx3-ubyte",
            cut,
            "holds 15673 values, its header promises 15680",
        ),
        ("train-images-idx3-ubyte", lengthen, "holds 15681 values"),
        ("train-images-idx3-ubyte", lambda p: p.write_bytes(b"\0\0"), "only 2 bytes"),
        ("train-images-idx3-ubyte", resize, "20x20 pixels, those of Fashion-MNIST 28"),
        ("train-labels-idx1-ubyte.gz", cut, "cannot be unpacked"),
        (
            "train-labels-idx1-ubyte.gz",
            lambda p: p.write_bytes(b"zip"),
            "cannot be unp",
        ),
        ("train-labels-idx1-ubyte.gz", swap, "magic number 0x00000803; .* 0x00000801"),
        ("train-labels-idx1-ubyte.gz", shorten, "19 labels for 20 images"),
        ("train-labels-idx1-ubyte.gz", relabel, "labels are not 0..9"),
    ],
)
def test_damaged_idx_files_are_named(fashion, tmp_path, name, damage, message):
    damage(fashion / name)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as caught:
        run("fashion_mnist", "--source", fashion, "--data-path", tmp_path / "out")
    stem = name.removesuffix(".gz") if damage is not resize else str(fashion)
    assert stem in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- the place, and stops half-way


@pytest.fixture
def original(fashion):
    return originals.fashion_mnist(fashion)


def stops_after(original, count, error):
    """The original, whose reading ends with an error."""

    def read():
        yield from itertools.islice(original.splits["test"].read(), count)
        raise error

    splits = original.splits | {"test": originals.Examples(8, read)}
    return original.__class__(**vars(original) | {"splits": splits})


def test_a_place_below_a_file_is_refused_before_any_work(original, tmp_path):
    (tmp_path / "file").write_text("")
    stopped = stops_after(original, 0, AssertionError("work was done"))
    with pytest.raises(DataError, match=f"{tmp_path}/file is a file, not a directory"):
        write.write_set(stopped, tmp_path / "file" / "below", progress=False)


def test_an_existing_set_is_kept_unless_told(original, tmp_path):
    write.write_set(original, tmp_path / "out", progress=False)
    before = contents(tmp_path / "out")
    stopped = stops_after(original, 3, DataError("damaged"))
    with pytest.raises(DataError, match="exists; give --overwrite"):
        write.write_set(original, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="damaged"):
        write.write_set(stopped, tmp_path / "out", overwrite=True, progress=False)
    assert contents(tmp_path / "out") == before
    write.write_set(original, tmp_path / "out", overwrite=True, progress=False)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (OSError(errno.ENOSPC, "No space left on device"), DataError, "No space left"),
        (DataError("image 3 is damaged"), DataError, "image 3 is damaged"),
    ],
)
def test_a_stop_leaves_nothing(original, tmp_path, error, raised, message):
    with pytest.raises(raised, match=message):
        write.write_set(
            stops_after(original, 3, error), tmp_path / "out", progress=False
        )
    assert not contents(tmp_path / "out")


def test_what_a_killed_run_left_is_removed(original, tmp_path):
    left = tmp_path / "out" / "fashion_mnist" / ".1.0.0.partial"
    left.mkdir(parents=True)
    (left / "train.0").write_bytes(b"half")
    write.write_set(original, tmp_path / "out", progress=False)
    assert not left.exists()
    assert load("fashion_mnist", tmp_path / "out").num_train == 20


def test_too_small_a_disk_is_seen_before_any_work(original, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 20_000))
    stopped = stops_after(original, 0, AssertionError("work was done"))
    with pytest.raises(DataError, match=r"needs about 0.\d MB in .* 0.0 MB are free"):
        write.write_set(stopped, tmp_path / "out", progress=False)


def test_a_disk_that_fills_up_leaves_nothing(fashion, tmp_path):
    # The kernel refuses to let any file of the child grow over 20 kB. The child sets
    # the limit itself: a function run between fork and exec makes jax warn.
    limited = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "-m", "experiments.prepare", "fashion_mnist"]
        + ["--source", str(fashion), "--data-path", str(tmp_path / "out")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "error: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not contents(tmp_path / "out")


def test_a_place_without_permission_is_refused(original, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may always write
    with pytest.raises(DataError, match=f"no permission in {tmp_path}"):
        write.write_set(original, tmp_path / "out", progress=False)


# --- ImageNet


def jpeg(mode="RGB", colour=128, form="JPEG", size=(30, 20)):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form)
    return file.getvalue()


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def second_header(archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        return members.getmembers()[1].offset


def with_a_flipped_header(archive):
    place = second_header(archive) + 3
    return archive[:place] + bytes([archive[place] ^ 1]) + archive[place + 1 :]


def cut_before_a_header(archive):
    return archive[: second_header(archive)]


TRAIN = {
    "n01440764": {  # label 0
        "n01440764_1.JPEG": jpeg(colour=(200, 0, 0)),
        "n01440764_2.JPEG": jpeg("CMYK", colour=(0, 255, 255, 0)),
        "n01440764_3.JPEG": jpeg(colour=(200, 0, 0), form="PNG"),
    },
    "n01443537": {"n01443537_1.JPEG": jpeg("L", colour=90)},  # label 1
}
VALIDATION = {  # labels 490 and 361, by number and not by place in the archive
    "ILSVRC2012_val_00000002.JPEG": jpeg(colour=(0, 100, 0)),
    "ILSVRC2012_val_00000001.JPEG": jpeg(colour=(0, 200, 0)),
}


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    classes = {f"{name}.tar": tar(images) for name, images in TRAIN.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(VALIDATION))
    return folder


def test_imagenet_from_its_archives(tars, tmp_path, capsys, caplog):
    run("imagenet2012", "--source", tars, "--data-path", tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[0] == (
        "imagenet2012: 4 train, 2 validation images"
    )
    assert "has 1,281,167 images, here are 4" in caplog.text
    folder = tmp_path / "out" / "imagenet2012" / "5.1.0"
    records = list(Records(folder, "imagenet2012", "train", ""))
    assert [label for _, label in records] == [0, 0, 0, 1]
    plain = [*TRAIN["n01440764"].values(), *TRAIN["n01443537"].values()]
    assert records[0][0] == plain[0]
    assert records[3][0] == plain[3]
    for payload, _ in records[1:3]:  # the CMYK and the PNG image became RGB JPEGs
        with Image.open(io.BytesIO(payload)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            red, green, blue = image.getpixel((5, 5))
        assert red > 190 and green < 10 and blue < 10

    labels = [label for _, label in Records(folder, "imagenet2012", "validation", "")]
    import tensorflow_datasets as tfds

    lists = tfds.core.tfds_path("datasets/imagenet2012")
    classes = (lists / "labels.txt").read_text().split()
    truth = (lists / "validation_labels.txt").read_text().split()
    assert [classes[label] for label in labels] == [truth[1], truth[0]]

    data = load("imagenet2012", tmp_path / "out")
    assert (data.num_train, data.num_test, data.num_classes) == (4, 2, 1000)
    assert (data.image_shape, data.stem) == ((224, 224, 3), "imagenet")
    batch = next(data.train_batches(4, seed=0))
    assert batch["image"].shape == (4, 224, 224, 3)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        pixel = image[100, 100] * [58.395, 57.12, 57.375] + [123.675, 116.28, 103.53]
        expected = [90, 90, 90] if label else [200, 0, 0]
        assert np.abs(pixel - expected).max() < 60  # CMYK red is (255, 0, 0)
    batch = next(data.test_batches(3))
    assert batch["valid"].tolist() == [1, 1, 0]


def test_imagenet_names_all_missing_archives(tmp_path):
    with pytest.raises(SystemExit, match="train.tar, .*val.tar; register at https"):
        run("imagenet2012", "--source", tmp_path, "--data-path", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        (
            "train",
            tar({"cats.tar": tar(VALIDATION)}),
            "train.tar: cats.tar is not an ImageNet class's archive",
        ),
        (
            "train",
            tar({"n01440764.tar": tar({"a.JPEG": b"not an image"})}),
            "train.tar: n01440764.tar: a.JPEG is not a readable image",
        ),
        ("train", tar({"n01440764.tar": b"no tar" * 200}), "n01440764.tar is damaged"),
        ("val", tar(VALIDATION)[:1500], "val.tar is damaged"),
        ("val", b"no tar" * 200, "val.tar is damaged"),
        # tarfile takes both for the end: what follows would be missing.
        ("val", with_a_flipped_header(tar(VALIDATION)), "val.tar is damaged .* no end"),
        ("val", cut_before_a_header(tar(VALIDATION)), "val.tar is damaged .* no end"),
        ("val", tar({"cat.JPEG": jpeg()}), "cat.JPEG is not a validation image's name"),
        ("val", tar({"ILSVRC2012_val_00050001.JPEG": jpeg()}), "is not a validation"),
        ("val", tar({}), "there are no images for the split 'validation'"),
    ],
)
def test_damaged_archives_are_named(tars, tmp_path, file, data, message):
    (tars / f"ILSVRC2012_img_{file}.tar").write_bytes(data)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run("imagenet2012", "--source", tars, "--data-path", tmp_path / "out")
    assert not contents(tmp_path / "out")


def test_two_processes_do_not_write_one_set(fashion, tmp_path):
    arguments = ("fashion_mnist", "--source", fashion, "--data-path", tmp_path)
    partial = tmp_path / "fashion_mnist" / ".1.0.0.partial"
    partial.mkdir(parents=True)
    (partial / "left").write_text("by a process that was killed")
    with write._locked(partial):
        with pytest.raises(SystemExit, match="another process writes in"):
            run(*arguments)
        assert (partial / "left").exists()
    run(*arguments)
    assert not partial.exists()
    assert "left" not in str(contents(tmp_path))


def test_a_set_that_another_process_finishes_meanwhile(fashion, tmp_path, monkeypatch):
    partial = tmp_path / "fashion_mnist" / ".1.0.0.partial"

    def flock(descriptor, operation):  # granted when the other is done
        (partial / "its files").write_text("")
        partial.rename(partial.with_name("1.0.0"))

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with pytest.raises(SystemExit, match="another process writes in"):
        run("fashion_mnist", "--source", fashion, "--data-path", tmp_path)
    assert list((tmp_path / "fashion_mnist").rglob("its files"))


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--help"],
            ["digits", "fashion_mnist", "imagenet2012", "Nothing is downloaded"],
        ),
        (["fashion_mnist", "--help"], ["--source PATH", "--data-path PATH", "idx"]),
        (["imagenet2012", "--help"], ["ILSVRC2012_img_train.tar", "155 GB"]),
    ],
)
def test_help_teaches(arguments, words, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(*arguments)
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("cifar10")
    assert "digits" in capsys.readouterr().err

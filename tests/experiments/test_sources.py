"""Damaged, incomplete and foreign record files: each error names the file."""

import json
import shutil

import numpy as np
import pytest

from experiments.data import DataError, load
from experiments.sources import BUNDLED, Records

TRAIN = "digits-train.array_record-00000-of-00001"
REMEDY = "make the set again with: python -m experiments.prepare digits"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled digits that a test may damage."""
    return shutil.copytree(BUNDLED / "digits" / "1.0.0", tmp_path / "digits" / "1.0.0")


def refuses(folder, *messages):
    with pytest.raises(DataError) as caught:
        load("digits", folder.parents[1])
    for message in (*messages, REMEDY, str(folder.parents[1])):
        assert message in str(caught.value)


def flip(path, position, count=1):
    contents = bytearray(path.read_bytes())
    for place in range(position, position + count):
        contents[place] ^= 0xFF
    path.write_bytes(contents)


def edit(path, change):
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("size", [0, 100, 70_000, 262_144, 327_000])
def test_a_file_cut_short(folder, size):
    with open(folder / TRAIN, "r+b") as file:
        file.truncate(size)
    refuses(folder, str(folder / TRAIN), "is damaged")


@pytest.mark.parametrize("position", [70_000, 140_000, 200_000])
def test_a_flipped_byte_names_the_record(folder, position):
    records = Records(folder, "digits", "train", "")
    before = list(records)
    flip(folder / TRAIN, position)
    damaged = Records(folder, "digits", "train", "")
    for record in range(len(damaged)):  # the oracle: read every record by itself
        try:
            assert damaged[record] == before[record]
        except DataError:
            break
    else:
        raise AssertionError("the byte is in no record")
    refuses(folder, f"record {record} of {folder / TRAIN} is damaged", "hash mismatch")


def test_a_lost_index(folder):
    size = (folder / TRAIN).stat().st_size
    flip(folder / TRAIN, size - 65536, 200)
    refuses(folder, str(folder / TRAIN), "is damaged")


def test_a_missing_file(folder):
    (folder / TRAIN).unlink()
    refuses(folder, f"{folder / TRAIN} is missing")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_unreadable_metadata(folder, name):
    (folder / name).write_text('{"cut sh')
    refuses(folder, f"{folder}: dataset_info.json or features.json cannot be read")


def test_another_count_than_promised(folder):
    def claim(info):
        info["splits"][0]["shardLengths"] = ["1438"]

    edit(folder / "dataset_info.json", claim)
    refuses(folder, "holds 1437 records, but dataset_info.json promises 1438")


def test_a_missing_split(folder):
    edit(folder / "dataset_info.json", lambda info: info["splits"].pop())
    refuses(folder, "has no split 'test', only ['train']")


def test_another_file_format(folder):
    def tfrecord(info):
        info["fileFormat"] = "tfrecord"

    edit(folder / "dataset_info.json", tfrecord)
    refuses(folder, "holds tfrecord files, not array_record")


def test_a_label_out_of_range_names_the_record(folder):
    def halve(features):
        label = features["featuresDict"]["features"]["label"]
        label["classLabel"]["numClasses"] = "5"

    edit(folder / "features.json", halve)
    first = int(np.argmax(load("digits").train.labels >= 5))
    wrong = load("digits").train.labels[first]
    message = f"record {first} of {folder / TRAIN} has label {wrong}, outside 0..4"
    with pytest.raises(DataError, match=message):
        list(Records(folder, "digits", "train", REMEDY))
    with pytest.raises(DataError, match="has 10 classes, but this set declares 5"):
        load("digits", folder.parents[1])


def test_images_of_another_shape(folder):
    def widen(features):
        shape = features["featuresDict"]["features"]["image"]["tensor"]["shape"]
        shape["dimensions"] = ["8", "9", "1"]

    edit(folder / "features.json", widen)
    refuses(folder, "record 0 of", "64 bytes are not (8, 9, 1) pixels")


def test_the_newest_version_is_read(folder):
    newer = shutil.copytree(folder, folder.with_name("1.10.0"))
    shutil.copytree(folder, folder.with_name("1.9.0"))
    shutil.copytree(folder, folder.with_name(".2.0.0.partial"))
    (newer / TRAIN).unlink()
    with pytest.raises(DataError, match=f"{newer / TRAIN} is missing"):
        load("digits", folder.parents[1])


def test_the_folder_of_a_version_may_be_given(folder):
    assert load("digits", folder).num_train == 1437
    (folder / TRAIN).unlink()
    refuses(folder, "is missing")  # and the remedy has the directory of data sets

"""Order, resume, sharding and padding of batches; what `load` gives and refuses."""

import collections
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.data import Data, DataError, load
from experiments.sources import BUNDLED, Folder, decode_image

REPOSITORY = Path(__file__).parents[2]

# Orders of ten records in the first two epochs, and the bits of three records.
ORDER_OF_SEED_7 = [[6, 3, 4, 9, 0, 2, 8, 7, 5, 1], [1, 3, 2, 7, 8, 4, 5, 9, 0, 6]]
BITS_OF_SEED_7 = {
    0: 4154339397315733314,
    1: 5537090637313560901,
    2: 16114216841932056372,
}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A split whose images are the record numbers: shows order and draws."""

    size: int
    image_shape = (1, 1, 1)
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

    def __len__(self):
        return self.size

    def gather(self, records, draws):
        zero = np.zeros(len(records), np.uint64)
        return {"image": np.array(records), "draw": zero if draws is None else draws}


def numbers(train, test=1, augment="none"):
    return Data("numbers", 10, Numbers(train), Numbers(test), augment)


def take(batches, count, key="image"):
    return np.stack([next(batches)[key] for _ in range(count)])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


# --- the bundled set


def test_digits_is_what_the_contract_says():
    data = load("digits")
    assert data.name == "digits"
    assert data.num_classes == 10
    assert data.image_shape == (8, 8, 1)
    assert (data.num_train, data.num_test) == (1437, 360)
    assert data.stem == "small"
    batch = next(data.train_batches(64, seed=0))
    assert batch["image"].shape == (64, 8, 8, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (64,)
    assert batch["label"].dtype == np.int32


def test_digits_is_normalised_by_the_training_split():
    data = load("digits")
    batches = list(data.test_batches(360))
    assert len(batches) == 1
    pixels = data.train.images
    assert pixels.min() == 0
    assert pixels.max() == 16
    expected = (data.test.images - np.float32(4.886)) / np.float32(6.014)
    np.testing.assert_allclose(batches[0]["image"], expected, rtol=1e-6)
    assert pixels.mean() == pytest.approx(4.886, abs=5e-4)
    assert pixels.std() == pytest.approx(6.014, abs=5e-4)


def test_digits_holds_every_digit_of_scikit_learn_once():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(1797)
    data = load("digits")
    np.testing.assert_array_equal(data.train.labels, labels[order[:1437]])
    np.testing.assert_array_equal(data.test.labels, labels[order[1437:]])
    both = np.concatenate([data.train.images, data.test.images])
    np.testing.assert_array_equal(both.reshape(1797, 64), images[order])


@pytest.mark.slow
def test_reading_imports_no_other_framework():
    program = (
        "import sys\n"
        "from experiments.data import load\n"
        "data = load('digits')\n"
        "next(data.train_batches(8, seed=0)), list(data.test_batches(100))\n"
        "found = {'tensorflow', 'torch', 'sklearn', 'cv2'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=REPOSITORY, check=True
    )


def test_digits_can_be_enlarged():
    data = load("digits", image_size=80)
    assert data.image_shape == (80, 80, 1)
    assert data.stem == "imagenet"
    small = load("digits").test.images[0, :, :, 0]
    large = Image.fromarray(small).resize((80, 80), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.test.images[0, :, :, 0], np.asarray(large))


# --- order


@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 8),
    hosts=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_visits_no_record_twice_and_hosts_share_it(
    size, batch_size, hosts, seed
):
    data = numbers(size)
    everyone = batch_size * hosts
    if everyone > size:
        with pytest.raises(DataError, match=f"has only {size}"):
            data.train_batches(batch_size, seed=seed, num_hosts=hosts)
        return
    steps = size // everyone
    whole = take(data.train_batches(everyone, seed=seed), 2 * steps)
    for epoch in (whole[:steps], whole[steps:]):
        assert len(np.unique(epoch)) == steps * everyone
        assert set(epoch.ravel()) <= set(range(size))
    for host in range(hosts):
        batches = data.train_batches(batch_size, seed=seed, num_hosts=hosts, host=host)
        np.testing.assert_array_equal(take(batches, 2 * steps), whole[:, host::hosts])


def test_every_epoch_and_seed_has_its_own_order():
    data = numbers(100)
    orders = [
        tuple(take(data.train_batches(100, seed=seed), 3)[epoch])
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9
    assert orders[:3] == [
        tuple(row) for row in take(data.train_batches(100, seed=0), 3)
    ]


def test_the_remainder_that_is_dropped_varies():
    seen = take(numbers(10).train_batches(8, seed=0), 20)
    assert set(seen.ravel()) == set(range(10))


def test_the_order_never_changes_with_versions():
    # A run resumed years later, on another NumPy, must see the records it has not seen.
    order = take(numbers(10).train_batches(10, seed=7), 2)
    assert order.tolist() == ORDER_OF_SEED_7
    draws = take(numbers(3, augment="shift").train_batches(3, seed=7), 1, "draw")
    order = take(numbers(3, augment="shift").train_batches(3, seed=7), 1)
    assert (
        dict(zip(order[0].tolist(), draws[0].tolist(), strict=True)) == BITS_OF_SEED_7
    )


@given(batch_size=st.sampled_from([1, 2, 4, 8]), hosts=st.sampled_from([1, 2, 3]))
def test_random_bits_belong_to_seed_epoch_and_record(batch_size, hosts):
    data = numbers(24, augment="shift")
    found = collections.defaultdict(set)
    for size, count in ((24, 1), (batch_size, hosts)):
        steps = 24 // (size * count)
        for host in range(count):
            batches = data.train_batches(size, seed=3, num_hosts=count, host=host)
            for step in range(2 * steps):
                batch = next(batches)
                for record, draw in zip(batch["image"], batch["draw"], strict=True):
                    found[int(record), step // steps].add(int(draw))
    assert all(len(draws) == 1 for draws in found.values())
    assert len(set.union(*found.values())) == len(found) == 48


# --- resume


@pytest.mark.parametrize("done", [0, 1, 5, 22, 23, 50])
def test_digits_resume_at_the_exact_next_batch(done):
    data = load("digits", augment="shift")
    batches = data.train_batches(64, seed=1)  # 22 steps an epoch
    take(batches, done) if done else None
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    resumed = data.train_batches(64, seed=1)
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        assert_equal(next(resumed), batch)


def test_a_run_may_go_on_with_another_number_of_hosts():
    data = numbers(100)
    one = data.train_batches(8, seed=0)
    take(one, 17)
    state, expected = one.get_state(), take(one, 5)
    shares = []
    for host in range(4):
        batches = data.train_batches(2, seed=0, num_hosts=4, host=host)
        batches.set_state(state)
        shares.append(take(batches, 5))
    np.testing.assert_array_equal(np.stack(shares, axis=2).reshape(5, 8), expected)


def test_orbax_saves_the_position(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    data = load("digits")
    batches = data.train_batches(64, seed=0)
    take(batches, 30)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = grain.checkpoint.CheckpointSave(batches)
        manager.save(30, args=ocp.args.Composite(data=save))
    expected = next(batches)
    resumed = data.train_batches(64, seed=0)
    with ocp.CheckpointManager(tmp_path) as manager:
        restore = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(30, args=ocp.args.Composite(data=restore))
    assert_equal(next(resumed), expected)


# --- test batches


@given(size=st.integers(1, 40), batch_size=st.integers(1, 12), hosts=st.integers(1, 4))
def test_test_batches_give_every_record_once(size, batch_size, hosts):
    data = numbers(1, size)
    seen, counts = [], set()
    for host in range(hosts):
        batches = list(data.test_batches(batch_size, num_hosts=hosts, host=host))
        counts.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == batch["valid"].shape == (batch_size,)
            assert batch["valid"].dtype == np.float32
            valid = batch["valid"] == 1
            assert not batch["image"][~valid].any()
            seen += batch["image"][valid].tolist()
    assert sorted(seen) == list(range(size))
    assert counts == {-(-size // (batch_size * hosts))}


def test_digits_test_batches_are_padded():
    data = load("digits")
    batches = list(data.test_batches(256))
    assert [int(batch["valid"].sum()) for batch in batches] == [256, 104]
    last = batches[1]
    assert last["image"].shape == (256, 8, 8, 1)
    assert not last["image"][104:].any()
    assert not last["label"][104:].any()
    labels = np.concatenate([batch["label"] for batch in batches])[:360]
    np.testing.assert_array_equal(labels, data.test.labels)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "no data set 'mnist'; there are digits, fashion_mnist"),
        (("digits", "/nowhere"), "experiments.prepare digits --data-path /nowhere"),
        (
            ("fashion_mnist", "/no where"),
            "fashion_mnist --source DIR_WITH_IDX_FILES --data-path '/no where'",
        ),
        (("imagenet2012", "/nowhere"), "imagenet2012 --source DIR_WITH_TARS"),
        (("image_folder",), "needs data_path=DIR"),
        (("image_folder", "/nowhere"), "/nowhere/train is not a directory"),
    ],
)
def test_load_says_what_is_missing_and_how_to_make_it(arguments, message):
    with pytest.raises(DataError, match=message):
        load(*arguments)


def test_the_default_place_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=f"fashion_mnist is not in {tmp_path}"):
        load("fashion_mnist")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "crop_flip"}, "takes none or shift"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_load_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(DataError, match=message):
        load("digits", **options)


def test_another_set_in_the_place_is_refused():
    with pytest.raises(DataError, match="holds the set 'digits', not 'fashion_mnist'"):
        load("fashion_mnist", BUNDLED / "digits" / "1.0.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 1438}, "has only 1437 for training: choose at most 1437"),
        ({"batch_size": 500, "num_hosts": 3}, "choose at most 479"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8, "seed": -1}, "seed=-1"),
        ({"batch_size": 8, "num_hosts": 2, "host": 2}, "host=2 of num_hosts=2"),
        ({"batch_size": 8, "num_hosts": 0}, "num_hosts=0"),
    ],
)
def test_batches_refuse_what_cannot_be(arguments, message):
    data = load("digits")
    with pytest.raises(DataError, match=message):
        data.train_batches(**{"seed": 0} | arguments)
    if "seed" not in arguments and "only" not in message and "most" not in message:
        with pytest.raises(DataError, match=message):
            data.test_batches(**arguments)


# --- folders of images


def make_folder(root, classes=("ant", "bee"), count=5, test="val"):
    """Photographs in the class's colour, each a little brighter than the last."""
    for split, images in (("train", count), (test, 3)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                colour = [0, 0, 0]
                colour[label] = 100 + 10 * number
                image = Image.new("RGB", (40 + number, 30), tuple(colour))
                image.save(root / split / name / f"{number}.PNG")
    return root


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_of_images(tmp_path, test):
    make_folder(tmp_path, test=test)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "._0.PNG").write_text("of macOS")
    (tmp_path / "train" / ".thumbnails").mkdir()
    data = load("image_folder", tmp_path, image_size=16)
    assert (data.num_train, data.num_test, data.num_classes) == (10, 6, 2)
    assert data.image_shape == (16, 16, 3)
    batch = next(data.test_batches(8))
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert batch["valid"].tolist() == [1] * 6 + [0] * 2
    mean, std = (
        np.float32([123.675, 116.28, 103.53]),
        np.float32([58.395, 57.12, 57.375]),
    )
    np.testing.assert_allclose(
        batch["image"][4],
        np.broadcast_to(([0, 110, 0] - mean) / std, (16, 16, 3)),
        rtol=1e-6,
    )


def test_a_folder_resumes_with_the_same_crops(tmp_path):
    data = load("image_folder", make_folder(tmp_path), image_size=16)
    batches = data.train_batches(3, seed=0)
    take(batches, 4)
    state, expected = batches.get_state(), [next(batches) for _ in range(3)]
    resumed = data.train_batches(3, seed=0)
    resumed.set_state(state)
    for batch in expected:
        assert_equal(next(resumed), batch)


def test_a_folder_without_augmentation_trains_on_the_centre_crop(tmp_path):
    data = load("image_folder", make_folder(tmp_path), image_size=16, augment="none")
    train = next(data.train_batches(10, seed=0))
    order = take(numbers(10).train_batches(10, seed=0), 1)[0]
    np.testing.assert_array_equal(train["label"], order // 5)
    images = data.train.gather(np.arange(10), None)["image"]
    np.testing.assert_array_equal(train["image"], images[order])


def test_a_folder_whose_classes_differ_is_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    with pytest.raises(DataError, match=r"train: \['bee'\]; only in .*val: \['wasp'\]"):
        load("image_folder", tmp_path)


def test_a_folder_with_an_empty_class_is_refused(tmp_path):
    make_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir()
    with pytest.raises(DataError, match="train/cat holds no image"):
        load("image_folder", tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path):
    make_folder(tmp_path, classes=())
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="no class directories"):
        load("image_folder", tmp_path)


@pytest.mark.parametrize("contents", [b"", b"not an image", "cut"])
def test_an_unreadable_image_is_named(tmp_path, contents):
    make_folder(tmp_path)
    path = tmp_path / "val" / "bee" / "1.PNG"
    path.write_bytes(path.read_bytes()[:60] if contents == "cut" else contents)
    data = load("image_folder", tmp_path, image_size=16)
    with pytest.raises(DataError, match="val/bee/1.PNG is not a readable image"):
        list(data.test_batches(4))


def test_an_image_of_16_bits_keeps_its_greys(tmp_path):
    """Pillow alone makes white of all that is above 255."""
    ramp = np.linspace(0, 65535, 1600).astype(np.uint16).reshape(40, 40)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    source = Folder(make_folder(tmp_path) / "train", ["ant", "bee"])
    image = decode_image(source, 0, file.getvalue(), "RGB")
    np.testing.assert_array_equal(np.asarray(image)[..., 1], ramp // 256)
    Image.fromarray(ramp.astype(np.float32)).save(file := io.BytesIO(), "TIFF")
    with pytest.raises(DataError, match="0.PNG is not .* mode F have no known range"):
        decode_image(source, 0, file.getvalue(), "RGB")


def test_an_image_that_vanished_is_named(tmp_path):
    data = load("image_folder", make_folder(tmp_path), image_size=16)
    (tmp_path / "val" / "ant" / "0.PNG").unlink()
    with pytest.raises(DataError, match="val/ant/0.PNG cannot be read"):
        next(data.test_batches(4))

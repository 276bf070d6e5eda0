"""Folds and subsets: what they hold, and that they never change."""

import zlib

import numpy as np
import pytest

from experiments import resampling
from experiments.data import DataError, load
from tests.experiments.test_data import numbers


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def images(split):
    return sorted(image.tobytes() for image in split.images)


def test_folds_part_all_records_class_by_class(digits):
    folds = [resampling.fold(digits, i, of=5) for i in range(5)]
    everything = images(digits.train.join(digits.test))
    assert [data.num_test for data in folds] == [360, 360, 359, 359, 359]
    assert sorted(sum((images(data.test) for data in folds), [])) == everything
    for data in folds:
        assert sorted(images(data.train) + images(data.test)) == everything
        counts = np.bincount(data.test.labels)
        whole = np.bincount(np.concatenate([digits.train.labels, digits.test.labels]))
        assert np.all(np.abs(counts - whole / 5) < 1)
        batch = next(data.train_batches(8, seed=0))
        assert batch["image"].shape == (8, 8, 8, 1)


def test_a_subset_is_fixed_and_the_rest_may_validate(digits):
    data = resampling.subset(digits, 1000)
    assert data.num_train == 1000
    assert data.test is digits.test
    tuned = resampling.subset(digits, 1000, validate=True)
    np.testing.assert_array_equal(tuned.train.images, data.train.images)
    assert images(tuned.train) + images(tuned.test) != images(digits.train)
    assert sorted(images(tuned.train) + images(tuned.test)) == images(digits.train)


def test_what_is_drawn_stays_the_same(digits):
    """Committed results hold for these images alone."""
    labels = resampling.fold(digits, 1, of=5).test.labels
    assert zlib.crc32(labels.astype("<i4").tobytes()) == 1842894498
    labels = resampling.subset(digits, 100).train.labels
    assert zlib.crc32(labels.astype("<i4").tobytes()) == 72617616


def test_the_sets_given_are_left_as_they_are(digits):
    before = digits.train.labels.copy()
    resampling.fold(digits, 0, of=3)
    resampling.subset(digits, 10)
    np.testing.assert_array_equal(digits.train.labels, before)


@pytest.mark.parametrize(("fold", "of"), [(0, 1), (2, 2), (-1, 5), (0, 2000)])
def test_folds_out_of_range(digits, fold, of):
    with pytest.raises(DataError, match=f"fold {fold} of {of}"):
        resampling.fold(digits, fold, of)


@pytest.mark.parametrize(
    ("size", "validate"), [(0, False), (1438, False), (1437, True)]
)
def test_subset_out_of_range(digits, size, validate):
    with pytest.raises(DataError, match=f"{size} training images of digits"):
        resampling.subset(digits, size, validate=validate)


def test_photographs_are_refused():
    with pytest.raises(DataError, match="held in memory"):
        resampling.subset(numbers(10), 3)

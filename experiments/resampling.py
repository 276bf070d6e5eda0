"""Cross-validation and fixed subsets of data sets that are held in memory.

What is drawn here is the same for every seed of a run and on every machine: a seed
changes the initial parameters and the order of the data, never which images there are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data import Data, DataError
from experiments.splits import ArraySplit


def fold(data: Data, fold: int, of: int) -> Data:
    """One split of a cross-validation over all records, the test set included.

    Args:
      data: A set that is held in memory.
      fold: Which part is the test set, 0..of-1; the others are for training.
      of: Number of parts; each holds its share of every class.

    Returns:
      The set, split anew.

    Raises:
      DataError: The set is not held in memory, or a number is out of range.
    """
    train, test = _in_memory(data, "cross-validation")
    if not 2 <= of <= len(train) + len(test) or not 0 <= fold < of:
        raise DataError(f"fold {fold} of {of}: folds are 2 or more, counted from 0")
    everything = train.join(test)
    order = _shuffled(len(everything))
    # By class, each in random order: dealt out, every part gets its share.
    order = order[np.argsort(everything.labels[order], kind="stable")]
    held_out = np.zeros(len(everything), bool)
    held_out[order[fold::of]] = True
    return dataclasses.replace(
        data,
        train=everything.take(np.flatnonzero(~held_out)),
        test=everything.take(np.flatnonzero(held_out)),
    )


def subset(data: Data, size: int, *, validate: bool = False) -> Data:
    """A random part of the training records.

    Args:
      data: A set that is held in memory.
      size: Number of training records.
      validate: Whether the training records that are left out take the place of the
        test set, as they should while hyperparameters are chosen.

    Returns:
      The set with fewer training records.

    Raises:
      DataError: The set is not held in memory, or `size` leaves nothing.
    """
    train, test = _in_memory(data, "a subset")
    most = len(train) - validate
    if not 1 <= size <= most:
        raise DataError(
            f"{size} training images of {data.name}: choose from 1 to {most}"
        )
    chosen = np.zeros(len(train), bool)
    chosen[_shuffled(len(train))[:size]] = True
    left_out = train.take(np.flatnonzero(~chosen))
    return dataclasses.replace(
        data,
        train=train.take(np.flatnonzero(chosen)),
        test=left_out if validate else test,
    )


def _shuffled(records: int) -> np.ndarray:
    """(records,) record numbers in a random order that is always the same."""
    # Sorted raw bits: NumPy promises that they never change.
    return np.argsort(np.random.PCG64(records).random_raw(records), kind="stable")


def _in_memory(data: Data, what: str) -> tuple[ArraySplit, ArraySplit]:
    train, test = data.train, data.test
    if isinstance(train, ArraySplit) and isinstance(test, ArraySplit):
        return train, test
    raise DataError(
        f"{what} of {data.name}: only for sets that are held in memory, digits and "
        "fashion_mnist"
    )

"""The order of outputs against counts by loops, and dgrad's mask in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.masks.output_order import mask_in_order, search_output_order


def kept(mask, order, n, m):
    """Σ min(n, kept of the group), group by group."""
    total = 0
    for row in np.asarray(mask):
        for start in range(0, len(order), m):
            total += min(n, sum(row[order[start : start + m]]))
    return total


search = jax.jit(search_output_order, static_argnames=("pattern", "candidates"))


def identity(outputs):
    return jnp.arange(outputs, dtype=jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_the_search_returns_the_best_of_what_it_tried(rng, pattern):
    n, m = map(int, pattern.split(":"))
    mask = np.asarray(nmjax.magnitude_mask(rng.normal(size=(16, 24)), pattern))
    start, keys = identity(24), jax.random.split(jax.random.key(3), 20)
    found = search(mask, pattern, start, jax.random.key(3), candidates=20)
    shuffle, tried = jax.jit(jax.random.permutation), [start]
    for key in keys:
        # Each shuffle is of the best order so far.
        best = max(tried, key=lambda order: kept(mask, order, n, m))
        tried.append(shuffle(key, best))
    scores = [kept(mask, order, n, m) for order in tried]
    assert kept(mask, found, n, m) == max(scores) > scores[0]
    assert sorted(found.tolist()) == list(range(24))
    assert found.dtype == jnp.int32


def test_an_order_that_none_betters_stays():
    """Outputs 0, 1 and 2, 3 of 8 rows: as they are, no group holds more than two."""
    mask = np.zeros((4, 8), bool)
    mask[:, [0, 1, 4, 5]] = True
    found = search(mask, "2:4", identity(8), jax.random.key(0))
    assert found.tolist() == list(range(8))


def test_the_best_order_of_few_outputs_is_found():
    """Outputs 0…3 are kept in both rows: 4 remain as stored, all 8 two by two."""
    mask = np.zeros((2, 8), bool)
    mask[:, :4] = True
    found = search(mask, "2:4", identity(8), jax.random.key(0))
    assert kept(mask, found, 2, 4) == 8
    assert kept(mask, np.arange(8), 2, 4) == 4


def test_dgrads_mask_keeps_the_largest_of_what_fprop_keeps(rng):
    w = rng.normal(size=(8, 12)).astype(np.float32)
    mask = np.asarray(nmjax.magnitude_mask(w, "2:4"))
    order = rng.permutation(12).astype(np.int32)
    own = np.asarray(mask_in_order(w, mask, "2:4", jnp.asarray(order)))
    for row in range(8):
        for start in range(0, 12, 4):
            group = order[start : start + 4]
            candidates = [j for j in group if mask[row, j]]
            largest = sorted(candidates, key=lambda j: -abs(w[row, j]))[:2]
            assert set(largest) == {j for j in group if own[row, j]}


def test_outputs_without_groups_are_refused():
    with pytest.raises(ValueError, match="6 outputs are not a multiple of m = 4"):
        search_output_order(
            np.ones((4, 6), bool), "2:4", identity(6), jax.random.key(0)
        )

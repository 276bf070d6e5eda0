"""The order of outputs against counts by loops, and dgrad's mask in it."""

import itertools

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


def identity(outputs):
    return jnp.arange(outputs, dtype=jnp.int32)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_the_search_returns_the_best_of_what_it_tried(rng, pattern):
    n, m = map(int, pattern.split(":"))
    mask = np.asarray(nmjax.magnitude_mask(rng.normal(size=(16, 24)), pattern))
    key, start = jax.random.key(3), identity(24)
    search = jax.jit(search_output_order, static_argnames=("pattern", "candidates"))
    found = search(mask, pattern, start, key, candidates=20)
    tried = [start]
    for drawn in jax.random.split(key, 20):
        # Each shuffle is of the best order so far.
        best = max(tried, key=lambda order: kept(mask, order, n, m))
        tried.append(jax.random.permutation(drawn, best))
    scores = [kept(mask, order, n, m) for order in tried]
    assert kept(mask, found, n, m) == max(scores) > scores[0]
    assert sorted(found.tolist()) == list(range(24))
    assert found.dtype == jnp.int32


def test_an_order_that_none_betters_stays():
    """Outputs 0, 1 and 2, 3 of 8 rows: as they are, no group holds more than two."""
    mask = np.zeros((4, 8), bool)
    mask[:, [0, 1, 4, 5]] = True
    found = search_output_order(mask, "2:4", identity(8), jax.random.key(0))
    assert found.tolist() == list(range(8))


def test_the_best_order_of_few_outputs_is_found():
    """Outputs 0…3 are kept in all rows, 4…7 in none: 8 remain at best, 4 as stored."""
    mask = np.zeros((2, 8), bool)
    mask[:, :4] = True
    best = max(kept(mask, np.array(p), 2, 4) for p in itertools.permutations(range(8)))
    found = search_output_order(mask, "2:4", identity(8), jax.random.key(0))
    assert kept(mask, found, 2, 4) == best == 8
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

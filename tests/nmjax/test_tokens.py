"""What recipes make of (tokens, columns) matrices, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax import NMPattern, mvue
from nmjax.tokens import joined_rows, kept_rows, sampled, sparse_tiles, spread_rows

pytestmark = pytest.mark.usefixtures("strict_promotion")

ROWS = np.arange(1.0, 19.0, dtype=np.float32).reshape(9, 2)


def test_fixed_rows_by_hand():
    pattern = NMPattern("2:4")
    np.testing.assert_array_equal(
        kept_rows(pattern, jnp.asarray(ROWS)),
        [ROWS[0], ROWS[2], ROWS[4], ROWS[6], ROWS[8], [0, 0]],
    )
    joined = [ROWS[i : i + 2].sum(0) for i in (0, 2, 4, 6, 8)]
    np.testing.assert_array_equal(
        joined_rows(pattern, jnp.asarray(ROWS)), [*joined, [0, 0]]
    )
    spread = np.zeros_like(ROWS)
    spread[::2] = joined
    np.testing.assert_array_equal(spread_rows(pattern, jnp.asarray(ROWS)), spread)


@pytest.mark.parametrize(("pattern", "kept"), [("1:4", [0]), ("3:8", [0, 2, 5])])
def test_kept_places_are_spread_evenly(pattern, kept):
    rows = np.arange(8.0, dtype=np.float32)[:, None]
    actual = kept_rows(NMPattern(pattern), jnp.asarray(rows))
    expected = [g + p for g in range(0, 8, int(pattern[-1])) for p in kept]
    np.testing.assert_array_equal(actual[:, 0], expected)
    total = joined_rows(NMPattern(pattern), jnp.asarray(rows)).sum()
    assert total == rows.sum()  # nothing is lost


@pytest.mark.slow
def test_leading_axes_are_matrices_of_their_own(rng):
    x = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    for change in (
        lambda x: sparse_tiles("largest_abs_values_greedy", x),
        lambda x: spread_rows(NMPattern("2:4"), x),
    ):
        together = change(x)
        for i in range(2):
            np.testing.assert_array_equal(together[i], change(x[i]))


def test_sampled_rows_are_those_of_mvue(rng):
    dy, key = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jax.random.key(0)
    padded = jnp.concatenate([dy, jnp.zeros((2, 3))])
    expected, mask = mvue(padded, key, "2:4", axis=0)
    np.testing.assert_array_equal(
        sampled(NMPattern("2:4"), key, dy), np.asarray(expected)[:6]
    )
    assert (np.asarray(mask).reshape(2, 4, 3).sum(1) == 2).all()

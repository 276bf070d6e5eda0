"""The greedy masks against the walk from heavy to light, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.masks.greedy import greedy_tiles

pytestmark = pytest.mark.usefixtures("strict_promotion")


def walk(tile, n):
    mask = np.zeros(tile.shape, bool)
    # Stable: ties in the order of rows, then columns.
    for place in np.argsort(-tile, axis=None, kind="stable"):
        i, j = np.unravel_index(place, tile.shape)
        mask[i, j] = mask[i].sum() < n and mask[:, j].sum() < n
    return mask


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (3, 4), (3, 5), (4, 8)])
def test_mask_is_the_walk_from_heavy_to_light(n, m, rng):
    lowest = -(2**31) + 1
    tiles = [rng.integers(*ends, (20, m, m)) for ends in ((0, 3), (lowest, 2**31))]
    tiles = np.concatenate([*tiles, np.full((1, m, m), 5)])
    keys = jnp.moveaxis(jnp.asarray(tiles, jnp.int32), 0, -1)
    masks = jax.jit(greedy_tiles, static_argnums=1)(keys, n)
    for k, tile in enumerate(tiles):
        np.testing.assert_array_equal(masks[..., k], walk(tile, n))


@pytest.mark.parametrize("m", [4, 5])
def test_the_lowest_key_is_kept_where_it_fits(m):
    keys = jnp.full((m, m, 1), -(2**31), jnp.int32)
    mask = jax.jit(greedy_tiles, static_argnums=1)(keys, 2)
    np.testing.assert_array_equal(mask[..., 0], walk(np.zeros((m, m)), 2))

"""Tiles: which entry of the matrix lands where, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.masks.tile_layout import from_entries, from_tiles, tile_entries, to_tiles

pytestmark = pytest.mark.usefixtures("strict_promotion")


def test_entries_of_a_tile_come_first():
    x = jnp.arange(2 * 6 * 9).reshape(2, 6, 9)
    tiles = to_tiles(x, 3)
    assert tiles.shape == (3, 3, 2, 2, 3)
    # Row 1 and column 2 of the tile in row 1 and column 0 of tiles.
    assert tiles[1, 2, 1, 1, 0] == x[1, 3 + 1, 2]
    np.testing.assert_array_equal(from_tiles(tiles), x)
    entries = tile_entries(x, 3)
    np.testing.assert_array_equal(jnp.stack([jnp.stack(r) for r in entries]), tiles)
    np.testing.assert_array_equal(from_entries(entries), x)

"""Matrices as m x m tiles, with the place in the tile first.

`(..., R, C)` becomes `(m, m, ..., R/m, C/m)`: one array operation then acts on the same
place of all tiles, and neither leading nor sharded axes are merged.
"""

import jax
import jax.numpy as jnp

from nmjax.masks.magnitude import check_shards
from nmjax.pattern import NMPattern


def check_tiles(x: jax.Array, pattern: NMPattern) -> jax.Array:
    """Returns `x`; raises unless m x m tiles fill its last two axes on each device."""
    if x.ndim < 2:
        raise ValueError(
            f"scores of shape {x.shape}: tiles of {pattern.m}x{pattern.m} need two axes"
        )
    for axis in (-2, -1):
        size = x.shape[axis]
        if size % pattern.m:
            raise ValueError(
                f"axis {axis} of shape {x.shape} has size {size}, not a multiple of "
                f"m = {pattern.m} (pattern {pattern}), and tiles take both of the last "
                "two axes: choose another pattern, or leave this array dense"
            )
        check_shards(x, axis, pattern, "tiles")
    return x


def to_tiles(x: jax.Array, m: int) -> jax.Array:
    """`(..., R, C)` -> `(m, m, ..., R/m, C/m)`."""
    return jnp.moveaxis(_split(x, m), (-3, -1), (0, 1))


def from_tiles(tiles: jax.Array) -> jax.Array:
    """The inverse of `to_tiles`."""
    return _merge(jnp.moveaxis(tiles, (0, 1), (-3, -1)))


def tile_entries(x: jax.Array, m: int) -> list[list[jax.Array]]:
    """The `[row][column]` of `to_tiles`, as slices: nothing is transposed."""
    x = _split(x, m)
    return [[x[..., r, :, c] for c in range(m)] for r in range(m)]


def from_entries(entries: list[list[jax.Array]]) -> jax.Array:
    """The inverse of `tile_entries`."""
    return _merge(jnp.stack([jnp.stack(row, axis=-1) for row in entries], axis=-3))


def _split(x: jax.Array, m: int) -> jax.Array:
    """`(..., R, C)` -> `(..., R/m, m, C/m, m)`."""
    *lead, rows, columns = x.shape
    # One axis at a time: of an array with an explicit sharding reshape splits but one.
    x = x.reshape(*lead, rows, columns // m, m)
    return x.reshape(*lead, rows // m, m, columns // m, m)


def _merge(x: jax.Array) -> jax.Array:
    *lead, rows, m, columns, _ = x.shape
    x = x.reshape(*lead, rows, m, columns * m)
    return x.reshape(*lead, rows * m, columns * m)

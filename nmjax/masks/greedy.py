"""Transposable N:M masks from the heaviest entry of a tile to the lightest.

An entry is kept if its row and its column have fewer than n so far. The sum is at
least half of the largest possible one; for magnitudes of normal weights it is 98.5 %
(2:4) and 98.8 % (4:8) of it. A row and a column may end with fewer than n entries,
where all places in which they cross are taken.

This is the faster form of arXiv:2102.08124, section 4.2, that their code and torchao
use. Ties go to the lower row, then to the lower column.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LOWEST = np.int32(-(2**31))


def greedy_tiles(keys: jax.Array, n: int) -> jax.Array:
    """Keeps at most n entries per row and column, the largest first.

    Args:
      keys: int32 `(m, m, ...)` in the order of the scores, m <= 32: row, column, tiles.
      n: Entries kept at most of each row and of each column.

    Returns:
      bool `(m, m, ...)`.
    """
    if keys.shape[0] > 4:
        return _in_rounds(keys, n)
    kept = greedy_entries([list(row) for row in keys], n)
    return jnp.stack([jnp.stack(row) for row in kept])


def greedy_entries(keys: list[list[jax.Array]], n: int) -> list[list[jax.Array]]:
    """`greedy_tiles` of small tiles, m <= 4, as one element-wise expression.

    The n m largest that fit are kept one after the other. The kept entries of a tile
    are a word with bit `m r + c` for row r and column c.

    Args:
      keys: `[row][column]` of the tiles: int32 arrays of one shape.
      n: Entries kept at most of each row and of each column.

    Returns:
      bool arrays of that shape, `[row][column]`.
    """
    m, taken = len(keys), _LOWEST
    places = [(r, c) for r in range(m) for c in range(m)]
    row = [sum(1 << (m * r + c) for c in range(m)) for r in range(m)]
    column = [sum(1 << (m * r + c) for r in range(m)) for c in range(m)]
    open_keys = {(r, c): jnp.maximum(keys[r][c], taken + 1) for r, c in places}
    kept = jnp.zeros_like(keys[0][0])
    for _ in range(n * m):
        largest, bit = jnp.full_like(kept, taken), jnp.zeros_like(kept)
        for r, c in places:
            larger = open_keys[r, c] > largest
            largest = jnp.where(larger, open_keys[r, c], largest)
            bit = jnp.where(larger, 1 << (m * r + c), bit)
        kept |= bit
        row_full = [lax.population_count(kept & entries) >= n for entries in row]
        column_full = [lax.population_count(kept & entries) >= n for entries in column]
        for r, c in places:
            closed = row_full[r] | column_full[c] | (kept >> (m * r + c) & 1 == 1)
            open_keys[r, c] = jnp.where(closed, taken, open_keys[r, c])
    return [[kept >> (m * r + c) & 1 == 1 for c in range(m)] for r in range(m)]


def _in_rounds(keys: jax.Array, n: int) -> jax.Array:
    """Keeps at once all that the walk from heavy to light is certain to keep.

    An entry with fewer heavier open entries in its row than the row has room, and the
    same in its column, is kept whatever becomes of those. The heaviest open entry is
    one, so the rounds end; they are few. The heavier entries of a row are a word with
    bit c for column c, those of a column one with bit r for row r.
    """
    m = keys.shape[0]
    row = lax.broadcasted_iota(jnp.int32, (m, m) + (1,) * (keys.ndim - 2), 0)
    column = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    none = jnp.uint32(0)
    bit = [jnp.left_shift(jnp.uint32(1), i.astype(jnp.uint32)) for i in (row, column)]

    def word(flags, axis):  # of booleans along an axis
        sets = jnp.where(flags, bit[axis], none)
        return jnp.expand_dims(lax.reduce(sets, none, lax.bitwise_or, (axis,)), axis)

    def heavier(place, axis):
        words = jnp.zeros_like(keys, jnp.uint32)
        for i in range(m):
            other = lax.index_in_dim(keys, i, axis)
            precedes = jnp.where(i < place, other >= keys, other > keys)
            words |= jnp.where(precedes, np.uint32(1 << i), none)
        return words

    def count(words):
        return lax.population_count(words).astype(jnp.int32)

    heavier_in_row, heavier_in_column = heavier(column, 1), heavier(row, 0)

    def keep(carry):
        kept, open_ = carry
        certain = open_
        for axis, heavier_ones in ((1, heavier_in_row), (0, heavier_in_column)):
            room = n - count(word(kept, axis))
            certain &= count(heavier_ones & word(open_, axis)) < room
        kept |= certain
        open_ &= ~kept
        for axis in (1, 0):
            open_ &= count(word(kept, axis)) < n
        return kept, open_

    none_kept = jnp.zeros_like(keys, jnp.bool_)
    return lax.while_loop(lambda c: c[1].any(), keep, (none_kept, ~none_kept))[0]

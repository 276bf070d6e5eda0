"""The best transposable N:M mask of m x m tiles: negative cycles, cancelled in batches.

A mask with n entries in every row and column of a tile is a flow from rows to columns.
In its residual graph the edge row u -> column j adds the entry (u, j) at the cost -s_uj
if it is not kept, and column j -> row v removes the entry (v, j) at the cost s_vj if it
is. A cycle exchanges entries and leaves every count as it is; its cost is what the
exchange loses. A mask is optimal if and only if no cycle has a negative cost (Klein,
Management Science 14, 1967), and then the distances d and e of rows and columns prove
it: d_u - e_j is at least s_uj for every entry that is not kept, at most s_uj for every
one that is.

All tiles search at once, by sweeps of Bellman and Ford from all rows, each sweep as m
element-wise steps for the columns and m for the rows. Every node keeps the parent that
it was last reached from. As scores are integers and only a strictly shorter way counts,
each cycle of parents has a strictly negative cost, and no two share a node: all of them
are cancelled together. A search without a negative cycle comes to rest within m + 2
sweeps. So the sum grows by at least one with every mask, and the loop ends.

"At most n" adds one spare node that rows and columns with room lead to, at no cost.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Sets of rows and of columns are the bits of 32-bit words.
MAX_M = 32

# Scores are at most 2**24 in magnitude, so a sweep moves a distance by at most 2**25,
# and 36 sweeps from a start above -2**29 stay above the least 32-bit integer.
_SCORE_BITS = 24
_FARTHEST_START = -(2**29)
_INFINITE = np.int32(2**31 - 1)

# More sweeps between two looks at the parents find few more cycles: measured for m of
# 8, 16 and 32 on a CPU, where 1 is slower by 20 % and 4 by up to 50 %.
_SWEEPS_PER_ROUND = 2


class BestTiles(NamedTuple):
    """Optimal masks of tiles, and the prices that prove it.

    With r = score - row_price - column_price, every entry that is kept has r >= 0 and
    every other one r <= 0. With `at_most`, prices are not negative either, and those of
    rows and columns with room are 0.

    Attributes:
      mask: bool `(m, m, ...)`.
      row_price: int32 `(m, ...)`.
      column_price: int32 `(m, ...)`.
      rounds: int32 scalar, the rounds that the slowest tile took.
    """

    mask: jax.Array
    row_price: jax.Array
    column_price: jax.Array
    rounds: jax.Array


class _Search(NamedTuple):
    """Distances and parents: a column's or row's index, m for the spare node, or -1."""

    row: jax.Array  # (m, ...), as the others of rows and columns
    row_parent: jax.Array
    column: jax.Array
    column_parent: jax.Array
    spare: jax.Array  # (...)
    spare_parent: jax.Array  # a row's index, or m + a column's
    changed: jax.Array  # whether the last sweep shortened a distance


def integer_scores(
    tiles: jax.Array, *, at_most: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scores as `best_tiles` takes them: integers, in units of a power of two per tile.

    The largest finite magnitude of a tile takes 24 bits. Where a tile holds infinities
    or NaN, +-2**23 stands for +-inf and -2**24 for NaN, and the finite scores are so
    much smaller that no exchange of them outweighs one.

    Args:
      tiles: Real array `(m, m, ...)`.
      at_most: Let negative scores and NaN count as zero, and zero as one unit, so that
        an optimal mask has no entry that could be added.

    Returns:
      int32 scores `(m, m, ...)` and the float32 unit of each tile, `(...)`.
    """
    scores = tiles.astype(jnp.float32)
    if at_most:
        scores = jnp.where(scores > 0, scores, 0)
    finite = jnp.isfinite(scores)
    magnitude = jnp.where(finite, jnp.abs(scores), 0)
    # The exponent field of a float32 x: x < 2**(exponent - 126).
    exponent = lax.bitcast_convert_type(magnitude.max((0, 1)), jnp.int32) >> 23
    # An exchange moves at most m entries in and m out: 2 m 2**few < 2**23.
    few = _SCORE_BITS - (4 * tiles.shape[0]).bit_length()
    shift = jnp.where(finite.all((0, 1)), _SCORE_BITS, few) + 126 - exponent
    half = shift // 2  # 2**shift itself may not be a float32
    scaled = jnp.where(finite, scores, 0) * _power(half) * _power(shift - half)
    beyond = jnp.where(scores < 0, -(2**23), -(2**24))
    beyond = jnp.where(scores > 0, 2**23, beyond)
    integers = jnp.where(finite, jnp.round(scaled).astype(jnp.int32), beyond)
    if at_most:
        integers = jnp.maximum(integers, 1)
    return integers, _power(-half) * _power(half - shift)


def _power(exponent: jax.Array) -> jax.Array:
    """2**exponent as float32, for exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def best_tiles(
    scores: jax.Array, n: int, *, at_most: bool = False, start: jax.Array | None = None
) -> BestTiles:
    """The masks of largest sum with n (or at most n) entries per row and column.

    A mask of `start` changes only where that makes its sum strictly larger, so `start`
    decides ties. Always returns an optimum, whatever the scores are.

    Args:
      scores: int32 `(m, m, ...)`: row, column, tiles; at most 2**24 in magnitude.
      n: Entries kept of each row and of each column.
      at_most: Allow fewer.
      start: bool `(m, m, ...)`, a mask that satisfies the same rule. The default keeps,
        in row i, the columns i to i + n - 1, beyond the last one from the first again.

    Returns:
      The masks, prices and number of rounds.

    Raises:
      ValueError: If m is larger than 32.
    """
    m = scores.shape[0]
    if m > MAX_M:
        raise ValueError(
            f"tiles of {m}x{m}: the solver takes m up to {MAX_M}, since sets of rows "
            "are 32-bit words"
        )
    row = lax.broadcasted_iota(jnp.int32, (m, m) + (1,) * (scores.ndim - 2), 0)
    column = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    if start is None:
        start = jnp.ones_like(scores, jnp.bool_) & ((column - row) % m < n)

    def rest(spare):  # the start of a search whose rows have the distance 0
        like = scores[:, 0]  # in its sharding too
        none, far = jnp.full_like(like, -1), jnp.full_like(like, _INFINITE)
        changed = jnp.ones_like(spare, jnp.bool_)
        return _Search(jnp.zeros_like(like), none, far, none, spare, none[0], changed)

    def advance(carry):
        mask, search, rounds = carry
        room = (mask.sum(1) < n, mask.sum(0) < n) if at_most else None
        search = lax.fori_loop(
            0, _SWEEPS_PER_ROUND, lambda _, s: _sweep(scores, mask, room, s), search
        )
        on_rows, on_columns = _cycles(search)
        mask |= on_columns[None] & (search.column_parent[None] == row)
        mask &= ~(on_rows[:, None] & (search.row_parent[:, None] == column))
        cancelled = on_columns.any(0)
        # Any distances may start a search. The last ones are nearly right for the new
        # mask, which halves the number of rounds.
        farthest = search.row.max(0)
        again = rest(jnp.clip(search.spare - farthest, _FARTHEST_START, 0))
        again = again._replace(row=jnp.maximum(search.row - farthest, _FARTHEST_START))
        search = jax.tree.map(
            lambda new, old: jnp.where(cancelled, new, old), again, search
        )
        return mask, search, rounds + 1

    carry = start, rest(jnp.zeros_like(scores[0, 0])), jnp.int32(0)
    mask, search, rounds = lax.while_loop(lambda c: c[1].changed.any(), advance, carry)
    return BestTiles(
        mask, search.row - search.spare, search.spare - search.column, rounds
    )


def _sweep(
    scores: jax.Array,
    mask: jax.Array,
    room: tuple[jax.Array, jax.Array] | None,
    search: _Search,
) -> _Search:
    """Shortens distances along every edge, rows to columns and columns to rows."""
    m = scores.shape[0]
    row, spare = search.row, search.spare
    column, column_parent = search.column, search.column_parent
    for u in range(m):
        way = jnp.where(mask[u], _INFINITE, row[u] - scores[u])
        column, column_parent = _shorter(column, column_parent, way, u)
    spare_parent = search.spare_parent
    if room:
        # A column takes one more entry for the spare node, or gives its room back.
        column, column_parent = _shorter(column, column_parent, spare, m)
        for u in range(m):
            spare, spare_parent = _shorter(spare, spare_parent, row[u], u)
            way = jnp.where(room[1][u], column[u], _INFINITE)
            spare, spare_parent = _shorter(spare, spare_parent, way, m + u)
    row_parent = search.row_parent
    for j in range(m):
        way = jnp.where(mask[:, j], column[j] + scores[:, j], _INFINITE)
        row, row_parent = _shorter(row, row_parent, way, j)
    if room:
        way = jnp.where(room[0], spare, _INFINITE)
        row, row_parent = _shorter(row, row_parent, way, m)
    changed = (row < search.row).any(0) | (spare < search.spare)
    return _Search(row, row_parent, column, column_parent, spare, spare_parent, changed)


def _shorter(distance, parent, way, through: int):
    shorter = way < distance
    return jnp.where(shorter, way, distance), jnp.where(shorter, through, parent)


def _cycles(search: _Search) -> tuple[jax.Array, jax.Array]:
    """Which rows and which columns lie on cycles of parents: bool `(m, ...)` each.

    Of all nodes, keep those that are the parent of one that was kept, again and again:
    ways that end lose their last node each time, and only cycles remain. A set of rows
    or columns is a word, row or column i its bit i.
    """
    m, none, one = search.row.shape[0], jnp.uint32(0), jnp.uint32(1)

    def single(node):  # no bit for -1, m and above, which are no row or column
        bit = jnp.left_shift(one, node.astype(jnp.uint32))
        return jnp.where((node >= 0) & (node < m), bit, none)

    def union(chosen, sets):
        chosen_sets = [jnp.where(chosen(i), sets[i], none) for i in range(m)]
        return functools.reduce(jnp.bitwise_or, chosen_sets)

    def member(nodes):
        return lambda i: (nodes >> i) & 1 == 1

    row_parents, column_parents = (
        single(search.row_parent),
        single(search.column_parent),
    )
    spare_row, spare_column = (
        single(search.spare_parent),
        single(search.spare_parent - m),
    )
    bits = [np.uint32(1 << i) for i in range(m)]
    rows_below_spare = union(lambda u: search.row_parent[u] == m, bits)
    columns_below_spare = union(lambda j: search.column_parent[j] == m, bits)

    def keep_parents(_, kept):
        rows, columns, spare = kept
        rows = union(member(columns), column_parents) | jnp.where(
            spare, spare_row, none
        )
        columns = union(member(rows), row_parents)
        columns |= jnp.where(spare, spare_column, none)
        spare = (rows & rows_below_spare) | (columns & columns_below_spare) != 0
        return rows, columns, spare

    everything = jnp.full_like(search.spare, 2**m - 1, jnp.uint32)
    kept = everything, everything, jnp.ones_like(search.changed)
    rows, columns, _ = lax.fori_loop(0, m + 3, keep_parents, kept)
    index = lax.broadcasted_iota(jnp.uint32, search.row.shape, 0)
    return (rows >> index) & 1 == 1, (columns >> index) & 1 == 1
